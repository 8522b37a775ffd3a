"""The lane in this process, on a real ledger and real twins: who goes first, when it stops, what is in memory."""

import time
from dataclasses import replace

from server.jobs import Priority
from server.worker.placement import Swap
from tests.integration.worker.lane_kit import LaneKit


def test_no_step_is_done_after_a_cancel_a_loss_or_a_deadline(workers, running_lane):
    """A run ends at the step boundary after its flag was set, with the error that says why."""
    from pipelines.errors import Cancelled, DeadlineExceeded
    from server.worker.errors import LeaseLost

    photo = workers.upload(workers.picture())
    params = {"num_inference_steps": 100, "height": 512, "width": 512}

    def after_three_steps(kit, flag):
        (in_hand,) = kit.claim(workers.job(photo, params=params))
        kit.lane.submit(in_hand)
        while (in_hand.step or 0) < 3:
            time.sleep(0.001)
        setattr(in_hand, flag, True)
        # The step under way, and one that may have begun between our look and the flag.
        last = in_hand.step + 2
        ended, error = kit.next_end()
        assert ended is in_hand
        assert 3 <= in_hand.step <= last
        workers.until("an empty device", lambda: not kit.on_device(in_hand))
        return error

    with running_lane() as kit:
        assert isinstance(after_three_steps(kit, "cancelled"), Cancelled)
        assert isinstance(after_three_steps(kit, "lost"), LeaseLost)
        assert isinstance(after_three_steps(kit, "abandoned"), LeaseLost)
    with running_lane(job_timeout_seconds=0.3) as kit:
        (in_hand,) = kit.claim(workers.job(photo, params=params))
        kit.lane.submit(in_hand)
        assert isinstance(kit.next_end()[1], DeadlineExceeded)
        assert in_hand.device_seconds > 0.3
        assert 0 < in_hand.step < 100


def test_one_job_is_on_the_device_at_a_time(workers, running_lane):
    """Only the job whose step is next is marked, also while a `high` job has set another aside; at the end none is."""
    photo = workers.upload(workers.picture())
    slow = workers.job(photo, params={"num_inference_steps": 60, "height": 256, "width": 256})
    urgent = workers.job(photo, params={"num_inference_steps": 30, "height": 256, "width": 256}, priority=Priority.HIGH)
    with running_lane() as kit:
        (normal,) = kit.claim(slow)
        kit.lane.submit(normal)
        workers.until("the device", lambda: kit.on_device(normal))
        (high,) = kit.claim(urgent)
        assert not kit.on_device(high)
        kit.lane.submit(high)
        workers.until("the change", lambda: kit.on_device(high))
        assert not kit.on_device(normal)
        assert normal.step < 60

        assert kit.next_end()[0] is high
        workers.until("the way back", lambda: kit.on_device(normal))
        assert kit.next_end()[0] is normal
        workers.until("an empty device", lambda: not kit.on_device(normal))
        assert not kit.on_device(high)


def test_job_that_was_cancelled_or_lost_has_one_step_at_most(workers, running_lane):
    """What the ledger says when a job goes on the device is heard before its second step."""
    from pipelines.errors import Cancelled
    from server.worker.errors import LeaseLost

    photo = workers.upload(workers.picture())
    with running_lane() as kit:
        cancelled, lost = kit.claim(workers.job(photo), workers.job(photo))
        workers.wait(workers.api.cancel("ana", [cancelled.job.id]))
        kit.ledger.retry(
            lost.job.id, lost.job.fence, delay_seconds=60, counts=False, max_errors=3, code="test", detail="gone"
        )
        for in_hand, expected in ((cancelled, Cancelled), (lost, LeaseLost)):
            kit.lane.submit(in_hand)
            assert isinstance(kit.next_end()[1], expected)
            assert (in_hand.step, in_hand.total_steps) == (1, in_hand.params["num_inference_steps"])


def test_model_that_is_not_resident_is_loaded_for_a_job(workers, running_lane):
    """With room for one model, a job of another still runs, and the last one loaded stays."""
    photo = workers.upload(workers.picture())
    with running_lane(max_resident_models=1) as kit:
        jobs = kit.claim(*(workers.job(photo, model) for model in (workers.QWEN, workers.FLUX, workers.QWEN)))
        for in_hand in jobs:
            kit.lane.submit(in_hand)
            ended, image = kit.next_end()
            assert ended is in_hand
            assert image.size == (in_hand.params["width"], in_hand.params["height"])
            assert list(kit.residency.resident) == [in_hand.job.model]


def test_swap_waits_for_the_end_of_a_run(workers, running_lane):
    """Models change places between jobs, never in the middle of one."""
    from server.worker.placement import Swap

    photo = workers.upload(workers.picture())
    with running_lane(max_resident_models=1) as kit:
        job = workers.job(photo, workers.QWEN, params={"num_inference_steps": 30, "height": 256, "width": 256})
        (in_hand,) = kit.claim(job)
        kit.lane.submit(in_hand)
        while in_hand.step is None:
            time.sleep(0.001)
        kit.lane.request_swap(Swap(workers.FLUX, evict=(workers.QWEN,)))
        kit.next_end()
        assert in_hand.step == 30
        workers.until("the swap", lambda: list(kit.residency.resident) == [workers.FLUX])


def test_swap_keeps_to_the_capacity(workers):
    """A swap that was decided while memory was still empty puts out what has been loaded since."""
    kit = LaneKit(workers, max_resident_models=1)
    qwen, flux = "tiny-qwen-image-edit-2511", "tiny-flux-kontext"
    kit.residency.require(qwen)
    kit.residency.swap(Swap(load=flux))
    assert set(kit.residency.resident) == {flux}


def test_weights_that_cannot_be_read_are_reported(workers, tmp_path):
    """A folder that the system does not let us read costs its own model only."""
    from server.worker.residency import Residency

    kit = LaneKit(workers)
    specs = dict(kit.residency._specs)
    broken = tmp_path / "broken"
    (broken / "model_index.json").mkdir(parents=True)  # even root cannot read it as a file
    specs["tiny-flux-kontext"] = replace(specs["tiny-flux-kontext"], weights_dir=broken)
    residency = Residency(specs, device="cpu", capacity=2, load_timeout_seconds=60, on_change=lambda: None)
    residency.check_all()
    assert "tiny-flux-kontext" not in residency.usable
    assert "tiny-qwen-image-edit-2511" in residency.usable
    assert str(broken) in (residency.statuses()["tiny-flux-kontext"].reason or "")


def test_threads_of_the_cpu_are_few_beside_a_gpu():
    """What the settings say holds; else a CPU worker takes what torch takes, and one beside a GPU a few."""
    from server.worker.device import THREADS_BESIDE_GPU, cpu_threads

    assert (cpu_threads(3, "cpu"), cpu_threads(7, "cuda:0")) == (3, 7)
    assert cpu_threads(None, "cpu") is None
    assert 1 <= (cpu_threads(None, "cuda:1") or 0) <= THREADS_BESIDE_GPU


def test_runs_of_an_exclusive_model_follow_each_other(workers, running_lane):
    """A `high` job waits for the run under way where its model keeps something from step to step; others step in."""
    photo = workers.upload(workers.picture())
    params = {"num_inference_steps": 60, "height": 256, "width": 256}
    with running_lane(max_resident_models=2) as kit:
        kit.wait_loaded(workers.FLUX)
        kit.residency.is_exclusive = lambda model: model == workers.FLUX
        (slow,) = kit.claim(workers.job(photo, workers.FLUX, params=params))
        kit.lane.submit(slow)
        workers.until("a first step", lambda: slow.step)
        same, other = kit.claim(
            workers.job(photo, workers.FLUX, priority=Priority.HIGH),
            workers.job(photo, workers.QWEN, priority=Priority.HIGH),
        )
        kit.lane.submit(other)
        assert kit.next_end()[0] is other
        kit.lane.submit(same)
        assert [kit.next_end()[0] for _ in range(2)] == [slow, same]


def test_further_models_are_loaded_only_while_there_is_nothing_to_do(workers):
    """With two models to load at the start, a job of the first waits for no other load, and a stop for none either."""
    kit = LaneKit(workers, max_resident_models=2)
    (in_hand,) = kit.claim(workers.job(workers.upload(workers.picture()), workers.QWEN))
    ended_with, load = [], kit.residency._load
    kit.residency._load = lambda name: ended_with.append((name, in_hand.has_left_device)) or load(name)
    kit.thread.start()
    try:
        kit.wait_loaded(workers.QWEN)
        kit.lane.submit(in_hand)
        assert kit.next_end()[0] is in_hand
        kit.wait_loaded(workers.FLUX)
        assert ended_with == [(workers.QWEN, False), (workers.FLUX, True)]
    finally:
        kit.lane.stop()
        kit.thread.join(60)
    assert not kit.thread.is_alive()

    kit = LaneKit(workers, max_resident_models=2)

    def stop_once_started():
        if kit.residency.has_started:
            kit.lane.stop()

    kit.residency._on_change = stop_once_started
    kit.thread.start()
    kit.thread.join(60)
    assert not kit.thread.is_alive()
    assert kit.residency.loaded == [workers.QWEN]
