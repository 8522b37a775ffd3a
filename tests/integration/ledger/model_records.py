"""What the model of the ledger remembers: jobs, batches, uploads; times are seconds on the model's own clock."""

from dataclasses import dataclass, field
from typing import Any

from tests.integration.ledger.kit import FORM_USABLE_SECONDS


@dataclass
class ModelJob:
    """What the ledger must know of a job."""

    id: str
    batch: "ModelBatch"
    index: int
    model: str
    upload_ids: list[str]
    age: tuple[int, int] = (0, 0)
    status: str = "queued"
    attempts: int = 0
    fence: int = 0
    errors: int = 0
    deaths: int = 0
    device_deaths: int = 0
    suspect: bool = False
    on_device: bool = False
    cancel: bool = False
    worker: str | None = None
    step: int | None = None
    error: tuple[str, str] | None = None
    output: str | None = None
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    has_timings: bool = False
    due_at: float | None = None
    lease_until: float | None = None
    changed: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether a worker may have it now."""
        return self.status == "queued" and self.due_at is None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be done."""
        return self.status in {"queued", "running"}

    @property
    def try_name(self) -> str:
        """Where all that its latest try has written lies."""
        return f"outputs/{self.id}/{self.fence}/"

    @property
    def marker_name(self) -> str:
        """Where the store marks it as done."""
        return f"outputs/{self.id}/done.json"


@dataclass
class ModelBatch:
    """What the ledger must know of a batch.

    `told` are the events that its followers must have seen, `webhooks` the rounds that are to be delivered, with the
    time when that is due, and `attempts` how often each was tried.
    """

    id: str
    owner: str
    priority: str
    label: str | None = None
    hook: bool = False
    jobs: list[ModelJob] = field(default_factory=list[ModelJob])
    order: int = 0
    status: str = "queued"
    round: int = 1
    is_started: bool = False
    inputs_released: bool = False
    inputs_due: float | None = None
    outputs_due: float | None = None
    forget_at: float | None = None
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    webhooks: dict[int, float] = field(default_factory=dict[int, float])
    finished_rounds: list[int] = field(default_factory=list[int])
    attempts: dict[int, int] = field(default_factory=dict[int, int])
    deliveries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def count(self, status: str) -> int:
        """Count its jobs in a status."""
        return sum(job.status == status for job in self.jobs)

    @property
    def shelves(self) -> list[str]:
        """Where it must stand."""
        statuses = {job.status for job in self.jobs}
        return ["all", self.status, *(f"has-{status}" for status in sorted(statuses))]


@dataclass
class ModelUpload:
    """Who may use an upload, how many jobs name it, and when it goes if none does."""

    id: str
    owner: str
    key: str
    sha256: str | None
    size_bytes: int
    content_type: str
    form_until: float
    keep_until: float
    unused_due: float | None
    references: int = 0
    etag: str | None = None

    def is_like(self, other: "ModelUpload") -> bool:
        """Whether both are said to be the same photo."""
        return (self.size_bytes, self.content_type) == (other.size_bytes, other.content_type)


@dataclass
class Remembered:
    """The first submission under an idempotency key."""

    batch_id: str
    body: str
    answer: str
    until: float


@dataclass
class Announced:
    """What a live worker says: which models it serves, and whether each is ready."""

    models: dict[str, bool]
    until: float


def usable_seconds(form_seconds: float) -> float:
    """Tell how long a form counts as one that can be used; there are two sorts here."""
    return FORM_USABLE_SECONDS if form_seconds else 0
