"""Which job a worker claims, as `server/ledger/lua/claim.lua` has it, without Redis: the simulation's queue."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from server.jobs import Priority

PRIORITIES = tuple(Priority)


@dataclass(slots=True, eq=False)
class QueuedJob:
    """What the order of jobs depends on.

    Attributes:
        id: of whoever made it.
        order: its age: the lower, the older; no two have the same.
        is_ready: whether it waits to be claimed.
    """

    id: str
    owner: str
    model: str
    priority: Priority
    order: int
    is_ready: bool = False


@dataclass(slots=True)
class _Line:
    """The ready jobs of one model and priority: the owners in turn, the oldest job of each first."""

    turns: dict[str, int] = field(default_factory=dict[str, int])
    # A place that was left stays in the heap until it comes up.
    places: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    ready: dict[str, list[tuple[int, QueuedJob]]] = field(default_factory=dict[str, list[tuple[int, QueuedJob]]])

    def first(self) -> tuple[int, QueuedJob] | None:
        """Return the turn of the owner who is next, and the oldest job of that owner."""
        while self.places:
            turn, owner = self.places[0]
            if self.turns.get(owner) == turn:
                return turn, self.ready[owner][0][1]
            heappop(self.places)
        return None

    def place(self, owner: str, turn: int) -> None:
        """Let the owner stand at this turn."""
        self.turns[owner] = turn
        heappush(self.places, (turn, owner))

    def add(self, job: QueuedJob, turn: int) -> None:
        """Let a job be ready; an owner who begins to wait stands at this turn."""
        heappush(self.ready.setdefault(job.owner, []), (job.order, job))
        if job.owner not in self.turns:
            self.place(job.owner, turn)

    def remove_first(self, owner: str) -> None:
        """Take the oldest job of an owner; with the last one the place goes too."""
        heappop(self.ready[owner])
        if not self.ready[owner]:
            del self.ready[owner], self.turns[owner]


class ClaimPolicy:
    """The ready jobs of all models: claimed by priority, then the owners in turn, then age.

    Turns are the numbers of calls, where Redis takes its clock; suspects are unknown here.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[Priority, str], _Line] = {}
        self._num_calls = 0
        self._num_ready: dict[str, int] = defaultdict(int)
        # By age; a job that was claimed stays until it comes up.
        self._oldest: dict[str, list[tuple[int, QueuedJob]]] = defaultdict(list)

    def submit(self, jobs: Iterable[QueuedJob]) -> None:
        """Let the jobs of one owner wait, all at once."""
        self._num_calls += 1
        for job in jobs:
            job.is_ready = True
            self._num_ready[job.model] += 1
            heappush(self._oldest[job.model], (job.order, job))
            line = self._lines.get((job.priority, job.model))
            if line is None:
                line = self._lines[job.priority, job.model] = _Line()
            line.add(job, self._num_calls)

    def give_back(self, job: QueuedJob) -> None:
        """Let a claimed job wait again, at its old place among its owner's."""
        self.submit((job,))

    def claim(self, models: Iterable[str], priorities: Sequence[Priority] = PRIORITIES) -> QueuedJob | None:
        """Hand out the best ready job of these models."""
        lines_of = self._lines
        for priority in priorities:
            lines = [line for model in models if (line := lines_of.get((priority, model))) is not None and line.turns]
            waiting = [(turn, job.order, job) for turn, job in filter(None, (line.first() for line in lines))]
            if waiting:
                job = min(waiting)[2]
                self._hand_out(job, lines)
                return job
        return None

    def _hand_out(self, job: QueuedJob, lines: Iterable[_Line]) -> None:
        self._num_calls += 1
        job.is_ready = False
        self._num_ready[job.model] -= 1
        self._lines[job.priority, job.model].remove_first(job.owner)
        # Whoever was served goes to the end of each line that this worker looks at.
        for line in lines:
            if job.owner in line.turns:
                line.place(job.owner, self._num_calls)

    def num_ready(self, model: str) -> int:
        """Count the jobs of a model that wait."""
        return self._num_ready[model]

    def oldest(self, model: str) -> QueuedJob | None:
        """Return the oldest job of a model that waits."""
        waiting = self._oldest[model]
        while waiting:
            if waiting[0][1].is_ready:
                return waiting[0][1]
            heappop(waiting)
        return None


class OldestFirst(ClaimPolicy):
    """What the simulation compares with: the oldest job of the highest priority, whatever its model and owner."""

    def __init__(self) -> None:
        super().__init__()
        self._by_age: dict[Priority, list[tuple[int, QueuedJob]]] = {priority: [] for priority in PRIORITIES}

    def submit(self, jobs: Iterable[QueuedJob]) -> None:
        """Let jobs wait."""
        for job in jobs:
            job.is_ready = True
            self._num_ready[job.model] += 1
            heappush(self._by_age[job.priority], (job.order, job))

    def claim(self, models: Iterable[str], priorities: Sequence[Priority] = PRIORITIES) -> QueuedJob | None:  # noqa: ARG002
        """Hand out the oldest job; `models` count for nothing."""
        for priority in priorities:
            if self._by_age[priority]:
                job = heappop(self._by_age[priority])[1]
                job.is_ready = False
                self._num_ready[job.model] -= 1
                return job
        return None
