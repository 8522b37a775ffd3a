"""The jobs that this worker has in its hand, and the few flags through which its threads talk about them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipelines.errors import Cancelled
from server.jobs import Job, JobInput
from server.ledger.worker_side import HeldJob, Reply
from server.worker.errors import LeaseLost


@dataclass(eq=False)
class JobInHand:
    """A claimed job on its way through the worker. One thread works on it at a time; any thread may set a flag.

    Attributes:
        job: as it was claimed.
        order: number of the claim, counted in this process.
        photos: decoded, orientation applied; empty until the job is staged and again once it has run.
        params: final values, known once the photos are.
        inputs: as they really are: true height, width and sha256.
        weights_sha256: of the weights that it runs on, where that is known.
        optimizations: how its model is run otherwise than its pipeline does by itself.
        timings: seconds, by phase.
        device_seconds: time on the device so far.
        step: number of steps done; None until the run has begun.
        cancelled: somebody asked for its end.
        lost: the lease is not ours any more.
        abandoned: the process ends without it.
        has_left_device: its run has ended, well or not; what is left is to store and to tell.
    """

    job: Job
    order: int = 0
    photos: list[Image.Image] = field(default_factory=list[Image.Image])
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: tuple[JobInput, ...] = ()
    weights_sha256: str | None = None
    optimizations: dict[str, Any] = field(default_factory=dict[str, Any])
    timings: dict[str, float] = field(default_factory=dict[str, float])
    device_seconds: float = 0.0
    step: int | None = None
    total_steps: int | None = None
    cancelled: bool = False
    lost: bool = False
    abandoned: bool = False
    has_left_device: bool = False

    def check(self) -> None:
        """Return if the work on the job is still wanted.

        Raises:
            LeaseLost: the job is not ours any more.
            Cancelled: somebody asked for its end.
        """
        self.check_lease()
        if self.cancelled:
            raise Cancelled("The job was cancelled.")

    def check_lease(self) -> None:
        """Return if the job is ours to settle.

        Raises:
            LeaseLost: it is not.
        """
        if self.lost:
            raise LeaseLost(f"job {self.job.id} has gone to another")
        self.check_process()

    def check_process(self) -> None:
        """Return if there is time to wait for an answer.

        Raises:
            LeaseLost: the process ends, and the job is given back.
        """
        if self.abandoned:
            raise LeaseLost(f"job {self.job.id} was given back")

    @property
    def is_flagged(self) -> bool:
        """Whether `check` would raise."""
        return self.lost or self.abandoned or self.cancelled

    def note(self, reply: Reply) -> None:
        """Keep what the ledger said of the job."""
        self.cancelled = self.cancelled or reply == "cancelled"
        self.lost = self.lost or reply == "lost"


class Hand:
    """All jobs in hand. Safe to use from any thread.

    A job may be in it twice for a moment: lost, and claimed again before its first run has stopped.

    Args:
        on_release: called after each job that leaves.
    """

    def __init__(self, on_release: Callable[[], None]) -> None:
        self._jobs: list[JobInHand] = []
        self._changed = threading.Condition()
        self._num_taken = 0
        self._on_release = on_release

    def __len__(self) -> int:
        return len(self._jobs)

    def take(self, job: Job) -> JobInHand:
        """Add a job that was just claimed."""
        with self._changed:
            self._num_taken += 1
            in_hand = JobInHand(job, order=self._num_taken)
            self._jobs.append(in_hand)
        return in_hand

    def release(self, in_hand: JobInHand) -> None:
        """Remove a job whose end the ledger knows, or that is not ours."""
        with self._changed:
            self._jobs.remove(in_hand)
            self._changed.notify_all()
        self._on_release()

    def jobs(self) -> list[JobInHand]:
        """Return all jobs, in the order of their claims."""
        with self._changed:
            return list(self._jobs)

    def find(self, job_id: str) -> list[JobInHand]:
        """Return the jobs with this id."""
        return [one for one in self.jobs() if one.job.id == job_id]

    def holds_suspect(self) -> bool:
        """Whether a job is in hand that must run alone."""
        return any(one.job.suspect for one in self.jobs())

    def to_run(self) -> list[JobInHand]:
        """Return the jobs that have not left the device yet, in the order of their claims."""
        return [one for one in self.jobs() if not one.has_left_device]

    def models(self) -> set[str]:
        """Return the models that the jobs in hand still need."""
        return {one.job.model for one in self.to_run()}

    def wait_empty(self, timeout_seconds: float) -> bool:
        """Wait until no job is left; returns whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_seconds)


def as_held(in_hand: JobInHand) -> HeldJob:
    """Return a job as RENEW needs it."""
    return HeldJob(in_hand.job.id, in_hand.job.fence, in_hand.step, in_hand.total_steps)
