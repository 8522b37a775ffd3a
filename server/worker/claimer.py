"""Keeps the hand full: claims jobs of the resident models, and has it planned which these should be."""

import threading
from collections.abc import Callable, Collection
from typing import Literal

from server.errors import LedgerUnavailable
from server.jobs import Job
from server.ledger.worker_side import Alone, WorkerLedger
from server.settings import WorkerSettings
from server.worker.hand import Hand
from server.worker.patience import LONGEST_DELAY_SECONDS, Outage
from server.worker.planner import Planner
from server.worker.residency import Residency

Place = Literal["for_any", "for_high"]


class Claimer:
    """Claims while there is room in the hand: when told of ready jobs, when one leaves the device, and now and then.

    Jobs that have left the device and are only stored take no room, as long as the stage threads keep up with them.

    Args:
        ledger: hands out the jobs.
        outage: of the ledger.
        hand: where the jobs go.
        residency: says which models' jobs may be claimed.
        settings: of the worker.
        awake: set by whoever knows of something to do.
        take: starts the work on a job.
        planner: says which models leave memory, and is asked again and again.
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
        planner: Planner,
    ) -> None:
        self._ledger = ledger
        self._outage = outage
        self._hand = hand
        self._residency = residency
        self._settings = settings
        self._awake = awake
        self._take = take
        self._planner = planner
        self._stopping = threading.Event()
        self._must_be_alone = False
        self._is_ledger_ours = False

    def stop(self) -> None:
        """Claim no more; a claim under way may still bring a job."""
        self._stopping.set()
        self._awake.set()

    def note_ready(self, models: Collection[str], has_high: bool) -> None:
        """Hear that jobs of these models have become ready; a full hand has a place for `high` ones only."""
        has_place = has_high or len(self._hand.to_run()) < self._settings.max_held_jobs
        if has_place and (set(models) & set(self._models_to_claim()) or self._planner.may_want(models)):
            self._awake.set()

    def run(self) -> None:
        """Claim until `stop`.

        Raises:
            ConfigError: the ledger is another version's.
        """
        pause_seconds = self._settings.poll_seconds
        while not self._stopping.is_set():
            try:
                self._check_ledger()
                self._fill_hand()
                self._planner.plan()
            except LedgerUnavailable as error:
                self._outage.note(error)
                pause_seconds = min(2 * pause_seconds, LONGEST_DELAY_SECONDS)
            else:
                pause_seconds = self._settings.poll_seconds
            self._awake.wait(pause_seconds)
            self._awake.clear()

    def _check_ledger(self) -> None:
        if not self._is_ledger_ours:
            self._is_ledger_ours = self._ledger.check_schema()

    def _fill_hand(self) -> None:
        while (place := self._free_place()) is not None:
            answer = self._ledger.claim(
                self._models_to_claim(), num_held=len(self._hand), high_only=place == "for_high"
            )
            self._outage.over()
            # The next job is suspected of killing workers: it is claimed with an empty hand, and has it to itself.
            self._must_be_alone = isinstance(answer, Alone)
            if not isinstance(answer, Job):
                return
            self._take(answer)

    def _free_place(self) -> Place | None:
        if self._stopping.is_set() or not self._models_to_claim():
            return None
        if self._must_be_alone or self._hand.holds_suspect():
            return "for_any" if len(self._hand) == 0 else None
        num_to_run = len(self._hand.to_run())
        num_to_store = len(self._hand) - num_to_run
        if num_to_run < self._settings.max_held_jobs and num_to_store < self._settings.stage_threads:
            return "for_any"
        # A full hand has one place more, so that a `high` job need not wait for the end of a run.
        if num_to_run <= self._settings.max_held_jobs and num_to_store <= self._settings.stage_threads:
            return "for_high"
        return None

    def _models_to_claim(self) -> list[str]:
        if not self._residency.has_started or self._residency.is_preloading:
            return []  # the lane loads: other workers may be free
        decided = self._planner.decided
        return [model for model in self._residency.resident if decided is None or model not in decided.evict]
