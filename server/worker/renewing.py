"""Keeps the leases of the jobs in hand alive, and tells how far they are."""

import threading
import time

from server.errors import LedgerUnavailable
from server.ledger.worker_side import WorkerLedger
from server.worker.hand import Hand, JobInHand, as_held
from server.worker.patience import Outage

# Progress is for people: more often than this is a waste of writes.
PROGRESS_SECONDS = 0.25


class Renewer:
    """Renews at each third of a lease, or after the next step, whichever comes first."""

    def __init__(self, ledger: WorkerLedger, outage: Outage, hand: Hand, *, lease_seconds: float) -> None:
        self._ledger = ledger
        self._outage = outage
        self._hand = hand
        self._interval_seconds = lease_seconds / 3
        self._stopping = threading.Event()
        self._renewed_at = 0.0
        self._published: dict[JobInHand, int | None] = {}

    def stop(self) -> None:
        """Let the thread end."""
        self._stopping.set()

    def run(self) -> None:
        """Renew until `stop`."""
        while not self._stopping.wait(min(PROGRESS_SECONDS, self._interval_seconds)):
            jobs = [one for one in self._hand.jobs() if not one.lost]
            if jobs and self._is_due(jobs):
                try:
                    self._renew(jobs)
                except LedgerUnavailable as error:
                    # Tried again at once: a lease that has run out is revived if nobody took the job.
                    self._outage.note(error)

    def _is_due(self, jobs: list[JobInHand]) -> bool:
        is_old = time.monotonic() - self._renewed_at >= self._interval_seconds
        return is_old or any(one.step != self._published.get(one) for one in jobs)

    def _renew(self, jobs: list[JobInHand]) -> None:
        held = [as_held(one) for one in jobs]
        started = time.monotonic()
        replies = self._ledger.renew(held)
        self._outage.over()
        self._renewed_at = started
        self._published = {one: sent.step for one, sent in zip(jobs, held, strict=True)}
        for one, reply in zip(jobs, replies, strict=True):
            one.note(reply)
