"""Hears what the API tells all workers: a job is ready, or has been cancelled and stops before its next step."""

import threading
from collections.abc import Callable, Collection

import structlog

from server.errors import LedgerUnavailable
from server.ledger.worker_side import WorkerLedger
from server.worker.hand import Hand
from server.worker.patience import LONGEST_DELAY_SECONDS, Outage

log = structlog.stdlib.get_logger()


class ControlReader:
    """Reads the control stream. What is missed comes later: a cancel with the next renewal, ready jobs with a bell.

    Args:
        ledger: with a client of its own, since the calls block.
        outage: of the ledger.
        hand: the jobs that may be concerned.
        on_ready: called when jobs have become ready, with their models, and whether one is `high`; returns at once.
        block_seconds: how long one call may wait; less than the client's timeout.
    """

    def __init__(
        self,
        ledger: WorkerLedger,
        outage: Outage,
        hand: Hand,
        *,
        on_ready: Callable[[Collection[str], bool], None],
        block_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._outage = outage
        self._hand = hand
        self._on_ready = on_ready
        self._block_seconds = block_seconds
        self._stopping = threading.Event()
        self._position: str | None = None

    def stop(self) -> None:
        """Let the thread end after the call that it is in."""
        self._stopping.set()

    def run(self) -> None:
        """Read until `stop`."""
        while not self._stopping.is_set():
            try:
                self._read()
            except LedgerUnavailable as error:
                self._outage.note(error)
                self._stopping.wait(LONGEST_DELAY_SECONDS)

    def _read(self) -> None:
        if self._position is None:
            self._position = self._ledger.control_position()
        self._position, messages = self._ledger.read_control(self._position, block_seconds=self._block_seconds)
        for message in messages:
            if message.get("type") == "cancel":
                for in_hand in self._hand.find(message["job_id"]):
                    in_hand.cancelled = True
            elif message.get("type") == "ready":
                self._on_ready(message.get("models", "").split(","), message.get("high") == "1")
