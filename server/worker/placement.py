"""Which model this worker should hold next: a pure function, so that it can be tested and simulated."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.ledger.worker_side import Backlog


@dataclass(frozen=True)
class Swap:
    """Load a model, after another has been put out to make room."""

    load: str
    evict: str | None = None


def choose_swap(
    backlog: Mapping[str, Backlog],
    resident: Mapping[str, float],
    *,
    capacity: int,
    max_wait_seconds: float,
) -> Swap | None:
    """Decide whether another model should be loaded.

    A model that has nothing to do goes for any that has. Between models that all have work, time is shared: one that
    has waited for `max_wait_seconds` takes the place of one that has had its turn of as long.

    Args:
        backlog: what waits, for each model that this worker can serve.
        resident: the models in memory, and for how many seconds each has been there.
        capacity: number of models that fit into memory.
        max_wait_seconds: how long a job may wait while the worker is busy with other models.

    Returns:
        The swap, or None when all is well.
    """
    waiting = {model: of for model, of in backlog.items() if of.num_ready > 0 and model not in resident}
    if not waiting:
        return None
    load = max(waiting, key=lambda model: waiting[model].oldest_age_seconds)
    if len(resident) < capacity:
        return Swap(load)

    idle = [model for model in resident if model not in backlog or backlog[model].num_ready == 0]
    if idle:
        return Swap(load, evict=max(idle, key=lambda model: resident[model]))
    had_their_turn = [model for model, seconds in resident.items() if seconds >= max_wait_seconds]
    if had_their_turn and waiting[load].oldest_age_seconds >= max_wait_seconds:
        return Swap(load, evict=max(had_their_turn, key=lambda model: resident[model]))
    return None
