"""What is simulated: workers, their memory, how they die."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.memory_plan import ModelMemory
from server.simulation.trace import FleetModel
from server.worker.placement import Room


@dataclass(frozen=True)
class Failures:
    """How workers die, and how long what they leave behind stays.

    Attributes:
        mean_seconds_between: deaths of one worker; how long each lives is drawn at random.
        lease_seconds: until the job of a dead worker is handed out again.
        forgotten_seconds: until a dead worker no longer counts as one that holds models.
        restart_seconds: until it comes back, with nothing in memory.
    """

    mean_seconds_between: float
    lease_seconds: float = 15.0
    forgotten_seconds: float = 30.0
    restart_seconds: float = 40.0


@dataclass(frozen=True)
class Fleet:
    """What is simulated; a worker claims one job at a time, and a job that runs is never interrupted.

    Attributes:
        num_workers: one device each.
        models: each worker may serve all; at the start each holds the first ones that fit.
        max_models: in memory together; None: as many as fit.
        budget_bytes: of each device; None: no bound.
        max_wait_seconds: as the worker's setting.
        poll_seconds: likewise: a worker plans at most so often.
        failures: None: nobody dies.
    """

    num_workers: int
    models: Sequence[FleetModel]
    max_models: int | None = 1
    budget_bytes: int | None = None
    max_wait_seconds: float = 300.0
    poll_seconds: float = 0.5
    failures: Failures | None = None

    @property
    def room(self) -> Room:
        """What fits into a device."""
        sizes = {one.id: ModelMemory(one.id, one.weights_bytes, one.activation_bytes) for one in self.models}
        return Room(sizes, self.budget_bytes, self.max_models)

    def preloaded(self) -> list[str]:
        """List what a worker holds at the start."""
        room, held = self.room, list[str]()
        for model in self.models:
            if room.holds([*held, model.id]):
                held.append(model.id)
        return held
