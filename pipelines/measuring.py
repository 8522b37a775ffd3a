"""Measure a loaded model on its device: its speed bare and step by step, its memory, how soon it lets go.

The same code runs on a CPU with tiny models, where the figures mean nothing and memory is left out; only the calls of
`torch.cuda` are then skipped.
"""

import copy
import importlib
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from pipelines.errors import BadInput
from pipelines.loading import LoadedModel
from pipelines.running import Run, RunRequest

# Name, with its unit → value.
Figures = dict[str, float | bool]

# Steps of the shorter of two edits, whose difference is what steps alone take. Some schedules cannot have fewer.
SHORT_STEPS = 2
# As long as an ordinary prompt, and as long as some family takes; families differ, so the longest that fits is used.
PROMPT = "Furnish this empty room as a modern living room with a sofa, a rug and warm light; keep walls and windows."
LONG_PROMPT_WORDS = (1000, 500, 480, 400, 200)


@dataclass(frozen=True)
class Edit:
    """What is asked of a model, again and again."""

    photos: list[Image.Image]
    request: RunRequest

    def of_steps(self, num_steps: int, *, seed: int = 0) -> "Edit":
        """Ask for the same in so many steps."""
        changes = {"num_inference_steps": num_steps, "seed": seed}
        return replace(self, request=replace(self.request, params=self.request.params | changes))


@dataclass(frozen=True)
class SteppedEdit:
    """An edit that was advanced step by step, as the lane does.

    Attributes:
        advances: seconds of each; the first also encodes, the last also decodes.
    """

    image: Image.Image
    advances: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """From the first advance to the picture."""
        return sum(self.advances)

    @property
    def step_seconds(self) -> float:
        """Mean of the advances that are nothing but a step."""
        return statistics.mean(self.advances[1:-1] or self.advances)


def make_photo(area: int) -> Image.Image:
    """Draw a square photo of about `area` pixels."""
    side = round(area**0.5)
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * turn).resize((side, side)) for turn in range(3)])


def ordinary_edit(params: Mapping[str, Any], area: int) -> Edit:
    """Ask for what most jobs are: one photo, a short prompt.

    Args:
        params: of the family, resolved for the photo of `make_photo(area)`.
        area: at which the model reads photos.
    """
    return Edit([make_photo(area)], RunRequest(PROMPT, None, dict(params), area))


def largest_edit(model: LoadedModel, params: Mapping[str, Any], num_photos: int) -> Edit:
    """Ask for what a memory plan is made for: as many photos as a job may have, and as long a prompt.

    Raises:
        BadInput: even the shortest of the prompts is too long.
    """
    photos = [make_photo(model.spec.area)] * num_photos
    refused: BadInput | None = None
    for num_words in LONG_PROMPT_WORDS:
        prompt = " ".join(["a"] * num_words)
        edit = Edit(photos, RunRequest(prompt, None, dict(params), model.spec.area))
        try:
            model.start(edit.photos, edit.request).close()
        except BadInput as error:
            refused = error
        else:
            return edit
    raise refused or BadInput("no prompt was tried")


def torch_threads(device: str) -> int | None:
    """Say how many threads torch gets on the CPU: one where that is the device, so that pictures can be compared."""
    return 1 if device == "cpu" else None


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def run_bare(model: LoadedModel, edit: Edit, device: str) -> tuple[float, Image.Image]:
    """Call the pipeline as anybody would, in one go and in this thread; gives seconds and picture.

    Of how many threads torch has in this thread the caller decides.
    """
    family = importlib.import_module(f"pipelines.{model.spec.family}.run")
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = copy.deepcopy(model.pipeline.scheduler)
    synchronize(device)
    started = time.perf_counter()
    call = family.build_call(pipeline, edit.photos, edit.request)
    with call.first_advance():
        image = pipeline(**call.kwargs).images[0]
    synchronize(device)
    return time.perf_counter() - started, image


def run_stepped(model: LoadedModel, edit: Edit, device: str) -> SteppedEdit:
    """Take an edit step by step, with a stop after each, as the lane does."""
    synchronize(device)
    started = time.perf_counter()
    run = model.start(edit.photos, edit.request, num_threads=torch_threads(device))
    advances: list[float] = []
    try:
        is_unfinished = True
        while is_unfinished:
            is_unfinished = run.advance()
            synchronize(device)
            now = time.perf_counter()
            advances.append(now - started)
            started = now
        return SteppedEdit(_picture(run), tuple(advances))
    finally:
        run.close()


def measure_speed(model: LoadedModel, edit: Edit, device: str, *, num_steps: int, repeats: int) -> Figures:
    """Compare plain calls of the pipeline with runs that stop after each step; in turn, so that drift hits both.

    Args:
        model: loaded on `device`.
        edit: what is asked.
        device: as torch names it.
        num_steps: of the longer edits, at least four.
        repeats: of each; medians are taken.
    """
    short, long = edit.of_steps(SHORT_STEPS), edit.of_steps(num_steps)
    first_seconds, _ = run_bare(model, short, device)
    bare: list[float] = []
    bare_short: list[float] = []
    stepped: list[SteppedEdit] = []
    is_same = True
    for _ in range(repeats):
        bare_short.append(run_bare(model, short, device)[0])
        seconds, image = run_bare(model, long, device)
        bare.append(seconds)
        stepped.append(run_stepped(model, long, device))
        is_same = is_same and stepped[-1].image.tobytes() == image.tobytes()
    bare_seconds, stepped_seconds = statistics.median(bare), statistics.median(one.seconds for one in stepped)
    bare_step_seconds = (bare_seconds - statistics.median(bare_short)) / (num_steps - SHORT_STEPS)
    step_seconds = statistics.median(one.step_seconds for one in stepped)
    return {
        "first_edit_seconds": first_seconds,
        "bare_edit_seconds": bare_seconds,
        "edit_seconds": stepped_seconds,
        "lane_adds_percent": 100 * (stepped_seconds / bare_seconds - 1),
        # Of tiny models on a busy machine the difference can come out at nothing or less.
        "bare_steps_per_second": 1 / bare_step_seconds if bare_step_seconds > 0 else 0.0,
        "steps_per_second": 1 / step_seconds,
        "step_seconds": step_seconds,
        "first_advance_seconds": statistics.median(one.advances[0] for one in stepped),
        "last_advance_seconds": statistics.median(one.advances[-1] for one in stepped),
        "same_picture": is_same,
    }


def measure_stepped(model: LoadedModel, edit: Edit, device: str, *, num_steps: int, repeats: int) -> Figures:
    """Measure runs alone, which is all that different ways to run a model are compared by.

    The first edit pays for what is compiled or tuned then, and is told apart.
    """
    first = run_stepped(model, edit.of_steps(num_steps), device)
    stepped = [run_stepped(model, edit.of_steps(num_steps), device) for _ in range(repeats)]
    step_seconds = statistics.median(one.step_seconds for one in stepped)
    return {
        "first_edit_seconds": first.seconds,
        "edit_seconds": statistics.median(one.seconds for one in stepped),
        "steps_per_second": 1 / step_seconds,
        "step_seconds": step_seconds,
    }


def measure_peak(model: LoadedModel, edit: Edit, device: str) -> Figures:
    """Measure what a device holds at most during one edit; nothing on a CPU, of which torch keeps no account.

    `peak_bytes` is what tensors took, weights included; `reserved_bytes` what torch took of the device for them;
    `device_used_bytes` what is taken of the device afterwards, by whomever, and with CUDA's own context.
    """
    if not device.startswith("cuda"):
        run_stepped(model, edit.of_steps(SHORT_STEPS), device)
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    at_rest_bytes = torch.cuda.memory_allocated(device)
    run_stepped(model, edit.of_steps(SHORT_STEPS), device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {
        "weights_bytes": at_rest_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "device_used_bytes": total_bytes - free_bytes,
    }


def measure_cancel(model: LoadedModel, edit: Edit, device: str, *, step_seconds: float, repeats: int) -> Figures:
    """Measure how long after a cancel the device is free: the rest of the step that is running, and letting go."""
    latencies: list[float] = []
    num_threads = torch_threads(device)
    for flag in _flags(step_seconds, repeats):
        run = model.start(edit.photos, edit.request, num_threads=num_threads)
        try:
            if _advance_until(run, flag):
                run.close()
                synchronize(device)
                latencies.append(time.perf_counter() - flag.set_at)
        finally:
            run.close()
            flag.cancel()
    return _latencies("cancel", latencies, step_seconds)


def measure_preemption(model: LoadedModel, edit: Edit, device: str, *, step_seconds: float, repeats: int) -> Figures:
    """Measure how long after a `high` job has come its run begins, and its first step is done.

    The run that was set aside goes on afterwards; `resumed_same_picture` says whether it ended as an undisturbed one.
    """
    undisturbed = run_stepped(model, edit, device).image
    begun: list[float] = []
    stepped: list[float] = []
    is_same = True
    num_threads = torch_threads(device)
    for flag in _flags(step_seconds, repeats):
        run = model.start(edit.photos, edit.request, num_threads=num_threads)
        high = model.start(edit.photos, edit.of_steps(SHORT_STEPS, seed=1).request, num_threads=num_threads)
        try:
            if _advance_until(run, flag):
                begun.append(time.perf_counter() - flag.set_at)
                is_unfinished = high.advance()
                synchronize(device)
                stepped.append(time.perf_counter() - flag.set_at)
                _finish(high, is_unfinished=is_unfinished)
                is_same = is_same and _finish(run).tobytes() == undisturbed.tobytes()
        finally:
            run.close()
            high.close()
            flag.cancel()
    figures = _latencies("preemption", begun, step_seconds)
    if stepped:
        figures |= {"preemption_to_first_step_max_seconds": max(stepped), "resumed_same_picture": is_same}
    return figures


class _Flag:
    """Set by another thread after a while, as the control thread sets a job's."""

    def __init__(self, delay_seconds: float) -> None:
        self.set_at = 0.0
        self.is_set = False
        self._timer = threading.Timer(delay_seconds, self._set)
        self.start: Callable[[], None] = self._timer.start
        self.cancel: Callable[[], None] = self._timer.cancel

    def _set(self) -> None:
        self.set_at = time.perf_counter()
        self.is_set = True


def _flags(step_seconds: float, repeats: int) -> Sequence[_Flag]:
    # Anywhere within the second and third step; the same places each time.
    chance = random.Random(0)  # noqa: S311 - no secret
    return [_Flag(step_seconds * chance.uniform(0.05, 1.95)) for _ in range(repeats)]


def _advance_until(run: Run, flag: _Flag) -> bool:
    """Advance until the flag is seen between two steps, or the run ends before; tells whether it was seen."""
    is_unfinished = run.advance()
    flag.start()
    while is_unfinished:
        if flag.is_set:
            return True
        is_unfinished = run.advance()
    return False


def _finish(run: Run, *, is_unfinished: bool = True) -> Image.Image:
    while is_unfinished:
        is_unfinished = run.advance()
    return _picture(run)


def _picture(run: Run) -> Image.Image:
    if run.image is None:
        raise RuntimeError("the run has ended without a picture")
    return run.image


def _latencies(name: str, latencies: Sequence[float], step_seconds: float) -> Figures:
    if not latencies:
        return {}
    return {
        f"{name}_median_seconds": statistics.median(latencies),
        f"{name}_max_seconds": max(latencies),
        f"{name}_max_steps": max(latencies) / step_seconds,
    }
