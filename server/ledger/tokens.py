"""Buckets of tokens, by which all API processes together hold a key to what it may use."""

from server.ledger.api_scripts import ApiScripts


class LedgerTokens(ApiScripts):
    """The calls that take from buckets."""

    SCRIPTS = ("take_tokens",)

    async def take_tokens(self, bucket: str, amount: int, *, capacity: int, fills_in_seconds: float) -> float:
        """Take from a bucket that fills by itself, by Redis' clock; it is full at first.

        A call that is repeated after a lost reply takes twice: the bucket is then the emptier, and fills again.

        Args:
            bucket: its name; it comes to be with the first call, and is forgotten once it is full.
            amount: at most `capacity`; all of it is taken, or nothing.
            capacity: the most that it holds.
            fills_in_seconds: how long an empty one takes to be full.

        Returns:
            0 where it was taken, else in how many seconds there will be enough.
        """
        wait_ms = await self._run("take_tokens", bucket, capacity, capacity / fills_in_seconds, amount)
        return wait_ms / 1000
