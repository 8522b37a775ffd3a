"""A fleet of workers under virtual time: the very placement and claim policy, job by job instead of step by step."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby
from operator import attrgetter

from server.simulation.claim_policy import ClaimPolicy, OldestFirst, QueuedJob
from server.simulation.fleet import Fleet
from server.simulation.outcome import Outcome
from server.simulation.trace import Submission
from server.worker.placement import Demand, Resident, Swap, choose_swap

# As COMMIT keeps what runs take: what is new counts for a fifth.
NEW_SHARE = 0.2


@dataclass(slots=True, eq=False)
class _Job(QueuedJob):
    seconds: float = 0.0
    at_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    # For each model in memory: since when, and when a job of it was last in hand.
    loaded_at: dict[str, float] = field(default_factory=dict[str, float])
    used_at: dict[str, float] = field(default_factory=dict[str, float])
    left_at: dict[str, float] = field(default_factory=dict[str, float])
    load_seconds: dict[str, float] = field(default_factory=dict[str, float])
    loading: str | None = None
    job: _Job | None = None
    since: float = 0.0
    next_plan_at: float = 0.0
    # Counts its lives: what was to happen in an earlier one does not.
    life: int = 0


class Simulation:
    """Takes a fleet through a trace.

    Args:
        fleet: what there is.
        submissions: what comes, by time.
        any_model: a worker takes the oldest job whatever its model, and loads what it needs: what others do.
        keep_loads: whether the outcome says when what was loaded.
        seed: of the failures.
    """

    def __init__(
        self,
        fleet: Fleet,
        submissions: Iterable[Submission],
        *,
        any_model: bool = False,
        keep_loads: bool = False,
        seed: int = 0,
    ) -> None:
        self.outcome = Outcome(fleet.num_workers)
        self._fleet = fleet
        self._room, self._preloaded = fleet.room, fleet.preloaded()
        # What comes at the same moment is all there before any worker looks, as a batch of several models is.
        self._submissions = groupby(submissions, key=attrgetter("at_seconds"))
        self._any_model = any_model
        self._keep_loads = keep_loads
        self._draw = random.Random(seed)  # noqa: S311 (a simulation)
        self._queue: ClaimPolicy = OldestFirst() if any_model else ClaimPolicy()
        self._model_ids = [model.id for model in fleet.models]
        self._loads = {model.id: model.load_seconds for model in fleet.models}
        self._holders = dict.fromkeys(self._model_ids, 0)
        self._job_seconds: dict[str, float] = {}
        # Workers without anything to do, by what they hold; of each, the one that has been idle longest comes first.
        self._idle: dict[frozenset[str], dict[_Worker, None]] = {}
        self._num_submitted = self._num_open = 0
        self._is_over = False
        self._tick_awaits = False
        self._now = 0.0
        self._num_events = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> Outcome:
        """Let time pass until the last job has ended."""
        for number in range(self._fleet.num_workers):
            worker = _Worker(number)
            self._fill(worker)
            self._begin_life(worker)
            self._set_idle(worker)
        self._await_submission()
        while self._events and not (self._is_over and self._num_open == 0):
            self._now, _, happen = heappop(self._events)
            happen()
        return self.outcome

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heappush(self._events, (seconds, self._num_events, happen))

    def _in_this_life(self, worker: _Worker, seconds: float, happen: Callable[[_Worker], None]) -> None:
        life = worker.life

        def happen_if_alive() -> None:
            if worker.life == life:
                happen(worker)

        self._at(self._now + seconds, happen_if_alive)

    # Jobs come in.

    def _await_submission(self) -> None:
        at_seconds, coming = next(self._submissions, (0.0, None))
        if coming is None:
            self._is_over = True
            return
        batches = list(coming)
        self._at(at_seconds, lambda: self._submit(batches))

    def _submit(self, batches: Sequence[Submission]) -> None:
        for batch in batches:
            jobs = [
                _Job(
                    id="",
                    owner=batch.owner,
                    model=batch.model,
                    priority=batch.priority,
                    order=self._num_submitted + place,
                    seconds=seconds,
                    at_seconds=self._now,
                )
                for place, seconds in enumerate(batch.job_seconds)
            ]
            self._num_submitted += len(jobs)
            self._num_open += len(jobs)
            self._queue.submit(jobs)
        for model in dict.fromkeys(batch.model for batch in batches):
            self._wake(model)
        self._await_submission()

    def _wake(self, model: str) -> None:
        """Let idle workers claim: those that hold the model first; the others plan."""
        for held in [one for one in self._idle if model in one]:
            while self._queue.num_ready(model) and (worker := next(iter(self._idle.get(held, ())), None)):
                self._leave_idle(worker)
                self._claim(worker)
        if not self._any_model:
            self._plan_idle()
        while self._any_model and self._queue.num_ready(model) and self._idle:
            worker = next(iter(next(iter(self._idle.values()))))
            self._leave_idle(worker)
            self._claim(worker)

    # Workers work.

    def _claim(self, worker: _Worker) -> None:
        job = self._queue.claim(worker.loaded_at)
        if not isinstance(job, _Job):
            self._set_idle(worker)
            return
        worker.job = job
        if job.model in worker.loaded_at:
            self._start(worker)
        else:
            self._load(worker, Swap(job.model, self._least_recently_used(worker, job.model)), self._start)

    def _start(self, worker: _Worker) -> None:
        if worker.job:
            worker.since = self._now
            self._in_this_life(worker, worker.job.seconds, self._finish)

    def _finish(self, worker: _Worker) -> None:
        job = worker.job
        if job is None:
            return
        worker.job = None
        worker.used_at[job.model] = self._now
        known = self._job_seconds.get(job.model, job.seconds)
        self._job_seconds[job.model] = (1 - NEW_SHARE) * known + NEW_SHARE * job.seconds
        self._num_open -= 1
        outcome = self.outcome
        wait_seconds = worker.since - job.at_seconds
        outcome.waits_seconds[job.priority].append(wait_seconds)
        outcome.owner_waits_seconds[job.owner].append(wait_seconds)
        outcome.in_system_seconds += self._now - job.at_seconds
        outcome.worked_seconds += job.seconds
        outcome.end_seconds = self._now
        self._go_on(worker)

    def _go_on(self, worker: _Worker) -> None:
        if self._any_model or not self._swaps(worker):
            self._claim(worker)

    def _set_idle(self, worker: _Worker) -> None:
        self._idle.setdefault(frozenset(worker.loaded_at), {})[worker] = None
        if not self._any_model:
            self._await_tick()

    def _leave_idle(self, worker: _Worker) -> None:
        held = frozenset(worker.loaded_at)
        del self._idle[held][worker]
        if not self._idle[held]:
            del self._idle[held]

    # Models come and go.

    def _await_tick(self) -> None:
        """While jobs wait that no idle worker may claim, idle workers plan again and again, as real ones do."""
        if not self._tick_awaits and any(map(self._queue.num_ready, self._model_ids)):
            self._tick_awaits = True
            self._at(self._now + self._fleet.poll_seconds, self._tick)

    def _tick(self) -> None:
        self._tick_awaits = False
        self._plan_idle()

    def _plan_idle(self) -> None:
        # Those that hold the same would decide the same: where the one that has been idle longest stays, all stay.
        for held in list(self._idle):
            while worker := next(iter(self._idle.get(held, ())), None):
                self._leave_idle(worker)
                if not self._swaps(worker):
                    self._idle.setdefault(held, {})
                    self._idle[held] = {worker: None, **self._idle[held]}
                    break
        if self._idle:
            self._await_tick()

    def _swaps(self, worker: _Worker) -> bool:
        """Let a worker plan, and begin what it decides."""
        if self._now < worker.next_plan_at or not self._others_wait(worker):
            return False
        worker.next_plan_at = self._now + self._fleet.poll_seconds
        resident = {
            model: Resident(self._now - since, self._now - worker.used_at[model])
            for model, since in worker.loaded_at.items()
        }
        demand = {model: self._demand(worker, model) for model in self._model_ids}
        swap = choose_swap(demand, resident, self._room, max_wait_seconds=self._fleet.max_wait_seconds)
        if swap is None:
            return False
        self._load(worker, swap, self._go_on)
        return True

    def _others_wait(self, worker: _Worker) -> bool:
        return any(self._queue.num_ready(model) for model in self._model_ids if model not in worker.loaded_at)

    def _demand(self, worker: _Worker, model: str) -> Demand:
        oldest, left_at = self._queue.oldest(model), worker.left_at.get(model)
        return Demand(
            num_ready=self._queue.num_ready(model),
            oldest_age_seconds=self._now - oldest.at_seconds if isinstance(oldest, _Job) else 0.0,
            num_workers=self._holders[model],
            job_seconds=self._job_seconds.get(model),
            load_seconds=worker.load_seconds.get(model),
            left_seconds=None if left_at is None else self._now - left_at,
        )

    def _least_recently_used(self, worker: _Worker, model: str) -> tuple[str, ...]:
        kept = sorted(worker.loaded_at, key=worker.used_at.__getitem__)
        evict: list[str] = []
        while kept and not self._room.holds([*kept, model]):
            evict.append(kept.pop(0))
        return tuple(evict)

    def _load(self, worker: _Worker, swap: Swap, then: Callable[[_Worker], None]) -> None:
        for model in swap.evict:
            del worker.loaded_at[model]
            worker.left_at[model] = self._now
            self._holders[model] -= 1
        # As the ledger notes it: a model counts as held from when its load was decided.
        self._holders[swap.load] += 1
        worker.loading = swap.load
        seconds = self._loads[swap.load]
        self.outcome.num_loads += 1
        self.outcome.num_evictions += len(swap.evict)
        if self._keep_loads:
            self.outcome.loads.append((self._now, worker.number, swap.load))

        def loaded(worker: _Worker) -> None:
            self.outcome.loading_seconds += seconds
            worker.load_seconds[swap.load] = seconds
            self._keep(worker, swap.load)
            then(worker)

        self._in_this_life(worker, seconds, loaded)

    def _keep(self, worker: _Worker, model: str) -> None:
        worker.loading = None
        worker.loaded_at[model] = worker.used_at[model] = self._now

    # Workers die.

    def _begin_life(self, worker: _Worker) -> None:
        worker.life += 1
        if failures := self._fleet.failures:
            self._in_this_life(worker, self._draw.expovariate(1 / failures.mean_seconds_between), self._die)

    def _die(self, worker: _Worker) -> None:
        failures, job = self._fleet.failures, worker.job
        if failures is None:
            return
        worker.life += 1
        self.outcome.num_deaths += 1
        held = [*worker.loaded_at, *([worker.loading] if worker.loading else [])]
        self._at(self._now + failures.forgotten_seconds, lambda: self._forget(held))
        if worker in self._idle.get(frozenset(worker.loaded_at), ()):
            self._leave_idle(worker)
        if job:
            if worker.loading is None:
                self.outcome.lost_seconds += self._now - worker.since
            self._at(self._now + failures.lease_seconds, lambda: self._give_back(job))
        worker.job = worker.loading = None
        for memory in (worker.loaded_at, worker.used_at, worker.left_at, worker.load_seconds):
            memory.clear()
        preload_seconds = sum(self._loads[model] for model in self._preloaded)
        self._at(self._now + failures.restart_seconds + preload_seconds, lambda: self._come_back(worker))

    def _forget(self, held: Iterable[str]) -> None:
        for model in held:
            self._holders[model] -= 1

    def _give_back(self, job: _Job) -> None:
        self._queue.give_back(job)
        self._wake(job.model)

    def _come_back(self, worker: _Worker) -> None:
        self._fill(worker)
        self.outcome.num_loads += len(self._preloaded)
        self.outcome.loading_seconds += sum(map(self._loads.__getitem__, self._preloaded))
        self._begin_life(worker)
        self._go_on(worker)

    def _fill(self, worker: _Worker) -> None:
        for model in self._preloaded:
            worker.load_seconds[model] = self._loads[model]
            self._holders[model] += 1
            self._keep(worker, model)
