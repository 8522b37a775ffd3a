"""What all three comparisons work with: both sides, what may be changed, and how an object is thrown away."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

from server.ledger.reconciling import LedgerReconciler, StrayKind
from server.reconcile.findings import Finding, Kind, Outcome, Tally
from server.store import Store
from server.store_inventory import StoredObject

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class Comparison:
    """One run of `restage reconcile`.

    Attributes:
        ledger: the one side.
        store: the other.
        threads: bounds the calls of the store.
        tally: counts.
        is_dry: nothing is changed.
        reads_bytes: results are read and compared byte by byte.
        grace: how old an object must be before it counts as one that nobody names.
        trash_seconds: how long such an object stays in the trash.
        why_kept: why nothing is thrown away; None: what nobody names is.
    """

    ledger: LedgerReconciler
    store: Store
    threads: anyio.CapacityLimiter
    tally: Tally
    is_dry: bool
    reads_bytes: bool
    grace: timedelta
    trash_seconds: float
    why_kept: str | None

    async def ask(self, call: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Make a call of the store in a thread."""
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self.threads)

    @property
    def repair(self) -> Outcome:
        """What becomes of a finding that can be repaired."""
        return "would_repair" if self.is_dry else "repaired"

    async def judge_stray(
        self, kind: Kind, stray: StoredObject, what: StrayKind, *, named_id: str, fence: str = ""
    ) -> Finding | None:
        """Throw an object away that no record names; None where it is too young, or named or gone by now.

        Args:
            kind: of the finding.
            stray: the object.
            what: it is.
            named_id: of the upload or job whose name it bears.
            fence: of the try that wrote it.
        """
        if datetime.now(UTC) - stray.changed_at < self.grace:
            self.tally.num_young += 1
            return None
        is_upload = what == "upload"
        look = self.store.inventory.has_upload if is_upload else self.store.inventory.has_output
        if not await self.ask(look, stray.key):
            return None
        job_id = None if is_upload else named_id
        if self.why_kept:
            return Finding(kind, "left", self.why_kept, key=stray.key, job_id=job_id)
        if not self.is_dry:
            name = f"{'uploads' if is_upload else 'outputs'}/{stray.key}"
            going = await self.ledger.discard_stray(what, name, named_id, fence, delay_seconds=self.trash_seconds)
            if not going:
                return None
        detail = f"{stray.size_bytes} bytes of {stray.changed_at:%Y-%m-%d %H:%M} UTC, to the trash"
        return Finding(kind, self.repair, detail, key=stray.key, job_id=job_id)
