"""Work that every API process does again and again, through outages and mistakes."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog

from server.errors import DependencyError

_log = structlog.stdlib.get_logger()
_CANCEL_AGAIN_SECONDS = 0.5


class Periodic:
    """Does a piece of work, waits, and does it again, until it is cancelled.

    What goes wrong is logged once, until it goes well again: the next time comes anyway.

    Args:
        name: of the work, a noun such as `sweep`; log events begin with it.
        work: is awaited each time; `asyncio.CancelledError` passes through it.
        interval_seconds: the pause between the end of the work and its next begin.
        failure_seconds: the pause after a failure, where that is to be another.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        *,
        interval_seconds: float,
        failure_seconds: float | None = None,
    ) -> None:
        self._name = name
        self._work = work
        self._interval_seconds = interval_seconds
        self._failure_seconds = interval_seconds if failure_seconds is None else failure_seconds
        self._is_failing = False

    async def run(self) -> None:
        """Work, for ever."""
        while True:
            # Gathered, so that a mistake of ours comes back as a value and ends nothing.
            [outcome] = await asyncio.gather(self._work(), return_exceptions=True)
            self._tell(outcome)
            await asyncio.sleep(self._failure_seconds if outcome else self._interval_seconds)

    def _tell(self, outcome: BaseException | None) -> None:
        if outcome is None:
            if self._is_failing:
                _log.info(f"{self._name}.recovered")
        elif not self._is_failing:
            trace = None if isinstance(outcome, DependencyError) else outcome
            _log.error(f"{self._name}.failed", error=str(outcome), exc_info=trace)
        self._is_failing = outcome is not None


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until all have ended.

    One cancellation is not enough for a loop around Redis: redis-py sends within `asyncio.wait_for`, and that of Python
    3.11 loses a cancellation which comes when the sending is done. The loop then goes on (measured: 15 of 300).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
