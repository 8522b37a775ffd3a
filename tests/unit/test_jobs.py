"""What a job and a batch are, and which moves between states there are."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.jobs import FINAL_STATUSES, TRANSITIONS, Batch, BatchStatus, Job, JobStatus, Priority


def job(**fields: object) -> Job:
    """Describe a job that has just been submitted, but for `fields`."""
    plain = {
        "id": "j1",
        "batch_id": "b1",
        "index": 0,
        "owner": "ana",
        "model": "qwen",
        "model_version": "1",
        "prompt": "a sofa",
        "inputs": (),
    }
    return Job(**(plain | fields))  # pyright: ignore[reportArgumentType]


def test_every_state_has_its_moves() -> None:
    """The table of moves knows each state, and only known ones."""
    assert set(TRANSITIONS) == set(JobStatus)
    assert set().union(*TRANSITIONS.values()) <= set(JobStatus)


def test_a_success_is_the_only_dead_end() -> None:
    """Failed and cancelled jobs may be queued by their user's retry, and a result is never taken back."""
    assert {status for status, after in TRANSITIONS.items() if not after} == {JobStatus.SUCCEEDED}
    for status in FINAL_STATUSES - {JobStatus.SUCCEEDED}:
        assert TRANSITIONS[status] == {JobStatus.QUEUED}


def test_only_running_jobs_succeed_or_fail() -> None:
    """A queued job can be started or cancelled and nothing else."""
    assert TRANSITIONS[JobStatus.QUEUED] == {JobStatus.RUNNING, JobStatus.CANCELLED}
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        assert [before for before, after in TRANSITIONS.items() if status in after] == [JobStatus.RUNNING]


@given(st.lists(st.sampled_from(list(JobStatus)), max_size=8))
def test_every_life_can_be_brought_to_an_end(wishes: list[JobStatus]) -> None:
    """Whatever moves a job has made, it is final or at most two moves from it, and it never stands still."""
    status = JobStatus.QUEUED
    for wish in wishes:
        assert status not in TRANSITIONS[status]
        status = wish if wish in TRANSITIONS[status] else status
    assert status in FINAL_STATUSES or any(after in FINAL_STATUSES for after in TRANSITIONS[status])


def test_the_names_are_those_of_the_api() -> None:
    """States and priorities are written as clients read them."""
    assert [status.value for status in JobStatus] == ["queued", "running", "succeeded", "failed", "cancelled"]
    assert [status.value for status in BatchStatus] == ["queued", "running", "finished"]
    assert [priority.value for priority in Priority] == ["high", "normal", "low"]


@pytest.mark.parametrize(
    ("queued_at_ms", "started_at_ms", "seconds"),
    [(1000, None, None), (1000, 3500, 2.5), (1000, 1000, 0.0), (9000, 3500, None)],
    ids=["never started", "started", "at once", "queued again after its last start"],
)
def test_the_wait_counts_from_the_last_time_in_the_queue(
    queued_at_ms: int, started_at_ms: int | None, seconds: float | None
) -> None:
    """`queue_seconds` is None until the job has started in this round."""
    assert job(queued_at_ms=queued_at_ms, started_at_ms=started_at_ms).queue_seconds == seconds


def test_records_cannot_be_changed() -> None:
    """A job or batch that was read stays what it was."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        job().status = JobStatus.RUNNING  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Batch(id="b1", owner="ana").label = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_records_share_nothing_by_default() -> None:
    """Two jobs made without metadata, parameters or timings do not share them."""
    one, other = job(), job()
    assert one.metadata is not other.metadata
    assert one.params is not other.params
    assert one.timings is not other.timings
    assert Batch(id="b1", owner="ana").counts is not Batch(id="b2", owner="ana").counts
