import copy
import gc
import random
import subprocess
import sys
import threading
import traceback
import weakref

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig  # pyright: ignore[reportPrivateImportUsage]

from pipelines.errors import OutOfMemory

RUN_THREAD = "pipeline-run"


@pytest.fixture(autouse=True)
def leaves_no_thread(request, qwen, kontext):
    """Every test ends with the threads it began with; the twins come first, since the libraries start some to load."""
    if "twin" in request.fixturenames:
        request.getfixturevalue("twin")
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def break_transformer(twin):
    """Give a function that makes the n-th call of a twin's transformer fail in the way it is given."""
    handles = []

    def break_at(call_number, fail):
        calls = []

        def count_and_fail(module, args):
            calls.append(1)
            if len(calls) == call_number:
                fail()

        handles.append(twin.model.pipeline.transformer.register_forward_pre_hook(count_and_fail))

    yield break_at
    for handle in handles:
        handle.remove()


def fail_with_value_error():
    raise ValueError("a step went wrong")


def allocate_too_much():
    torch.empty(10**16, dtype=torch.uint8)


def run_threads():
    return [thread for thread in threading.enumerate() if thread.name == RUN_THREAD]


def test_run_stops_at_every_step_boundary(twin, photos):
    """A run of n steps is advanced n times; the picture is there with the last, and not before."""
    run = twin.start(photos[:1], num_inference_steps=3)
    assert (run.step, run.total_steps, run.image) == (0, 3, None)
    assert run.advance() is True
    assert (run.step, run.image) == (1, None)
    assert run.advance() is True
    assert (run.step, run.image) == (2, None)
    assert run.advance() is False
    assert run.step == 3
    assert run.image.size == (144, 112)


def test_single_step_takes_a_single_advance(kontext, photos):
    """A run of one step encodes, steps and decodes in one go."""
    run = kontext.start(photos[:1], num_inference_steps=1)
    assert run.advance() is False
    assert run.image is not None


def test_finished_run_has_ended_its_thread(twin, photos):
    """Nothing is left running, even before the run is closed; it cannot be advanced again."""
    run = twin.start(photos[:1], num_inference_steps=2)
    while run.advance():
        assert len(run_threads()) == 1
    assert run_threads() == []
    with pytest.raises(RuntimeError, match="the run is over"):
        run.advance()
    run.close()
    run.close()
    assert run.image is not None


def test_run_gives_the_pixels_of_a_plain_call(twin, photos):
    """A run computes exactly what calling the diffusers pipeline does."""
    assert np.array_equal(twin.run(photos[:1]), twin.call(photos[:1]))


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_runs_give_the_pixels_of_plain_calls(qwen, kontext, load_twin, photos, seed):
    """Runs of several models, advanced in any order and beside ones that are closed, disturb each other in no pixel."""
    chance = random.Random(seed)
    original = load_twin("qwen_original")
    jobs = [
        (qwen, photos[:1], {"seed": 1, "num_inference_steps": 4, "prompt": "Add a sofa."}),
        (kontext, photos[1:2], {"seed": 2, "num_inference_steps": 5, "prompt": "Add a large table."}),
        (qwen, photos, {"seed": 3, "num_inference_steps": 2, "true_cfg_scale": 1.0}),
        (kontext, photos[2:], {"seed": 4, "num_inference_steps": 3, "aspect_ratio": "16:9", "guidance_scale": 4.0}),
        (qwen, photos[1:], {"seed": 5, "num_inference_steps": 3, "negative_prompt": "dark", "width": 96, "height": 64}),
        (original, photos[1:2], {"seed": 6, "num_inference_steps": 3}),
    ]
    doomed = [qwen.start(photos[:1], seed=9), kontext.start(photos[:1], seed=9)]
    runs = [twin.start(inputs, **changes) for twin, inputs, changes in jobs]
    waiting = [*runs, *doomed]
    while waiting:
        run = chance.choice(waiting)
        if run in doomed and run.step == 2:
            run.close()
            waiting.remove(run)
        elif not run.advance():
            waiting.remove(run)
    for run, (twin, inputs, changes) in zip(runs, jobs, strict=True):
        assert np.array_equal(twin.pixels(run), twin.call(inputs, **changes))
    assert [run.image for run in doomed] == [None, None]


@pytest.mark.parametrize("advances", [0, 1, 3])
def test_run_may_be_closed_at_any_boundary(twin, photos, advances):
    """A run that was never advanced, or is half done, ends at once, leaves no thread and gives no picture."""
    run = twin.start(photos[:1], num_inference_steps=4)
    for _ in range(advances):
        run.advance()
    assert len(run_threads()) == min(advances, 1)
    run.close()
    assert run_threads() == []
    run.close()
    assert run.image is None
    assert run.step == advances
    with pytest.raises(RuntimeError, match="the run is over"):
        run.advance()


@pytest.mark.parametrize("call_number", [1, 3])
def test_failure_of_the_pipeline_comes_out_of_advance(twin, photos, break_transformer, call_number):
    """What the pipeline raises reaches the lane with its traceback; the run is over, and the next one is right."""
    expected = twin.run(photos[:1])
    run = twin.start(photos[:1], true_cfg_scale=1.0) if twin.takes("true_cfg_scale") else twin.start(photos[:1])
    break_transformer(call_number, fail_with_value_error)
    for _ in range(call_number - 1):
        assert run.advance()
    with pytest.raises(ValueError, match="a step went wrong") as failed:
        run.advance()
    assert "fail_with_value_error" in "".join(traceback.format_exception(failed.value))
    assert run_threads() == []
    assert run.image is None
    run.close()
    with pytest.raises(RuntimeError, match="the run is over"):
        run.advance()
    assert np.array_equal(twin.run(photos[:1]), expected)


def test_failed_run_lets_go_of_its_tensors(twin, photos, break_transformer):
    """An error that is kept, for a log or a report, keeps none of the tensors of its run alive."""
    seen = []

    def remember_input(module, args, kwargs):
        seen.append(weakref.ref(kwargs["hidden_states"]))

    handle = twin.model.pipeline.transformer.register_forward_pre_hook(remember_input, with_kwargs=True)
    break_transformer(2, fail_with_value_error)
    with pytest.raises(ValueError, match="a step went wrong") as failed:
        twin.run(photos[:1])
    handle.remove()
    gc.collect()
    assert [reference() is None for reference in seen] == [True, True]
    assert failed.value.__traceback__ is not None


def test_too_little_memory_has_its_own_error(twin, photos, break_transformer):
    """When the allocator gives up, the lane sees OutOfMemory, whatever torch calls it."""
    break_transformer(1, allocate_too_much)
    run = twin.start(photos[:1])
    with pytest.raises(OutOfMemory, match=r"too little memory for the run: RuntimeError: .*allocate"):
        run.advance()
    run.close()


def test_closed_run_leaves_a_step_cache_clean(qwen, photos):
    """A cache that a pipeline keeps between steps is reset when a run is closed half-way."""
    transformer = qwen.model.pipeline.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    try:
        expected = qwen.run(photos[:1], num_inference_steps=8)
        disturbing = qwen.start(photos[1:2], num_inference_steps=8, seed=3)
        for _ in range(4):
            disturbing.advance()
        disturbing.close()
        assert np.array_equal(qwen.run(photos[:1], num_inference_steps=8), expected)
    finally:
        transformer.disable_cache()


def test_loaded_pipeline_is_not_changed_by_a_run(twin, photos):
    """A run keeps its state on its own copy: the scheduler and attributes of the loaded pipeline stay as they were."""
    pipeline = twin.model.pipeline
    attributes, scheduler = set(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler))
    run = twin.start(photos[:1])
    run.advance()
    assert set(vars(pipeline)) == attributes
    assert vars(pipeline.scheduler).keys() == scheduler.keys()
    assert pipeline.scheduler._step_index == scheduler["_step_index"]
    assert torch.equal(pipeline.scheduler.sigmas, scheduler["sigmas"])
    run.close()


def test_number_of_threads_belongs_to_the_run(twin, photos):
    """Torch uses as many CPU threads as the run was given, and the lane's own setting stays as it was."""
    counts = []
    handle = twin.model.pipeline.transformer.register_forward_pre_hook(
        lambda *_: counts.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            run = twin.model.start(photos[:1], twin.request(photos[:1]), num_threads=num_threads)
            run.advance()
            run.close()
    finally:
        handle.remove()
    assert (counts[0], counts[-1]) == (1, 2)
    assert torch.get_num_threads() == before


ABANDONED_RUN = """
import sys
from pathlib import Path
from PIL import Image
from pipelines.loading import ModelSpec, load_model
from pipelines.running import RunRequest

spec = ModelSpec("tiny", "flux_kontext", "FluxKontextPipeline", Path(sys.argv[1]), "float32", 128 * 128)
model = load_model(spec, "cpu")
params = {"height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 2.5, "seed": 1}
run = model.start([Image.new("RGB", (128, 128))], RunRequest("Add a sofa.", None, params, 128 * 128))
run.advance()
print("leaving", flush=True)
raise SystemExit(7)
"""


def test_abandoned_run_does_not_keep_the_process_alive(weights_dir):
    """A lane that dies without closing its runs takes the process with it, with its own exit status."""
    process = subprocess.Popen(
        [sys.executable, "-c", ABANDONED_RUN, weights_dir / "tiny-flux-kontext"], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n"
        try:
            assert process.wait(timeout=100) == 7
        finally:
            process.kill()


def test_interrupted_lane_can_still_close_its_run(twin, photos):
    """When an exception reaches the lane while a step is computed, close waits for that step and ends the run."""
    run = twin.start(photos[:1])
    run.advance()
    # The baton is given, but the lane does not wait for it to come back.
    run._may_run.put(None)
    run.close()
    assert run_threads() == []
    assert run.image is None
