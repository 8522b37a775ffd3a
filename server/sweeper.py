"""Keeps the ledger swept: every API process does it all the time, since else the jobs of dead workers would wait."""

import logging
from dataclasses import asdict

import structlog

from server.ledger.api_side import ApiLedger
from server.periodic import Periodic
from server.settings import Settings

_log = structlog.stdlib.get_logger()


class Sweeper:
    """Sweeps every `sweep.interval_seconds` until it is cancelled."""

    def __init__(self, ledger: ApiLedger, settings: Settings, models: list[str]) -> None:
        self._ledger = ledger
        self._lease_seconds = settings.worker.lease_seconds
        self._interval_seconds = settings.sweep.interval_seconds
        self._models = models

    async def run(self) -> None:
        """Sweep, for ever."""
        await Periodic("sweep", self._sweep, interval_seconds=self._interval_seconds).run()

    async def _sweep(self) -> None:
        report = await self._ledger.sweep(
            self._models, lease_seconds=self._lease_seconds, interval_seconds=self._interval_seconds
        )
        counts = {name: count for name, count in asdict(report).items() if count and name != "waiting"}
        if counts:
            # Where jobs wait for a busy worker, each sweep rings: nothing to read in a log.
            level = logging.DEBUG if counts.keys() == {"rung"} else logging.INFO
            _log.log(level, "sweep.finished", **counts)
