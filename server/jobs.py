"""What a batch and a job are: plain records and the moves between their states, without Redis or HTTP."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal


class JobStatus(StrEnum):
    """Where a job stands. `queued` includes the wait before another try."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class BatchStatus(StrEnum):
    """Where a batch stands; `finished` once none of its jobs is queued or running."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


class Priority(StrEnum):
    """Who goes first; within a priority the owners take turns."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


# REOPEN (a user's retry) is the only way out of a final state; `succeeded` has none.
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
}

FINAL_STATUSES = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass(frozen=True)
class JobInput:
    """One uploaded photo as it was when the job was accepted; height and width in pixels, orientation applied."""

    upload_id: str
    key: str
    etag: str
    sha256: str | None
    content_type: str
    size_bytes: int
    height: int
    width: int


@dataclass(frozen=True)
class OutputSpec:
    """How the result is to be written."""

    format: str = "webp"
    quality: int = 80
    size: str = "model"
    metadata: bool = True


@dataclass(frozen=True)
class JobOutput:
    """The stored result; `key` lies in the outputs bucket."""

    key: str
    sha256: str
    content_type: str
    height: int
    width: int
    size_bytes: int


@dataclass(frozen=True)
class JobError:
    """Why a job failed, or what went wrong on its last try while it waits for another."""

    code: str
    detail: str


@dataclass(frozen=True)
class Job:
    """One photo to be staged. Times are milliseconds since 1970 UTC by the ledger's clock.

    `weights_sha256` tells the weights that workers had when the job was accepted, then those that it ran on.
    `optimizations` tells how its model was run otherwise than its pipeline does by itself; empty until it has run.
    """

    id: str
    batch_id: str
    index: int
    owner: str
    model: str
    model_version: str
    prompt: str
    inputs: tuple[JobInput, ...]
    name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    negative_prompt: str | None = None
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    loras: tuple[dict[str, Any], ...] = ()
    output_spec: OutputSpec = OutputSpec()
    weights_sha256: str | None = None
    optimizations: dict[str, Any] = field(default_factory=dict[str, Any])
    priority: Priority = Priority.NORMAL
    status: JobStatus = JobStatus.QUEUED
    attempts: int = 0
    fence: int = 0
    suspect: bool = False
    worker: str | None = None
    step: int | None = None
    total_steps: int | None = None
    queue_position: int | None = None
    error: JobError | None = None
    output: JobOutput | None = None
    created_at_ms: int = 0
    queued_at_ms: int = 0
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    timings: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def queue_seconds(self) -> float | None:
        """Seconds from (re)entering the queue to the start of the last attempt; None before the first."""
        if self.started_at_ms is None or self.started_at_ms < self.queued_at_ms:
            return None
        return (self.started_at_ms - self.queued_at_ms) / 1000


@dataclass(frozen=True)
class Delivery:
    """One attempt to tell a webhook that a round of its batch has finished."""

    round: int
    attempt: int
    at_ms: int
    outcome: Literal["delivered", "retrying", "gave_up"]
    http_status: int | None
    detail: str | None


@dataclass(frozen=True)
class Webhook:
    """Whom to tell when a batch has finished, and how that went; the latest attempts only."""

    url: str
    deliveries: tuple[Delivery, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Up to 50 jobs that were submitted together. `jobs` are in the order of the request's items."""

    id: str
    owner: str
    priority: Priority = Priority.NORMAL
    label: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    status: BatchStatus = BatchStatus.QUEUED
    round: int = 1
    counts: dict[str, int] = field(default_factory=dict[str, int])
    created_at_ms: int = 0
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    expires_at_ms: int | None = None
    eta_seconds: float | None = None
    webhook: Webhook | None = None
    key_id: str | None = None
    jobs: tuple[Job, ...] = ()

    def estimated(self, eta_seconds: float | None) -> "Batch":
        """Return the batch with the time it will probably still take."""
        return replace(self, eta_seconds=eta_seconds)


@dataclass(frozen=True)
class DueWebhook:
    """A delivery that is due: attempt number `attempt`, from 1, for a round of `batch` that ended at `due_since_ms`."""

    batch: Batch
    round: int
    attempt: int
    due_since_ms: int
