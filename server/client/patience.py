"""How long the client goes on trying what failed, and how long it pauses between two tries."""

import asyncio
import os
import time

PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.25, 5.0


class Patience:
    """The tries of one call or transfer. Time counts from the first failure: a long transfer is no reason to give up.

    Args:
        seconds: between the first failure and the last try.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._give_up_at: float | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def next_pause_seconds(self, at_least_seconds: float = 0.0) -> float | None:
        """How long to wait before another try; None where patience does not last so long."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._seconds
        # Many clients that lost the same server must not all come back at once.
        pause_seconds = max(at_least_seconds, self._pause_seconds * (0.75 + int.from_bytes(os.urandom(1)) / 512))
        self._pause_seconds = min(_LAST_PAUSE_SECONDS, self._pause_seconds * 2)
        return pause_seconds if now + pause_seconds <= self._give_up_at else None

    async def pause(self) -> bool:
        """Wait before another try; False at once where there is to be none."""
        seconds = self.next_pause_seconds()
        if seconds is None:
            return False
        await asyncio.sleep(seconds)
        return True
