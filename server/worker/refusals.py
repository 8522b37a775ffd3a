"""Why models are not served, and when each is looked at again: an operator may have repaired it."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STARTING = "The worker is starting."
LONGEST_RETRY_SECONDS = 3600.0


@dataclass(frozen=True)
class _Failures:
    """How often in a row a model could not be loaded, and when that is tried again."""

    number: int
    due_at: float


class Refusals:
    """The models that cannot be served now. Only the lane changes it; every thread may ask.

    Args:
        names: of all models; none is served before it has been started with.
        retry_seconds: before the first look at one that failed; it doubles with each further failure.
    """

    def __init__(self, names: Iterable[str], *, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        # Both are replaced as a whole, so that other threads always see a finished one.
        self._reasons: Mapping[str, str] = dict.fromkeys(names, STARTING)
        self._failures: Mapping[str, _Failures] = {}

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each model is not ready; those that are ready are not in it."""
        return self._reasons

    def may_load(self, name: str) -> bool:
        """Tell whether nothing is known against a model."""
        return self._reasons.get(name, STARTING) == STARTING

    def due(self) -> list[str]:
        """Return the models that should be looked at again."""
        now = time.monotonic()
        return [name for name, one in self._failures.items() if not self.may_load(name) and now >= one.due_at]

    def add(self, name: str, reason: str) -> float:
        """Serve a model no longer, or not yet; returns in how many seconds it is due for another look."""
        number = self._failures[name].number + 1 if name in self._failures else 1
        # Bounded, since a power of thousands is no number any more.
        seconds = min(self._retry_seconds * 2 ** min(number - 1, 32), LONGEST_RETRY_SECONDS)
        self._failures = {**self._failures, name: _Failures(number, time.monotonic() + seconds)}
        self._reasons = {**self._reasons, name: reason}
        return seconds

    def lift(self, name: str) -> None:
        """Let a model be loaded again; should that fail, the next wait is longer all the same."""
        self._reasons = {one: reason for one, reason in self._reasons.items() if one != name}

    def forget(self, name: str) -> None:
        """Take a model for whole: it has been loaded."""
        self._failures = {one: failures for one, failures in self._failures.items() if one != name}

    def end_start(self) -> None:
        """Serve the models against which nothing is known."""
        self._reasons = {name: reason for name, reason in self._reasons.items() if reason != STARTING}
