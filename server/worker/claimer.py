"""Keeps the hand full: claims jobs of the resident models, and asks for another model when its jobs have waited."""

import threading
import time
from collections.abc import Callable

from server.errors import LedgerUnavailable
from server.jobs import Job
from server.ledger.worker_side import Alone, WorkerLedger
from server.settings import WorkerSettings
from server.worker.hand import Hand
from server.worker.patience import LONGEST_DELAY_SECONDS, Outage
from server.worker.placement import Swap, choose_swap
from server.worker.residency import Residency


class Claimer:
    """Claims while there is room in the hand: after each bell, each job that leaves, and now and then unasked.

    Args:
        ledger: hands out the jobs.
        outage: of the ledger.
        hand: where the jobs go.
        residency: says which models' jobs may be claimed.
        settings: of the worker.
        awake: set by whoever knows of something to do.
        take: starts the work on a job.
        request_swap: asks the lane for other models in memory.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        outage: Outage,
        hand: Hand,
        residency: Residency,
        *,
        settings: WorkerSettings,
        awake: threading.Event,
        take: Callable[[Job], None],
        request_swap: Callable[[Swap], None],
    ) -> None:
        self._ledger = ledger
        self._outage = outage
        self._hand = hand
        self._residency = residency
        self._settings = settings
        self._awake = awake
        self._take = take
        self._request_swap = request_swap
        self._stopping = threading.Event()
        self._must_be_alone = False
        # A swap is decided here and done by the lane, once no job in hand needs the model that goes.
        self._decided: Swap | None = None
        self._requested = False
        self._next_plan_at = 0.0

    def stop(self) -> None:
        """Claim no more; a claim under way may still bring a job."""
        self._stopping.set()
        self._awake.set()

    def run(self) -> None:
        """Claim until `stop`."""
        pause_seconds = self._settings.poll_seconds
        while not self._stopping.is_set():
            try:
                self._fill_hand()
                self._plan_models()
            except LedgerUnavailable as error:
                self._outage.note(error)
                pause_seconds = min(2 * pause_seconds, LONGEST_DELAY_SECONDS)
            else:
                pause_seconds = self._settings.poll_seconds
            self._awake.wait(pause_seconds)
            self._awake.clear()

    def _fill_hand(self) -> None:
        while self._may_claim():
            answer = self._ledger.claim(self._models_to_claim(), num_held=len(self._hand))
            self._outage.over()
            # The next job is suspected of killing workers: it is claimed with an empty hand, and has it to itself.
            self._must_be_alone = isinstance(answer, Alone)
            if not isinstance(answer, Job):
                return
            self._take(answer)

    def _may_claim(self) -> bool:
        if self._stopping.is_set() or not self._models_to_claim():
            return False
        if self._must_be_alone or self._hand.holds_suspect():
            return len(self._hand) == 0
        return len(self._hand) < self._settings.max_held_jobs

    def _models_to_claim(self) -> list[str]:
        leaving = self._decided.evict if self._decided else None
        return [model for model in self._residency.resident if model != leaving]

    def _plan_models(self) -> None:
        resident, usable = self._residency.resident, self._residency.usable
        if self._decided and self._requested and (self._decided.load in resident or self._decided.load not in usable):
            self._decided, self._requested = None, False
        if self._decided is None and time.monotonic() >= self._next_plan_at and any(m not in resident for m in usable):
            self._next_plan_at = time.monotonic() + self._settings.poll_seconds
            self._decided = choose_swap(
                self._ledger.backlog(usable),
                resident,
                capacity=self._settings.max_resident_models,
                max_wait_seconds=self._settings.max_wait_seconds,
            )
        if self._decided and not self._requested and self._decided.evict not in self._hand.models():
            self._requested = True
            self._request_swap(self._decided)
