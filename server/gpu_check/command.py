"""`scripts/gpu_check.py`: measures each model with random weights on a GPU, one process after the other."""

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.counting import size_model
from pipelines.errors import PipelineError
from pipelines.memory_plan import ModelMemory, fits, needed_bytes
from pipelines.optimization_params import Optimizations
from pipelines.random_weights import check_has_twin
from server.child import Child
from server.gpu_check.report import GIB, Report, as_json, as_markdown
from server.gpu_check.task import PLAIN, UNFINISHED, Device, Result, Task
from server.gpu_check.variants import VARIANTS, refusal, too_large_for_host, variants_of
from server.model_entry import ModelEntry
from server.plan_command import architecture_of, every_entry, spec_of
from server.registry import ModelNotFound
from server.settings import Settings

EXIT_DONE, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_NO_DEVICE = 0, 1, 2, 3
# Enough for an import of torch on a busy machine, and for the first call of a driver.
_DESCRIBE_SECONDS = 300.0
_POLL_SECONDS = 0.05
# A folder of weights, and something to spare.
_DISK_RESERVE = 1.1
_MIN_STEPS = 4


def check_gpu(settings: Settings, arguments: Sequence[str]) -> int:
    """Measure, print the report, and write it where asked.

    Args:
        settings: for the registry.
        arguments: of the command line.

    Returns:
        Exit status: 0 when all that fits was measured; 1 when something failed; 3 when there is no device, and nothing
        was measured.

    Raises:
        ConfigError: the registry cannot be used.
        SystemExit: with status 2, for arguments that cannot be used.
    """
    options = parse(arguments)
    registry = every_entry(settings)
    try:
        entries = [registry.get(model) for model in options.models]
    except ModelNotFound as error:
        say(str(error))
        return EXIT_USAGE
    entries = entries or [entry for entry in registry if entry.source is not None]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="restage-gpu-check-") as folder:
        device = find_device(options.device, Path(folder))
        if device.problem is not None:
            say(f"{device.problem}; nothing was measured")
            return EXIT_NO_DEVICE
        check = Check(settings, options, device, Path(folder))
        for entry in entries:
            check.measure(entry)
    command = shlex.join(["python", "scripts/gpu_check.py", *arguments])
    report = Report(device, date, command, check.plans, check.results)
    print(as_markdown(report))  # noqa: T201 - what a command is for
    for file, text in ((options.json, as_json(report)), (options.markdown, as_markdown(report))):
        if file is not None:
            file.write_text(text)
    return EXIT_SOME_FAILED if any(one.outcome == "failed" for one in report.results) else EXIT_DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Measure models at full size, with random weights, on a GPU: speed bare and step by step, peak "
        "memory against the plan, what optimisations gain, how soon the device is free after a cancel. No weights are "
        "needed. Without CUDA it measures nothing, says so, and ends with status 3.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="entries; all that name a source when left out")
    parser.add_argument("--device", default="cuda:0", help="cuda:N; cpu only to try this command on tiny models")
    parser.add_argument("--steps", type=_at_least(_MIN_STEPS), default=8, help="of each measured edit (default: 8)")
    parser.add_argument("--repeats", type=_at_least(1), default=3, help="of each measurement (default: 3)")
    parser.add_argument(
        "--limit-seconds",
        type=_at_least(1),
        default=900,
        help="for one model in one variant; then it counts as failed (default: 900)",
    )
    parser.add_argument(
        "--variant", dest="variants", action="append", metavar="NAME", help="compare with this one; may be repeated"
    )
    parser.add_argument(
        "--no-variants", dest="variants", action="store_const", const=[], help="compare with none (default: all)"
    )
    parser.add_argument("--load-times", action="store_true", help="write each model to a temporary folder and load it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.variants or ()) - set(VARIANTS))
    if unknown:
        parser.error(f"no variant is called {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    for file in (options.json, options.markdown):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file} cannot be written: there is no folder {file.parent}")
    return options


def _at_least(lowest: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too few; at least {lowest}")
        return value

    return number


def say(line: str) -> None:
    """Tell how it goes on; the report alone goes to standard output."""
    print(f"restage: {line}", file=sys.stderr, flush=True)  # noqa: T201 - what a command is for


def find_device(device: str, folder: Path) -> Device:
    """Describe a device, from a process that lets go of it at once."""
    result = folder / "device.json"
    end = run_child("device", ["server.gpu_check.describing", device, str(result)], folder, _DESCRIBE_SECONDS)
    return Device.read(result) if result.exists() else Device(device, f"{device} cannot be looked at: {end}")


def run_child(name: str, module: Sequence[str], folder: Path, limit_seconds: float) -> str:
    """Run a module in a process of its own.

    Returns:
        How it ended if not well, with the last that it wrote; empty if well.
    """
    child = Child(name, [sys.executable, "-m", *module], log_file=folder / "child.log")
    child.start()
    deadline = time.monotonic() + limit_seconds
    try:
        while child.is_running and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if child.is_running:
            return f"it took longer than {limit_seconds:g} s"
    finally:
        child.kill_group()
    status = child.poll()
    return "" if status == 0 else f"it ended with status {status}: {child.tail(1)}"


class Check:
    """Measures entries one after the other.

    Args:
        settings: for the folder of weights, where architectures may be.
        options: of the command line.
        device: that works.
        folder: for files that are passed between processes.

    Attributes:
        plans: model → what the memory plan says of it.
        results: so far.
    """

    def __init__(self, settings: Settings, options: argparse.Namespace, device: Device, folder: Path) -> None:
        self._settings = settings
        self._options = options
        self._device = device
        self._folder = folder
        self.plans: dict[str, ModelMemory] = {}
        self.results: list[Result] = []

    def measure(self, entry: ModelEntry) -> None:
        """Measure one entry, plain and then in each variant."""
        try:
            task = self._task(entry)
        except PipelineError as error:
            self._add(Result(entry.id, PLAIN, "skipped", str(error)))
            return
        reason = self._too_large(entry.id)
        self._add(Result(entry.id, PLAIN, "skipped", reason) if reason else self._measure_plain(task))
        for name, optimizations in variants_of(entry.optimizations.applied, self._options.variants).items():
            self._add(self._measure_variant(replace(task, variant=name, optimizations=optimizations), reason))

    def _task(self, entry: ModelEntry) -> Task:
        # LoRAs have no architecture of their own that could be made up.
        spec = replace(spec_of(self._settings, entry), loras=(), optimizations=Optimizations())
        check_has_twin(spec)
        architecture = architecture_of(spec, entry)
        self.plans[entry.id] = size_model(spec, architecture, num_photos=entry.max_input_images).memory
        side = round(entry.area**0.5)
        return Task(
            model=entry.id,
            family=entry.family,
            pipeline=entry.pipeline,
            dtype=entry.dtype,
            area=entry.area,
            components={name: asdict(component) for name, component in architecture.components.items()},
            params=entry.resolve_params({}).resolved(side, side, entry.area, seed=0),
            num_photos=entry.max_input_images,
            device=self._options.device,
            num_steps=self._options.steps,
            repeats=self._options.repeats,
        )

    def _too_large(self, model: str) -> str | None:
        plan = self.plans[model]
        if not self._device.total_bytes or fits([plan], self._device.total_bytes):
            return None
        has, needs = self._device.total_bytes / GIB, needed_bytes([plan]) / GIB
        return f"by the memory plan it needs {needs:.1f} GiB, and the device has {has:.1f}"

    def _measure_plain(self, task: Task) -> Result:
        if not self._options.load_times:
            return self._run(task)
        with _room_for(self.plans[task.model]) as load_dir:
            if load_dir is None:
                say(f"{task.model}: no room below {tempfile.gettempdir()} to measure loading; set TMPDIR to more")
            return self._run(replace(task, load_dir=load_dir))

    def _measure_variant(self, task: Task, too_large: str | None) -> Result:
        reason = refusal(task.optimizations, task.pipeline)
        if "offload" in task.optimizations:
            # What is moved to the device part by part may be larger than it, but waits in the machine's memory.
            reason = reason or too_large_for_host(self.plans[task.model])
            task = task if too_large is None else replace(task, build_device="cpu")
        else:
            reason = reason or too_large
        return self._run(task) if reason is None else Result(task.model, task.variant, "skipped", reason)

    def _run(self, task: Task) -> Result:
        task_file, result_file = self._folder / "task.json", self._folder / "result.json"
        task.write(task_file)
        result_file.unlink(missing_ok=True)
        name = f"{task.model}, {task.variant}"
        say(f"{name}: begun")
        module = ["server.gpu_check.one_model", str(task_file), str(result_file)]
        end = run_child(name, module, self._folder, self._options.limit_seconds)
        found = Result.read(result_file) if result_file.exists() else Result(task.model, task.variant, "failed")
        # What the process itself says of its failure is better than how it ended, unless it had no time to say it.
        is_told = found.outcome != "failed" or found.reason not in {"", UNFINISHED}
        if is_told and (not end or found.outcome == "failed"):
            return found
        return replace(found, outcome="failed", reason=end or UNFINISHED)

    def _add(self, result: Result) -> None:
        say(f"{result.model}, {result.variant}: {result.outcome}{result.reason and f' ({result.reason})'}")
        self.results.append(result)


@contextmanager
def _room_for(plan: ModelMemory) -> Generator[str | None]:
    """Give an empty folder that has room for a model, removed afterwards; None where there is no room."""
    with tempfile.TemporaryDirectory(prefix="restage-weights-") as folder:
        has_room = shutil.disk_usage(folder).free > plan.weights_bytes * _DISK_RESERVE
        yield folder if has_room else None
