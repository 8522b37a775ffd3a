"""What leaves the ledger when its time is over, and the names of the objects that must go with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from server.ledger.api_scripts import ApiScripts, ledger_errors

_EXPIRE_LIMIT = 100


@dataclass(frozen=True)
class ExpireReport:
    """How many uploads, and how many batches' photos, results and records, have left the ledger."""

    uploads: int
    inputs: int
    outputs: int
    records: int


class LedgerJanitor(ApiScripts):
    """The calls of the janitor. A name in the trash is `uploads/<key>`, `outputs/<key>`, or `outputs/<prefix>/`."""

    SCRIPTS = ("expire", "take_trash")

    async def expire(self) -> ExpireReport:
        """Take what is due out of the ledger, a bounded number of entries; their objects go to the trash."""
        return ExpireReport(**json.loads(await self._run("expire", _EXPIRE_LIMIT)))

    async def take_trash(self, *, limit: int, lease_seconds: float) -> list[str]:
        """Return names of objects to be deleted; they are given out again after `lease_seconds`."""
        return await self._run("take_trash", limit, int(lease_seconds * 1000))

    async def drop_trash(self, names: Sequence[str]) -> None:
        """Forget names of objects that are gone."""
        if names:
            async with ledger_errors():
                await cast("Any", self._client).zrem(f"{self._prefix}:trash", *names)
