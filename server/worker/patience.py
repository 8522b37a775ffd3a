"""Waits while Redis or the store is away: an outage costs time, never a job."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from server.errors import DependencyError

T = TypeVar("T")
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 2.0

log = structlog.stdlib.get_logger()


class Outage:
    """One dependency's outages as the log tells them: a line when one begins, a line when it is over."""

    def __init__(self, dependency: str) -> None:
        self._dependency = dependency
        self._lock = threading.Lock()
        self._since: float | None = None

    def note(self, error: DependencyError) -> None:
        """Say that a call was not served."""
        with self._lock:
            if self._since is not None:
                return
            self._since = time.monotonic()
        log.warning("dependency.lost", dependency=self._dependency, error=error.detail)

    def over(self) -> None:
        """Say that a call was served."""
        # Mostly nothing was lost; this is called after every answer, so it looks before it locks.
        if not self._is_lost():
            return
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            log.info("dependency.back", dependency=self._dependency, away_seconds=round(time.monotonic() - since, 1))

    def _is_lost(self) -> bool:
        return self._since is not None

    def outwait(self, call: Callable[[], T], *, check: Callable[[], None], patience_seconds: float = float("inf")) -> T:
        """Repeat `call` until it is served.

        Args:
            call: raises DependencyError while it is not served.
            check: called before each further try; raises when the result is not wanted any more.
            patience_seconds: after which the error is raised on.

        Returns:
            What `call` returned.
        """
        deadline = time.monotonic() + patience_seconds
        delay_seconds = FIRST_DELAY_SECONDS
        while True:
            try:
                result = call()
            except DependencyError as error:
                self.note(error)
                if time.monotonic() > deadline:
                    raise
            else:
                self.over()
                return result
            check()
            time.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, LONGEST_DELAY_SECONDS)
            check()
