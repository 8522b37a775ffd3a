"""A lane and stage threads in this process, on real servers and twins: cancels in every phase, and memory that ends."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from pipelines.errors import OutOfMemory
from server.jobs import JobStatus, Priority

PHASES = ("fetch", "encode", "step", "decode", "store")
NUM_STEPS = 5


@contextmanager
def called_first(owner, name, act):
    """Do something in the midst of a real call: whenever `owner.name` is called, before it goes on."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        act()
        return real(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


@pytest.fixture
def open_runner(decoders):
    """Give a function that makes the stage threads of a lane kit."""
    pool = ThreadPoolExecutor(2)

    yield lambda kit: kit.runner(decoders, pool, lambda error: pytest.fail(repr(error)))
    pool.shutdown()


def pixels(image):
    return np.asarray(image).astype(int)


def test_cancel_ends_a_job_in_whichever_phase_it_comes(workers, running_lane, open_runner):
    """Fetching, encoding, between two steps, decoding, storing: no later step is done, and nothing is left behind.

    Encoding and decoding are part of a pipeline's call and cannot be interrupted: they are finished first.
    """
    photo = workers.upload(workers.picture())

    def job():
        return workers.job(photo, params={"num_inference_steps": NUM_STEPS})

    with running_lane() as kit:
        runner = open_runner(kit)
        kit.lane._on_image, kit.lane._on_failure = runner.finish, runner.fail
        parts = kit.wait_loaded(workers.FLUX).pipeline
        seen = {}
        for phase in PHASES:
            (in_hand,) = kit.claim(job())
            in_hand.photos = []

            def cancel(in_hand=in_hand, phase=phase):
                if phase == "step" and in_hand.step != 2:
                    return
                if in_hand.cancelled:
                    return
                workers.wait(workers.api.cancel("ana", [in_hand.job.id]))
                in_hand.cancelled = True

            call = {
                "fetch": (workers.store, "fetch_upload"),
                "encode": (parts.text_encoder_2, "forward"),
                "step": (parts.transformer, "forward"),
                "decode": (parts.vae, "decode"),
                "store": (workers.store, "put_output"),
            }[phase]
            with called_first(*call, cancel):
                runner.begin(in_hand, kit.lane.submit)
                assert kit.hand.wait_empty(60)
            ended = workers.read(in_hand.job.id)
            assert (ended.status, ended.error, ended.output) == (JobStatus.CANCELLED, None, None), phase
            assert workers.outputs(in_hand.job.id) == []
            seen[phase] = in_hand.step
        assert seen == {"fetch": None, "encode": 1, "step": 3, "decode": NUM_STEPS, "store": NUM_STEPS}

        (in_hand,) = kit.claim(job())
        runner.begin(in_hand, kit.lane.submit)
        assert kit.hand.wait_empty(60)
        assert workers.read(in_hand.job.id).status is JobStatus.SUCCEEDED


@contextmanager
def too_little_memory(model, *, times):
    """Let a model's decoder ask for more memory than any machine has, some times."""
    import torch

    left = [times]

    def ask():
        if left[0] > 0:
            left[0] -= 1
            torch.empty(2**45)

    with called_first(model.pipeline.vae, "decode", ask):
        yield


def test_run_without_memory_is_tried_once_more_with_the_device_to_itself(workers, running_lane):
    """Then it makes the picture that it always makes, and so does the run that was set aside for it."""
    photo = workers.upload(workers.picture())
    slow = {"num_inference_steps": 60, "height": 256, "width": 256}
    with running_lane(max_resident_models=2) as kit:
        alone = {}
        for model, params in ((workers.QWEN, {}), (workers.FLUX, slow)):
            (in_hand,) = kit.claim(workers.job(photo, model, params=params))
            kit.lane.submit(in_hand)
            alone[model] = pixels(kit.next_end()[1])
        assert set(kit.residency.loaded) == {workers.QWEN, workers.FLUX}

        (aside,) = kit.claim(workers.job(photo, workers.FLUX, params=slow))
        kit.lane.submit(aside)
        workers.until("a first step", lambda: aside.step)
        (full,) = kit.claim(workers.job(photo, workers.QWEN, priority=Priority.HIGH))
        with too_little_memory(kit.residency._loaded[workers.QWEN], times=1):
            kit.lane.submit(full)
            ended, image = kit.next_end()
        assert ended is full
        assert np.array_equal(pixels(image), alone[workers.QWEN])
        ended, image = kit.next_end()
        assert ended is aside
        assert np.array_equal(pixels(image), alone[workers.FLUX])


def test_memory_that_has_gone_to_pieces_is_noticed(workers, running_lane):
    """Jobs that do not fit fail; those no larger than one that did fit are to be tried again, and three are a sign."""
    from server.worker.errors import MemoryInPieces

    photo = workers.upload(workers.picture())
    with running_lane() as kit:
        model = kit.wait_loaded(workers.FLUX)

        def end(**params):
            (in_hand,) = kit.claim(workers.job(photo, params=params))
            kit.lane.submit(in_hand)
            ended, end = kit.next_end()
            assert ended is in_hand
            return end

        with too_little_memory(model, times=100):
            # Nothing as large ever fitted: perhaps it never does.
            assert all(isinstance(end(), OutOfMemory) for _ in range(4))
        end()
        with too_little_memory(model, times=4):
            assert all(isinstance(end(), MemoryInPieces) for _ in range(2))
        end()
        with too_little_memory(model, times=8):
            assert all(isinstance(end(height=64, width=64), MemoryInPieces) for _ in range(2))
            assert isinstance(end(height=512, width=512), OutOfMemory)
            assert kit.ended.empty()
            (in_hand,) = kit.claim(workers.job(photo))
            kit.lane.submit(in_hand)
            assert kit.next_end() == (None, "worn out")
            assert isinstance(kit.next_end()[1], MemoryInPieces)
