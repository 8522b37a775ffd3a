"""Which job the device takes one step further: a pure function, so that it can be tested and simulated."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from server.jobs import Priority

_RANK = {priority: rank for rank, priority in enumerate(Priority)}


class Candidate(Protocol):
    """What the choice depends on."""

    @property
    def priority(self) -> Priority:
        """As it was submitted."""
        ...

    @property
    def order(self) -> int:
        """Number of its claim; no two are the same."""
        ...

    @property
    def is_under_way(self) -> bool:
        """Whether its run has begun and not ended."""
        ...

    @property
    def waited_seconds(self) -> float:
        """How long others have had the device while it was ready."""
        ...

    @property
    def model(self) -> object:
        """Which weights it needs in memory; equal for jobs that share them."""
        ...

    @property
    def variant(self) -> object:
        """What it changes about the model itself, for all runs of it: the LoRAs laid over it."""
        ...

    @property
    def is_exclusive(self) -> bool:
        """Whether its model keeps something of one run from step to step, so that no two may be under way."""
        ...


C = TypeVar("C", bound=Candidate)


def choose(jobs: Sequence[C], *, max_wait_seconds: float) -> C:
    """Return the job that gets the next step.

    The highest priority goes first, then what is under way, then what was claimed first. A job whose model is in use by
    runs that it cannot run beside has to wait for them, so they are finished first, in its place: nothing else that
    stands behind it is begun meanwhile.

    Nobody waits for ever. A job that others have kept from the device for `max_wait_seconds` counts as `high` from then
    on, for good. After that no job can pass it that was not under way or claimed already: with at most `n` jobs in hand
    it begins, or goes on, once others have had the device for `max_wait_seconds` and then for what is left of `n - 1`
    runs. From there on it is interrupted by none that was claimed later.

    Args:
        jobs: all that are ready for the device; at least one.
        max_wait_seconds: see above.
    """

    def rank(job: C) -> tuple[int, bool, int]:
        is_promoted = job.waited_seconds >= max_wait_seconds
        priority = Priority.HIGH if is_promoted else job.priority
        return _RANK[priority], not job.is_under_way, job.order

    best = min(jobs, key=rank)
    return min(_in_the_way_of(best, jobs), key=rank, default=best)


def _in_the_way_of(job: C, jobs: Iterable[C]) -> list[C]:
    """List the runs under way that must have ended before `job` may begin."""
    if job.is_under_way:
        return []
    return [one for one in jobs if one.is_under_way and _conflict(one, job)]


def _conflict(one: Candidate, other: Candidate) -> bool:
    is_shared = one.model == other.model
    return is_shared and (one.is_exclusive or other.is_exclusive or one.variant != other.variant)
