"""Which model this worker should hold next: a pure function, so that it can be tested and simulated."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.memory_plan import ModelMemory, fits

# Taken for what was never measured, and only where nothing better is known. Of a load: what the worker's other models
# took on average.
UNMEASURED_JOB_SECONDS = 30.0
UNMEASURED_LOAD_SECONDS = 60.0
# A busy model that must leave for a starving one has had the device for at least so many times the load: where all
# models starve, loading takes at most a fifth of the device's time.
TURN_LOADS = 4.0


@dataclass(frozen=True)
class Demand:
    """What one model is asked for, over all workers.

    Attributes:
        num_ready: jobs that wait to be claimed.
        oldest_age_seconds: of those.
        num_workers: that hold it or are loading it, this one included.
        job_seconds: a run takes so long, as measured lately; None: never measured.
        load_seconds: a load takes so long on this worker; None: never measured.
        left_seconds: since it was last in this worker's memory; None: never.
    """

    num_ready: int
    oldest_age_seconds: float
    num_workers: int
    job_seconds: float | None = None
    load_seconds: float | None = None
    left_seconds: float | None = None

    @property
    def work_seconds(self) -> float:
        """What all waiting jobs take on one device."""
        return self.num_ready * (UNMEASURED_JOB_SECONDS if self.job_seconds is None else self.job_seconds)

    def drain_seconds(self, num_workers: int) -> float:
        """How long so many workers need for all that waits: 0 when nothing does, infinite without workers."""
        if self.num_ready == 0:
            return 0.0
        return self.work_seconds / num_workers if num_workers > 0 else math.inf

    @property
    def neglected_seconds(self) -> float:
        """How long nothing has been done for it, as far as this worker knows; 0 while somebody holds it.

        The age of its oldest job alone would not tell: after a burst of thousands every turn ends with jobs that are
        older than all of another model's, which would then never get one.
        """
        if self.num_ready == 0 or self.num_workers > 0:
            return 0.0
        return min(self.oldest_age_seconds, math.inf if self.left_seconds is None else self.left_seconds)

    @property
    def waiting_cost_seconds(self) -> float:
        """What its waiting jobs have lost by now, in seconds of waiting over all of them."""
        return self.num_ready * self.neglected_seconds


@dataclass(frozen=True)
class Resident:
    """A model in memory: seconds since it was loaded, and since a job of it was last in hand (0: there is one now)."""

    age_seconds: float
    idle_seconds: float


@dataclass(frozen=True)
class Room:
    """What fits into memory.

    Attributes:
        sizes: of the models; one that is missing takes no memory, as far as anybody knows.
        budget_bytes: of the device; None: no bound.
        max_models: that may be in memory together; None: no bound.
    """

    sizes: Mapping[str, ModelMemory]
    budget_bytes: int | None
    max_models: int | None

    def holds(self, models: Sequence[str]) -> bool:
        """Tell whether these fit beside each other. One alone always may: only trying shows whether it does."""
        if len(models) <= 1:
            return True
        if self.max_models is not None and len(models) > self.max_models:
            return False
        known = [self.sizes[model] for model in models if model in self.sizes]
        return self.budget_bytes is None or fits(known, self.budget_bytes)


@dataclass(frozen=True)
class Swap:
    """Load a model, after others have been put out to make room."""

    load: str
    evict: tuple[str, ...] = ()


def choose_swap(
    demand: Mapping[str, Demand], resident: Mapping[str, Resident], room: Room, *, max_wait_seconds: float
) -> Swap | None:
    """Decide whether another model should be loaded, and which ones make room for it.

    What is loaded is preferred. A model that others hold is only loaded where it pays: its jobs must take longer than
    the load and than all that this worker could do instead. Its holders may also be kept from it for ever, by `high`
    jobs of another model: once its oldest job has waited `max_wait_seconds` for each of them, one more loads it,
    however few its jobs are, though no busy model leaves for that. Each further copy needs a further wait, so that not
    all workers come at once. A model that nobody holds is loaded at once where room is left or a model without waiting
    jobs can go, the least recently used first. A busy model stays while this is its last holder; where others hold it
    too, it goes once the waiting of the other's jobs adds up to what the load costs its own.

    Nothing of that holds for a model that *starves*: no worker holds it, and for `max_wait_seconds` nothing has been
    done for it. The one that has starved longest comes next, and nothing else is loaded before; a busy model that only
    this worker holds must have had its turn of `TURN_LOADS` loads.

    So there is a bound. Of M models, one that waits and is held by nobody begins to be loaded on any worker that could
    hold it after at most `max_wait_seconds` + (M - 1) x (turn + the jobs in hand + one load), and sooner with every
    further worker: each of the others is loaded at most once before it, since whatever has left memory counts as
    neglected from then on only. Of two models on one worker, either waits for `max_wait_seconds` or a turn, whichever
    is longer, and the jobs in hand.

    Args:
        demand: of each model that this worker can serve.
        resident: the models in memory.
        room: what fits.
        max_wait_seconds: how long a model may go without being served while the worker is busy with others.

    Returns:
        The swap, or None when all is well.
    """
    wanted = {model: one for model, one in demand.items() if one.num_ready > 0 and model not in resident}
    if not wanted:
        return None
    view = _View(demand, resident, room, max_wait_seconds)
    starving = [model for model, one in wanted.items() if view.starves(one)]
    if starving:
        return view.swap_to(max(starving, key=lambda model: wanted[model].neglected_seconds))
    for model in sorted(wanted, key=lambda model: _urgency(wanted[model]), reverse=True):
        if swap := view.swap_to(model):
            return swap
    return None


def _urgency(one: Demand) -> tuple[float, float, int]:
    return one.drain_seconds(one.num_workers), one.waiting_cost_seconds, one.num_ready


@dataclass(frozen=True)
class _View:
    """What `choose_swap` knows."""

    demand: Mapping[str, Demand]
    resident: Mapping[str, Resident]
    room: Room
    max_wait_seconds: float

    def starves(self, one: Demand) -> bool:
        """Tell whether nothing else may come before it."""
        return one.num_ready > 0 and one.num_workers == 0 and one.neglected_seconds >= self.max_wait_seconds

    def _is_passed_over(self, one: Demand) -> bool:
        """Tell whether its holders have had time enough for its oldest job: each further one gets a further wait."""
        return one.oldest_age_seconds >= self.max_wait_seconds * one.num_workers

    def swap_to(self, model: str) -> Swap | None:
        """Return how this model comes into memory, or None where it may not now."""
        evict = self._victims(model)
        if evict is None:
            return None
        one = self.demand[model]
        kept = [self.demand[other] for other in self.resident if other not in evict and other in self.demand]
        busy_seconds = max((other.drain_seconds(other.num_workers) for other in kept), default=0.0)
        is_soon_done = one.drain_seconds(one.num_workers) <= self._load_seconds(one) + busy_seconds
        if one.num_workers > 0 and is_soon_done and not self._is_passed_over(one):
            return None
        return Swap(model, evict)

    def _victims(self, model: str) -> tuple[str, ...] | None:
        """Name as few as needed of those that may leave for this model; None where they do not suffice."""
        evict: list[str] = []
        for other in self._in_order_of_leaving():
            if self._fits(model, evict):
                break
            if self._may_leave(other, self.demand[model]):
                evict.append(other)
        if not self._fits(model, evict):
            return None
        # A small one may have been named before a large one that makes room enough.
        for other in reversed(tuple(evict)):
            others = [one for one in evict if one != other]
            if self._fits(model, others):
                evict = others
        return tuple(evict)

    def _fits(self, model: str, evict: Iterable[str]) -> bool:
        gone = set(evict)
        return self.room.holds([*(other for other in self.resident if other not in gone), model])

    def _in_order_of_leaving(self) -> list[str]:
        def place(model: str) -> tuple[bool, bool, float, float]:
            one, there = self._demand_of(model), self.resident[model]
            return one.num_ready > 0, one.num_workers <= 1, -there.idle_seconds, -there.age_seconds

        return sorted(self.resident, key=place)

    def _may_leave(self, other: str, one: Demand) -> bool:
        leaving = self._demand_of(other)
        if leaving.num_ready == 0:
            return not self._is_better_placed_elsewhere(other, one)
        if self.starves(one):
            had_its_turn = self.resident[other].age_seconds >= TURN_LOADS * self._load_seconds(one)
            return leaving.num_workers > 1 or had_its_turn
        if leaving.num_workers <= 1:
            return False
        if one.num_workers == 0:
            num_delayed = max(1.0, leaving.num_ready / leaving.num_workers)
            return one.waiting_cost_seconds >= self._load_seconds(one) * num_delayed
        # The other way round this could not hold afterwards, so no worker swings between two models.
        left_behind_seconds = leaving.drain_seconds(leaving.num_workers - 1)
        return one.drain_seconds(one.num_workers) > self._load_seconds(one) + left_behind_seconds

    def _is_better_placed_elsewhere(self, other: str, one: Demand) -> bool:
        """Tell whether the last copy of an idle model should wait for a worker that holds one of several copies."""
        if self.starves(one) or self._demand_of(other).num_workers > 1:
            return False
        if self.resident[other].idle_seconds >= self.max_wait_seconds:
            return False
        somebody_has_a_copy_to_spare = any(
            model not in self.resident and has.num_workers > 1 and has.drain_seconds(has.num_workers - 1) == 0.0
            for model, has in self.demand.items()
        )
        return somebody_has_a_copy_to_spare and one.waiting_cost_seconds < self._load_seconds(self._demand_of(other))

    def _demand_of(self, model: str) -> Demand:
        return self.demand.get(model, Demand(num_ready=0, oldest_age_seconds=0.0, num_workers=1))

    def _load_seconds(self, one: Demand) -> float:
        if one.load_seconds is not None:
            return one.load_seconds
        known = [other.load_seconds for other in self.demand.values() if other.load_seconds is not None]
        return sum(known) / len(known) if known else UNMEASURED_LOAD_SECONDS
