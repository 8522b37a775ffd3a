"""An estimate follows from the jobs ahead, the workers, and what runs took lately; where one is unknown, so is it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.eta import RUN, ModelLoad, estimate_seconds, measured_speeds
from server.jobs import Batch, Job, JobStatus

MEGAPIXEL = {"height": 1024, "width": 1024}
STEPS_8 = {"num_inference_steps": 8} | MEGAPIXEL


def job(status: str = "queued", *, model: str = "qwen", place: int | None = 1, **fields: Any) -> Job:
    """Describe a job; a queued one is ready unless `place` is None."""
    return Job(
        id="j",
        batch_id="b",
        index=0,
        owner="ana",
        model=model,
        model_version="1",
        prompt="a sofa",
        inputs=(),
        status=JobStatus(status),
        queue_position=place if status == "queued" else None,
        **fields,
    )


def batch(*jobs: Job) -> Batch:
    """Describe a batch."""
    return Batch(id="b", owner="ana", jobs=jobs)


def load(num_ahead: int = 0, num_workers: int = 1, speeds: dict[str, float] | None = None) -> ModelLoad:
    """Describe what stands before a batch; a run takes 10 s unless `speeds` say something else."""
    return ModelLoad(num_ahead, num_workers, {"run": 10.0} | (speeds or {}))


def seconds_of(one: Batch, qwen: ModelLoad) -> float | None:
    """Estimate a batch of one model."""
    return estimate_seconds(one, {"qwen": qwen})


@pytest.mark.parametrize(
    "loads",
    [
        {},
        {"qwen": ModelLoad(0, 0, {"run": 1.0})},
        {"qwen": ModelLoad(0, 1, {})},
        {"qwen": ModelLoad(0, 1, {"step:20": 1.0})},
        {"qwen": ModelLoad(0, 1, {"run": 1.0}), "flux": ModelLoad(0, 0, {"run": 1.0})},
        {"flux": ModelLoad(0, 1, {}), "qwen": ModelLoad(0, 1, {"run": 1.0})},
    ],
    ids=("nothing open", "no worker", "never measured", "no run measured", "other without worker", "other unmeasured"),
)
def test_what_is_unknown_makes_the_whole_unknown(loads: dict[str, ModelLoad]) -> None:
    """There is no estimate where a model was not measured or is not served, though the others are."""
    assert estimate_seconds(batch(job(), job(model="flux")), loads) is None


def test_what_comes_first_counts_as_much_as_it_is() -> None:
    """The batch's own jobs are counted once, those of others before its last one as average runs."""
    assert seconds_of(batch(job()), load(0)) == 10
    assert seconds_of(batch(job(), job()), load(1)) == 20
    assert seconds_of(batch(job(), job()), load(4)) == 50
    assert seconds_of(batch(job("succeeded"), job("failed"), job("cancelled"), job()), load(0)) == 10


def test_a_job_that_waits_for_another_try_is_in_no_line() -> None:
    """It has to be done, but it is not one of those that are ahead."""
    assert seconds_of(batch(job(place=None)), load(0)) == 10
    assert seconds_of(batch(job(place=None), job()), load(3)) == 50
    assert seconds_of(batch(job(place=None), job(place=None), job(), job()), load(1)) == 40


def test_workers_share_the_work() -> None:
    """Twice the workers take half the time, but a run that is under way is not made faster by a second worker."""
    waiting = batch(*[job()] * 4)
    assert seconds_of(waiting, load(3)) == 40
    assert seconds_of(waiting, load(3, 2)) == 20
    running = batch(job("running"))
    assert seconds_of(running, load(0, 1)) == seconds_of(running, load(0, 4)) == 10


def test_a_run_that_is_under_way_counts_by_what_is_left() -> None:
    """By its steps; before the first one, and where their number is not known, as a whole."""
    assert seconds_of(batch(job("running", step=2, total_steps=8)), load()) == 7.5
    assert seconds_of(batch(job("running", step=8, total_steps=8)), load()) == 0
    assert seconds_of(batch(job("running", step=0, total_steps=8)), load()) == 10
    assert seconds_of(batch(job("running")), load()) == 10
    assert seconds_of(batch(job("running", step=1)), load()) == 10
    assert seconds_of(batch(job("running", step=4, total_steps=8), job()), load()) == 15
    # A job that is queued again may still show no step; what an earlier try did is not counted.
    assert seconds_of(batch(job("queued", step=4, total_steps=8)), load()) == 10


def test_a_measured_size_goes_by_its_steps() -> None:
    """The batch's own jobs are foretold by steps and size, those of others by the average run."""
    assert seconds_of(batch(job(params=STEPS_8)), load(speeds={"step:20.0": 0.5})) == 4
    assert seconds_of(batch(job(params=STEPS_8 | {"num_inference_steps": 16})), load(speeds={"step:20.0": 0.5})) == 8
    assert seconds_of(batch(job(params=STEPS_8)), load(2, 1, {"step:20.0": 0.5})) == 24
    assert (
        seconds_of(batch(job("running", params=STEPS_8, step=6, total_steps=8)), load(speeds={"step:20.0": 0.5})) == 1
    )


def test_an_unmeasured_size_is_taken_from_the_nearest() -> None:
    """Its pixels say how much more or less it costs."""
    four_megapixels = STEPS_8 | {"height": 2048, "width": 2048}
    assert seconds_of(batch(job(params=four_megapixels)), load(speeds={"step:20.0": 0.5})) == 16
    assert seconds_of(batch(job(params=STEPS_8)), load(speeds={"step:22.0": 2.0})) == 4
    # 21.5 is nearer than 20, and its measure alone counts.
    assert seconds_of(batch(job(params=four_megapixels)), load(speeds={"step:20.0": 9.0, "step:21.5": 1.0})) == 11.3


@pytest.mark.parametrize(
    "params",
    [{}, MEGAPIXEL, {"num_inference_steps": 8, "height": 1024}, STEPS_8 | {"num_inference_steps": "8"}],
    ids=("nothing", "no steps", "no width", "a text"),
)
def test_without_steps_or_size_a_run_is_an_average_one(params: dict[str, Any]) -> None:
    """What a family does not have its jobs cannot tell."""
    assert seconds_of(batch(job(params=params)), load(speeds={"step:20.0": 0.5})) == 10


def test_models_add_up() -> None:
    """A worker serves its models one after the other."""
    loads = {"qwen": load(1), "flux": ModelLoad(0, 1, {"run": 3.0})}
    assert estimate_seconds(batch(job(), job(), job(model="flux"), job("succeeded", model="old")), loads) == 23


def test_an_estimate_is_told_in_tenths() -> None:
    """More digits would promise what nobody knows."""
    assert seconds_of(batch(job()), load(speeds={"run": 1 / 3})) == 0.3


@pytest.mark.parametrize(
    ("height", "width", "name"),
    [(1024, 1024, "20.0"), (1000, 1050, "20.0"), (2048, 1024, "21.0"), (1024, 1448, "20.5"), (64, 64, "12.0")],
)
def test_a_run_is_measured_as_a_whole_and_by_step(height: int, width: int, name: str) -> None:
    """Sizes fall into steps of half a power of two, so that few have to be measured."""
    assert measured_speeds(12.0, 8, height, width) == {RUN: 12.0, f"step:{name}": 1.5}


def test_a_run_without_steps_tells_nothing_of_them() -> None:
    """Such as one whose family does not count them."""
    assert measured_speeds(12.0, 0, 1024, 1024) == {RUN: 12.0}


@given(
    run_seconds=st.floats(0.01, 1e4),
    num_steps=st.integers(1, 200),
    height=st.integers(64, 8192),
    width=st.integers(64, 8192),
)
def test_a_run_like_the_last_is_foretold_as_it_was(run_seconds: float, num_steps: int, height: int, width: int) -> None:
    """What was measured of a job foretells the same job, whatever its steps and size, and through JSON."""
    params = {"num_inference_steps": num_steps, "height": height, "width": width}
    speeds: dict[str, float] = json.loads(json.dumps(measured_speeds(run_seconds, num_steps, height, width)))
    told = seconds_of(batch(job(params=params)), ModelLoad(0, 1, speeds))
    assert told == pytest.approx(run_seconds, abs=0.051)


@given(num_ahead=st.integers(0, 500), num_workers=st.integers(1, 8), statuses=st.lists(st.sampled_from(JobStatus)))
def test_an_estimate_is_never_negative_and_more_ahead_is_never_sooner(
    num_ahead: int, num_workers: int, statuses: list[JobStatus]
) -> None:
    """Whatever is open, one job more ahead takes longer, or as long, and one worker more as long or less."""
    jobs = [replace(job(), status=status, queue_position=1 if status == "queued" else None) for status in statuses]
    num_own = max(0, sum(one.queue_position is not None for one in jobs) - 1)
    now = seconds_of(batch(*jobs), load(num_own + num_ahead, num_workers))
    later = seconds_of(batch(*jobs), load(num_own + num_ahead + 1, num_workers))
    sooner = seconds_of(batch(*jobs), load(num_own + num_ahead, num_workers + 1))
    assert now is not None
    assert later is not None
    assert sooner is not None
    assert later >= now >= sooner >= 0
