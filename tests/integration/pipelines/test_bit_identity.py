"""Whatever is asked for, a run makes the picture of the pipeline's own call, to the bit, alone or among others."""

import copy
import importlib
import string
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.loading import _pass_image_positions as pass_image_positions
from tests.integration.pipelines.conftest import DEFAULTS, GENERIC_TWINS, Twin

EXAMPLES = 8
# Of each twin in turn: what a request for it may say.
GUIDANCE = ("true_cfg_scale", "guidance_scale", "image_guidance_scale")
SIDES = st.integers(4, 12).map(lambda number: number * 16)
PROMPTS = st.text(string.ascii_letters + string.digits + " ,.é木🪑", min_size=1, max_size=60)


@pytest.fixture(scope="module")
def plain_call(weights_dir: Any) -> Iterator[Callable[..., np.ndarray]]:
    """Give a function that calls a pipeline which diffusers itself has loaded, and which no run has ever used."""
    loaded: dict[str, Any] = {}

    def call(twin: Twin, photos: list[Image.Image], changes: dict[str, Any]) -> np.ndarray:
        spec = twin.model.spec
        if spec.id not in loaded:
            pipeline = getattr(diffusers, spec.pipeline).from_pretrained(spec.weights_dir, dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            pass_image_positions(pipeline)
            loaded[spec.id] = pipeline
        family = importlib.import_module(f"pipelines.{spec.family}.run")
        prepared = family.build_call(loaded[spec.id], photos, twin.request(photos, **changes))
        with prepared.first_advance():
            return np.asarray(copy.copy(loaded[spec.id])(**prepared.kwargs).images[0]).astype(int)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(num_threads)


@st.composite
def pictures(draw: st.DrawFn, most: int) -> list[Image.Image]:
    """Draw one to `most` photos of any shape that every family takes."""
    photos: list[Image.Image] = []
    for _ in range(draw(st.integers(1, most))):
        height, width, seed = draw(st.integers(50, 400)), draw(st.integers(50, 400)), draw(st.integers(0, 99))
        patch = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        photos.append(Image.fromarray(patch).resize((width, height), Image.Resampling.BICUBIC))
    return photos


@st.composite
def requests(draw: st.DrawFn, twin: Twin) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw photos and settings that the twin takes."""
    changes: dict[str, Any] = {
        "seed": draw(st.integers(0, 2**53 - 1)),
        "num_inference_steps": draw(st.integers(2, 5)),
        "prompt": draw(PROMPTS),
    }
    for name in GUIDANCE:
        if twin.takes(name) and name not in DEFAULTS.get(twin.name, {}):
            changes[name] = draw(st.sampled_from([1.0, 1.5, 4.0]))
    size = draw(st.sampled_from(["match_input", "1:1", "9:16", "sides"]))
    changes |= {"width": draw(SIDES), "height": draw(SIDES)} if size == "sides" else {"aspect_ratio": size}
    if twin.params_model(**{name: value for name, value in changes.items() if name != "prompt"}).uses_negative_prompt:
        changes["negative_prompt"] = draw(st.none() | PROMPTS)
    return draw(pictures(min(3, twin.params_model.MAX_INPUT_IMAGES))), changes


def test_runs_are_the_pipelines_own_calls(twin: Twin, plain_call: Callable[..., np.ndarray]) -> None:
    """Undisturbed, and interleaved with others of which one is given up, each run makes the plain call's pixels."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        wanted = data.draw(st.lists(requests(twin), min_size=2, max_size=3))
        expected = [plain_call(twin, photos, changes) for photos, changes in wanted]
        photos, changes = wanted[0]
        assert np.array_equal(twin.run(photos, **changes), expected[0])

        # As in a worker: only with the pictures that the family announced.
        runs = [twin.start(twin.staged(photos, **changes), **changes) for photos, changes in wanted]
        doomed = twin.start(*data.draw(st.tuples(pictures(1))), seed=1)
        waiting = [*runs, doomed]
        while waiting:
            run = waiting[data.draw(st.integers(0, len(waiting) - 1))]
            if run is doomed and run.step == 1:
                run.close()
                waiting.remove(run)
            elif not run.advance():
                waiting.remove(run)
        for run, pixels in zip(runs, expected, strict=True):
            assert np.array_equal(twin.pixels(run), pixels)

    compare()


@pytest.mark.parametrize("name", list(GENERIC_TWINS))
@pytest.mark.parametrize(("height", "width"), [(301, 200), (77, 333)])
def test_generic_family_reads_a_photo_only_at_the_sizes_it_announces(
    load_twin: Callable[[str], Twin], name: str, height: int, width: int
) -> None:
    """With nothing of a photo but its pictures at those sizes, each class of another kind makes the same pixels."""
    twin = load_twin(name)
    photos = [Image.radial_gradient("L").resize((width, height)).convert("RGB")]
    changes = {"num_inference_steps": 2}

    assert np.array_equal(twin.run(twin.staged(photos, **changes), **changes), twin.run(photos, **changes))
