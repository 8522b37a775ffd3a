"""Tells the event streams of this process which batches have changed: one reader, however many clients."""

import asyncio
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager

from server.ledger.api_side import ApiLedger
from server.periodic import Periodic

_PAUSE_SECONDS = 0.5


class Changes:
    """Reads the ledger's stream of changes and wakes those who wait for a batch.

    A wake-up says only "look": what has happened is read from the batch itself, so one too many does no harm, and one
    that is lost in an outage is made up for by waking everybody once Redis is back.

    Args:
        ledger: is read.
        block_seconds: how long one read may wait; less than the client's timeout.
    """

    def __init__(self, ledger: ApiLedger, *, block_seconds: float) -> None:
        self._ledger = ledger
        self._block_seconds = block_seconds
        self._position: str | None = None
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def subscribed(self, batch_id: str) -> Generator[asyncio.Event]:
        """Give an event that is set after each change of the batch; whoever waits for it clears it."""
        changed = asyncio.Event()
        self._waiting[batch_id].add(changed)
        try:
            yield changed
        finally:
            self._waiting[batch_id].discard(changed)
            if not self._waiting[batch_id]:
                del self._waiting[batch_id]

    def wake_everybody(self) -> None:
        """Wake all that wait for any batch."""
        self._wake(set(self._waiting))

    async def run(self) -> None:
        """Read, for ever."""
        await Periodic("changes", self._read, interval_seconds=0, failure_seconds=_PAUSE_SECONDS).run()

    async def _read(self) -> None:
        """Wait for changes once; after a failure the next call begins anew."""
        position, self._position = self._position, None
        if position is None:
            position = await self._ledger.changes_position()
            self.wake_everybody()
        self._position, batch_ids = await self._ledger.wait_for_changes(position, block_seconds=self._block_seconds)
        self._wake(batch_ids)

    def _wake(self, batch_ids: set[str]) -> None:
        for batch_id in batch_ids & self._waiting.keys():
            for changed in self._waiting[batch_id]:
                changed.set()
