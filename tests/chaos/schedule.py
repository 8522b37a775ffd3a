"""Which faults befall a run, and when: drawn from a seed, so that a run can be repeated."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

Card = TypeVar("Card")

# How often each kind comes among so many faults; the deck is shuffled, dealt, and shuffled again. A restart of a worker
# costs ten seconds of the processor, so kills of workers are few.
DECK: Final[Mapping[str, int]] = {
    "worker.kill": 3,
    "worker.pause": 2,
    "valkey.kill": 3,
    "store.kill": 1,
    "api.kill": 2,
    "reply.loss": 6,
    "answer.loss": 2,
    "line.cut": 3,
    "line.hole": 2,
    "worker.cutoff": 2,
    "line.slow": 2,
    "memory.full": 1,
    "bells.flush": 2,
}
# Scripts of the ledger whose replies are lost, and who calls them.
_LOST_SCRIPTS: Final = (
    ("submit", "api"),
    ("claim", "worker"),
    ("start", "worker"),
    ("renew", "worker"),
    ("commit", "worker"),
    ("retry", "worker"),
)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        at_seconds: after the begin of the run.
        kind: of `DECK`.
        target: what it befalls: a process (`worker-0`), a server (`valkey`), or a line (`worker-0:redis`).
        lasts_seconds: until it is ended; of a kill, until the process is started again.
        script: of the ledger, whose replies are lost; "" for other kinds.
        times: how many replies are lost.
        bytes_per_second: of a slow line.
    """

    number: int
    at_seconds: float
    kind: str
    target: str
    lasts_seconds: float = 0.0
    script: str = ""
    times: int = 0
    bytes_per_second: float = 0.0


def draw_schedule(
    seed: int, *, seconds: float, gap_seconds: float, num_apis: int, num_workers: int, lease_seconds: float
) -> list[Fault]:
    """Draw the faults of a run.

    Args:
        seed: the same one draws the same faults.
        seconds: none begins later.
        gap_seconds: between the begins of two of them, on average.
        num_apis: processes `api-0`, `api-1`, …
        num_workers: processes `worker-0`, `worker-1`, …
        lease_seconds: of the workers; pauses are longer.
    """
    drawing = _Drawing(
        random.Random(seed),
        [f"api-{number}" for number in range(num_apis)],
        [f"worker-{number}" for number in range(num_workers)],
        lease_seconds,
    )
    faults: list[Fault] = []
    at_seconds = 0.0
    for kind in drawing.kinds():
        at_seconds += gap_seconds * drawing.random.uniform(0.5, 1.5)
        if at_seconds > seconds:
            break
        faults.append(drawing.fault(len(faults), round(at_seconds, 2), kind))
    return faults


@dataclass
class _Drawing:
    random: random.Random
    apis: list[str]
    workers: list[str]
    lease_seconds: float

    def __post_init__(self) -> None:
        self._scripts = self._deal(_LOST_SCRIPTS)
        # What is no matter of lines: whom it befalls, and how long it lasts at least and at most.
        self._ranges = {
            "worker.kill": (self.workers, 0.1, 1.0),
            "worker.pause": (self.workers, self.lease_seconds * 1.3, self.lease_seconds * 2.5),
            # It goes on working and has lost its jobs to others when it can hand them in again.
            "worker.cutoff": (self._redis_lines(self.workers), self.lease_seconds * 1.4, self.lease_seconds * 2),
            "valkey.kill": (["valkey"], 0.1, 5.0),
            "store.kill": (["store"], 0.1, 2.0),
            "api.kill": (self.apis, 0.1, 1.0),
            "memory.full": (["valkey"], 1.0, 3.0),
            "bells.flush": (["valkey"], 0.0, 0.0),
        }

    def kinds(self) -> Iterator[str]:
        return self._deal([kind for kind, count in DECK.items() for _ in range(count)])

    def fault(self, number: int, at_seconds: float, kind: str) -> Fault:
        if kind not in self._ranges:
            return self._line_fault(number, at_seconds, kind)
        targets, shortest, longest = self._ranges[kind]
        # Short ones are as likely as long ones: 0.1 to 1 s as 1 to 10 s.
        lasts_seconds = shortest * (longest / shortest) ** self.random.random() if shortest else 0.0
        return Fault(number, at_seconds, kind, self.random.choice(targets), round(lasts_seconds, 2))

    def _line_fault(self, number: int, at_seconds: float, kind: str) -> Fault:
        draw = self.random
        if kind == "reply.loss":
            script, caller = next(self._scripts)
            names = self.apis if caller == "api" else self.workers
            target = f"{draw.choice(names)}:redis"
            return Fault(number, at_seconds, kind, target, script=script, times=draw.randint(1, 4))
        if kind == "answer.loss":
            return Fault(number, at_seconds, kind, f"{draw.choice(self.apis)}:http", times=draw.randint(1, 3))
        target = self._line()
        if kind == "line.cut":
            return Fault(number, at_seconds, kind, target)
        if kind == "line.hole":
            return Fault(number, at_seconds, kind, target, round(draw.uniform(0.5, 3), 2))
        speed = draw.choice((2_000.0, 20_000.0))
        return Fault(number, at_seconds, kind, target, round(draw.uniform(1, 4), 2), bytes_per_second=speed)

    def _line(self) -> str:
        lines = [*self._redis_lines([*self.apis, *self.workers]), "store", "store"]
        return self.random.choice([*lines, *(f"{name}:http" for name in self.apis)])

    @staticmethod
    def _redis_lines(names: Sequence[str]) -> list[str]:
        return [f"{name}:redis" for name in names]

    def _deal(self, cards: Sequence[Card]) -> Iterator[Card]:
        while True:
            yield from self.random.sample(cards, len(cards))
