"""Tells the API what this worker serves and holds, and why not the rest."""

import threading
from collections.abc import Callable

from server.errors import LedgerUnavailable
from server.ledger.status import WorkerStatus
from server.ledger.worker_side import WorkerLedger
from server.worker.patience import Outage


class Announcer:
    """Announces every few seconds, and at once after a change."""

    def __init__(
        self, ledger: WorkerLedger, outage: Outage, *, status: Callable[[], WorkerStatus], interval_seconds: float
    ) -> None:
        self._ledger = ledger
        self._outage = outage
        self._status = status
        self._interval_seconds = interval_seconds
        self._changed = threading.Event()
        self._stopping = False

    def wake(self) -> None:
        """Announce now."""
        self._changed.set()

    def stop(self) -> None:
        """Let the thread end."""
        self._stopping = True
        self._changed.set()

    def run(self) -> None:
        """Announce until `stop`."""
        while not self._stopping:
            self.announce()
            self._changed.wait(self._interval_seconds)
            self._changed.clear()

    def announce(self) -> None:
        """Announce once; while Redis is away nobody could read it."""
        try:
            self._ledger.announce(self._status())
        except LedgerUnavailable as error:
            self._outage.note(error)
