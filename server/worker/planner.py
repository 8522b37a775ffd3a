"""Decides with the other workers which models this one holds: no two of them jump at the same need."""

import time
from collections.abc import Callable, Collection

import structlog

from server.ledger.worker_side import Fleet, WorkerLedger
from server.settings import WorkerSettings
from server.worker.hand import Hand
from server.worker.placement import Demand, Resident, Swap, choose_swap
from server.worker.residency import Residency

# So often is planned anew at once when another worker was quicker; then after the next pause.
MOST_TRIES = 3

log = structlog.stdlib.get_logger()


class Planner:
    """Looks at what waits, chooses a swap, has the ledger agree, and asks the lane for it once no job is against it.

    `plan` is for one thread, the claimer's; the properties may be read by any.

    Args:
        ledger: knows what waits, and who holds what.
        hand: the jobs of models that must not leave yet.
        residency: the models in memory.
        settings: of the worker.
        request_swap: asks the lane for other models in memory.
        request_check: asks the lane to look again at a model that was refused.
        on_change: called when another model is to be announced as coming or leaving.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        hand: Hand,
        residency: Residency,
        *,
        settings: WorkerSettings,
        request_swap: Callable[[Swap], None],
        request_check: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._hand = hand
        self._residency = residency
        self._settings = settings
        self._request_swap = request_swap
        self._request_check = request_check
        self._on_change = on_change
        self._decided: Swap | None = None
        self._is_requested = False
        self._next_look_at = 0.0

    @property
    def decided(self) -> Swap | None:
        """What comes into memory next, and what makes room for it: no more jobs of that are claimed."""
        return self._decided

    def may_want(self, models: Collection[str]) -> bool:
        """Tell whether the next look could have one of these loaded, and may be now."""
        return self._is_due() and any(model in self._residency.usable for model in models)

    def plan(self) -> None:
        """Do what is to be done now; returns at once.

        Raises:
            LedgerUnavailable: Redis does not serve.
        """
        if self._is_requested and self._residency.swapped is self._decided:
            self._settle(None)
        if self._is_due():
            self._look()
        if self._decided and not self._is_requested and not set(self._decided.evict) & self._hand.models():
            self._is_requested = True
            self._request_swap(self._decided)

    def _is_due(self) -> bool:
        if self._is_requested or not self._residency.has_started or time.monotonic() < self._next_look_at:
            return False
        resident = self._residency.resident
        has_choice = any(model not in resident for model in self._residency.usable)
        return has_choice or bool(self._residency.due_for_check())

    def _look(self) -> None:
        self._next_look_at = time.monotonic() + self._settings.poll_seconds
        for _ in range(MOST_TRIES):
            fleet = self._ledger.backlog(self._residency.models)
            self._check_refused(fleet)
            if self._decided:
                self._reconsider(self._decided, fleet)
                return
            swap = self._choose(fleet)
            if swap is None or self._place(fleet, swap):
                return

    def _place(self, fleet: Fleet, swap: Swap) -> bool:
        # Decided before the ledger knows: an announcement that overtakes the answer must not say otherwise.
        self._settle(swap)
        is_placed = False
        try:
            is_placed = self._ledger.place(fleet.version, swap.load, swap.evict)
        finally:
            if not is_placed:
                self._settle(None)
        if is_placed:
            log.info("placement.decided", load=swap.load, evict=list(swap.evict))
        return is_placed

    def _reconsider(self, swap: Swap, fleet: Fleet) -> None:
        """Take a swap back that is not wanted any more: the jobs were done by others, or cancelled meanwhile."""
        if fleet.models[swap.load].num_ready == 0 or swap.load not in self._residency.usable:
            log.info("placement.withdrawn", load=swap.load, evict=list(swap.evict))
            self._settle(None)

    def _settle(self, swap: Swap | None) -> None:
        self._decided, self._is_requested = swap, False
        self._on_change()

    def _choose(self, fleet: Fleet) -> Swap | None:
        resident, needed = self._residency.resident, self._hand.models()
        return choose_swap(
            {model: self._demand(model, fleet, is_resident=model in resident) for model in self._residency.usable},
            {
                model: Resident(one.age_seconds, 0.0 if model in needed else one.idle_seconds)
                for model, one in resident.items()
            },
            self._residency.room,
            max_wait_seconds=self._settings.max_wait_seconds,
        )

    def _demand(self, model: str, fleet: Fleet, *, is_resident: bool) -> Demand:
        waiting = fleet.models[model]
        return Demand(
            num_ready=waiting.num_ready,
            oldest_age_seconds=waiting.oldest_age_seconds,
            num_workers=waiting.num_others + int(is_resident),
            job_seconds=waiting.job_seconds,
            load_seconds=self._residency.load_seconds(model),
            left_seconds=self._residency.left_seconds(model),
        )

    def _check_refused(self, fleet: Fleet) -> None:
        """Have a model looked at again whose time has come: where its jobs wait, or nothing else is to be done."""
        for name in self._residency.due_for_check():
            is_wanted = fleet.models[self._residency.model_of(name)].num_ready > 0
            if is_wanted or len(self._hand) == 0:
                self._request_check(name)
                return
