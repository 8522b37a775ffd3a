"""Forgets what is too old: every API process takes records out of the ledger and deletes their objects in the store."""

from dataclasses import asdict

import anyio
import anyio.to_thread
import structlog

from server.ledger.api_side import ApiLedger
from server.periodic import Periodic
from server.store import Store

_log = structlog.stdlib.get_logger()
# One step of the work: the others of the process must not wait long for Redis, nor the store for a thread.
_TRASH_LIMIT = 100
_MOST_STEPS = 20
# A process that dies with names in its hand leaves them to the others after this time.
_TRASH_LEASE_SECONDS = 60.0


class Janitor:
    """Expires and deletes, in bounded steps, until it is cancelled.

    The ledger decides, in one script each, what goes; the name of each object is in its trash until the store has
    confirmed that the object is gone. So a crash between the two costs a second deletion, never an object that is left.

    Args:
        ledger: says what is due.
        store: holds the objects.
        threads: bounds the calls of the store.
        interval_seconds: the pause between two looks.
    """

    def __init__(
        self, ledger: ApiLedger, store: Store, *, threads: anyio.CapacityLimiter, interval_seconds: float
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._threads = threads
        self._interval_seconds = interval_seconds
        self._in_hand: list[str] = []

    async def run(self) -> None:
        """Work, for ever."""
        await Periodic("janitor", self.clean, interval_seconds=self._interval_seconds).run()

    async def clean(self) -> None:
        """Do what is due now, or the first part of it where that is much: each kind of work has its turn.

        Raises:
            DependencyError: Redis or the store is away; what was taken is tried again, here or by another process.
        """
        while any((expired := asdict(await self._ledger.expire())).values()):
            _log.info("records.expired", **expired)
        while names := self._in_hand or await self._take():
            # Kept until all is done: else an outage of the store would seem over as long as their lease lasts.
            self._in_hand = names
            gone = await anyio.to_thread.run_sync(self._store.delete, names, limiter=self._threads)
            await self._ledger.drop_trash(gone)
            self._in_hand = []
            _log.info("objects.deleted", deleted=len(gone), left=len(names) - len(gone))

    async def _take(self) -> list[str]:
        return await self._ledger.take_trash(limit=_TRASH_LIMIT, lease_seconds=_TRASH_LEASE_SECONDS)
