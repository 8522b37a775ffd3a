"""Keeps the ledger swept: every API process does it all the time, through outages and mistakes."""

import asyncio
from dataclasses import asdict

import structlog

from server.errors import DependencyError
from server.ledger.api_side import ApiLedger, SweepReport
from server.settings import Settings

_log = structlog.stdlib.get_logger()


class Sweeper:
    """Sweeps every `sweep.interval_seconds` until it is cancelled.

    What goes wrong is logged once, until it goes well again: the next sweep comes anyway, since without one the jobs of
    dead workers would wait for ever.
    """

    def __init__(self, ledger: ApiLedger, settings: Settings, models: list[str]) -> None:
        self._ledger = ledger
        self._lease_seconds = settings.worker.lease_seconds
        self._interval_seconds = settings.sweep.interval_seconds
        self._models = models
        self._is_failing = False

    async def run(self) -> None:
        """Sweep, for ever."""
        while True:
            # Gathered, so that a mistake of ours comes back as a value and does not end the sweeping.
            [outcome] = await asyncio.gather(
                self._ledger.sweep(
                    self._models, lease_seconds=self._lease_seconds, interval_seconds=self._interval_seconds
                ),
                return_exceptions=True,
            )
            self._tell(outcome)
            await asyncio.sleep(self._interval_seconds)

    def _tell(self, outcome: SweepReport | BaseException) -> None:
        if isinstance(outcome, BaseException):
            if not self._is_failing:
                trace = None if isinstance(outcome, DependencyError) else outcome
                _log.error("sweep.failed", error=str(outcome), exc_info=trace)
            self._is_failing = True
            return
        if self._is_failing:
            self._is_failing = False
            _log.info("sweep.recovered")
        counts = {name: count for name, count in asdict(outcome).items() if count and name != "waiting"}
        if counts:
            _log.info("sweep.finished", **counts)
