"""The tiny twins on a real GPU: the same pictures however runs are mixed, and memory that comes back."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import OutOfMemory
from pipelines.running import Run
from tests.integration.pipelines.conftest import Twin

STEPS = (4, 3, 5)
MARGIN_BYTES = 64 * 2**20


def finish(run: Run) -> None:
    while run.advance():
        pass


@pytest.mark.parametrize("seed", range(3))
def test_interleaved_runs_give_the_pixels_of_undisturbed_ones(
    gpu_twin: Twin, photos: list[Image.Image], seed: int
) -> None:
    """Runs that are advanced in any order, beside one that is closed halfway, differ in no bit from runs alone."""
    chance = random.Random(seed)
    asked = [{"seed": number, "num_inference_steps": steps} for number, steps in enumerate(STEPS)]
    alone = [gpu_twin.run(photos[:1], **one) for one in asked]
    assert np.array_equal(gpu_twin.call(photos[:1], **asked[0]), alone[0])
    runs = [gpu_twin.start(photos[:1], **one) for one in asked]
    doomed = gpu_twin.start(photos[:1], seed=9)
    waiting = [*runs, doomed]
    while waiting:
        run = chance.choice(waiting)
        if run is doomed and run.step == 2:
            run.close()
            waiting.remove(run)
        elif not run.advance():
            waiting.remove(run)
    for run, picture in zip(runs, alone, strict=True):
        assert np.array_equal(gpu_twin.pixels(run), picture)


def test_a_cancelled_run_leaves_nothing_on_the_gpu(
    cuda: str, gpu_twin: Twin, photos: list[Image.Image], allocated: Callable[[], int]
) -> None:
    """The first runs make tables and workspaces that stay; the same runs again leave no byte more."""
    held: list[int] = []
    for _ in range(2):
        for num_advances in range(4):
            run = gpu_twin.start(photos[:1])
            for _ in range(num_advances):
                run.advance()
            run.close()
        held.append(allocated())
    assert held[1] == held[0]


def test_a_model_that_is_closed_leaves_nothing_on_the_gpu(
    cuda: str, weights_dir: Path, photos: list[Image.Image], allocated: Callable[[], int]
) -> None:
    """Loaded, run and closed three times, each model takes no more after the last time than after the first."""
    from pipelines.flux_kontext.params import Params
    from pipelines.loading import load_model
    from tests.integration.pipelines.conftest import twin_spec

    spec = twin_spec(weights_dir, "kontext")
    held = []
    for _ in range(3):
        twin = Twin("kontext", load_model(spec, cuda), Params)
        twin.run(photos[:1])
        twin.model.close()
        del twin
        held.append(allocated())
    assert held[-1] <= held[0]


def test_out_of_memory_ends_the_run_alone(
    cuda: str, gpu_twin: Twin, photos: list[Image.Image], allocated: Callable[[], int]
) -> None:
    """The allocator's own error comes out as OutOfMemory, what the run held is free, and the next run is right."""
    import torch

    expected = gpu_twin.run(photos[:1])
    held = [allocated()]
    torch.cuda.empty_cache()
    # All that this process has now, and a little more: a picture of 4 million pixels takes many times that.
    limit_bytes = torch.cuda.memory_reserved(cuda) + MARGIN_BYTES
    torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.mem_get_info(cuda)[1], cuda)
    try:
        for _ in range(2):
            run = gpu_twin.start(photos[:1], height=2048, width=2048)
            with pytest.raises(OutOfMemory, match="too little memory for the run"):
                finish(run)
            held.append(allocated())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    # Libraries may have made workspaces for the larger layers, once.
    assert held[2] == held[1] < held[0] + MARGIN_BYTES
    assert np.array_equal(gpu_twin.run(photos[:1]), expected)
