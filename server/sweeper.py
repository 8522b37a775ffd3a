"""Keeps the ledger swept: every API process does it all the time, since else the jobs of dead workers would wait."""

import logging
import time
from dataclasses import asdict

import structlog

from server.ledger.api_side import ApiLedger
from server.periodic import Periodic
from server.settings import Settings

# Sweeps for each look for jobs whose model was taken away.
_REMOVED_EVERY = 5

_log = structlog.stdlib.get_logger()


class Sweeper:
    """Sweeps every `sweep.interval_seconds` until it is cancelled."""

    def __init__(self, ledger: ApiLedger, settings: Settings, models: list[str]) -> None:
        self._ledger = ledger
        self._lease_seconds = settings.worker.lease_seconds
        self._interval_seconds = settings.sweep.interval_seconds
        self._grace_seconds = settings.models.removed_grace_seconds
        self._models = models
        self._look_at = 0.0

    async def run(self) -> None:
        """Sweep, for ever."""
        await Periodic("sweep", self._sweep, interval_seconds=self._interval_seconds).run()

    async def _sweep(self) -> None:
        await self._sweep_once()
        # Far less is ever due here, and it looks at every worker.
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _REMOVED_EVERY * self._interval_seconds
            await self._fail_removed()

    async def _fail_removed(self) -> None:
        num_failed = await self._ledger.fail_removed(self._models, grace_seconds=self._grace_seconds)
        if num_failed:
            _log.warning("jobs.failed", code="model_removed", count=num_failed)

    async def _sweep_once(self) -> None:
        report = await self._ledger.sweep(
            self._models, lease_seconds=self._lease_seconds, interval_seconds=self._interval_seconds
        )
        counts = {name: count for name, count in asdict(report).items() if count and name != "waiting"}
        if counts:
            # Where jobs wait for a busy worker, each sweep rings: nothing to read in a log.
            level = logging.DEBUG if counts.keys() == {"rung"} else logging.INFO
            _log.log(level, "sweep.finished", **counts)
