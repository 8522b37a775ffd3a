"""Which job gets the next step, as a pure function: order, conflicts, and that nobody waits for ever."""

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.jobs import Priority
from server.worker.policy import choose

MAX_WAIT_SECONDS = 20.0
HIGH, NORMAL, LOW = Priority.HIGH, Priority.NORMAL, Priority.LOW


@dataclass(eq=False)
class Waiting:
    """A job as the policy sees it, in a simulation whose steps all take a second."""

    order: int
    priority: Priority = NORMAL
    model: str = "qwen"
    variant: str = ""
    is_exclusive: bool = False
    is_under_way: bool = False
    waited_seconds: float = 0.0
    num_steps: int = 1
    num_done: int = 0
    promoted_at: int | None = None
    ahead: frozenset[int] = frozenset()


def pick(*jobs: Waiting) -> Waiting:
    return choose(jobs, max_wait_seconds=MAX_WAIT_SECONDS)


def conflict(one: Waiting, other: Waiting) -> bool:
    return one.model == other.model and (one.variant != other.variant or one.is_exclusive or other.is_exclusive)


def test_priority_goes_first_then_what_is_under_way_then_what_was_claimed_first() -> None:
    """Each decides only where those before it leave a choice."""
    first, later = Waiting(1), Waiting(3)
    under_way = Waiting(2, is_under_way=True)
    urgent = Waiting(4, HIGH)
    idle_time = Waiting(0, LOW, is_under_way=True)

    assert pick(first, under_way, later, urgent, idle_time) is urgent
    assert pick(first, under_way, later, idle_time) is under_way
    assert pick(first, later, idle_time) is first


def test_runs_in_the_way_of_the_best_job_are_finished_first() -> None:
    """However late in the line they stand, they go on in its place; nothing behind it is begun meanwhile."""
    styled = Waiting(1, LOW, variant="style", is_under_way=True)
    plain = Waiting(2, HIGH)
    same = Waiting(3, HIGH, variant="style")
    elsewhere = Waiting(4, HIGH, model="flux")

    assert pick(styled, plain, same, elsewhere) is styled
    assert pick(plain, same, elsewhere) is plain
    assert pick(styled, same, elsewhere) is same
    assert pick(styled, Waiting(2, NORMAL), elsewhere) is elsewhere


def test_run_of_an_exclusive_model_is_not_interrupted_by_one_of_the_same_model() -> None:
    """What it keeps from step to step would be the other's; a job of another model may step in between."""
    cached = Waiting(1, is_exclusive=True, is_under_way=True)

    assert pick(cached, Waiting(2, HIGH, is_exclusive=True)) is cached
    assert pick(cached, other := Waiting(2, HIGH, model="flux")) is other


def test_job_that_waited_long_counts_as_high_for_good() -> None:
    """It is begun before `high` jobs that came later, and none of them interrupts it."""
    old = Waiting(1, LOW, waited_seconds=MAX_WAIT_SECONDS)
    before, after = Waiting(0, HIGH), Waiting(2, HIGH)

    assert pick(old, before, after) is before
    assert pick(old, after) is old
    old.is_under_way = True
    assert pick(old, before, after) is old


job_kinds = st.fixed_dictionaries(
    {
        "priority": st.sampled_from((HIGH, HIGH, NORMAL, LOW)),
        "model": st.sampled_from(("qwen", "qwen", "flux")),
        "variant": st.sampled_from(("", "", "style")),
        "num_steps": st.integers(1, 9),
    }
)


def step(jobs: list[Waiting], now: int) -> Waiting:
    """Let the chosen job do a step; the others wait, and some are promoted by it."""
    chosen = choose(jobs, max_wait_seconds=MAX_WAIT_SECONDS)
    chosen.is_under_way = True
    chosen.num_done += 1
    for job in jobs:
        if job is chosen:
            continue
        job.waited_seconds += 1
        if job.promoted_at is None and job.waited_seconds >= MAX_WAIT_SECONDS:
            job.promoted_at = now
            job.ahead = frozenset(one.order for one in jobs if one.is_under_way or one.order < job.order)
    return chosen


@given(kinds=st.lists(job_kinds, min_size=20, max_size=60), hand_size=st.integers(2, 5), exclusive=st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_job_waits_longer_than_the_bound(kinds: list[dict[str, Any]], hand_size: int, exclusive: bool) -> None:
    """However jobs arrive, one that waited `max_wait_seconds` is passed by none that was not there, and then ends soon.

    The hand is refilled at once, so `high` jobs arrive as fast as they can. Runs that conflict are never under way
    together.
    """
    arriving = [Waiting(order, is_exclusive=exclusive, **kind) for order, kind in enumerate(kinds)]
    longest = max(job.num_steps for job in arriving)
    jobs: list[Waiting] = []
    now = 0
    while arriving or jobs:
        while arriving and len(jobs) < hand_size:
            jobs.append(arriving.pop(0))
        now += 1
        chosen = step(jobs, now)
        under_way = [job for job in jobs if job.is_under_way]
        assert not any(conflict(one, other) for one in under_way for other in under_way if one is not other)
        for job in jobs:
            if job.promoted_at is not None and job is not chosen:
                assert chosen.order in job.ahead
                assert job.waited_seconds <= MAX_WAIT_SECONDS + (hand_size - 1) * longest
        if chosen.num_done == chosen.num_steps:
            jobs.remove(chosen)
