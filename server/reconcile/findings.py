"""What a comparison of ledger and store can find, and what became of each finding."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal[
    "unfinished_job",
    "settled_job",
    "unknown_job",
    "bad_marker",
    "lost_photo",
    "lost_result",
    "changed_result",
    "missing_marker",
    "stray_output",
    "stray_upload",
    "foreign_object",
]
Outcome = Literal["repaired", "would_repair", "left"]

# In the order in which they are told.
MEANINGS: dict[Kind, str] = {
    "unfinished_job": "jobs that are queued or running in the ledger, and that the store marks as done",
    "settled_job": "jobs that failed or were cancelled in the ledger, and that the store marks as done",
    "unknown_job": "jobs that the store marks as done, and that the ledger does not know",
    "bad_marker": "markers in the store that cannot be used",
    "lost_photo": "queued jobs whose photo is not in the store",
    "lost_result": "succeeded jobs whose result is not in the store",
    "changed_result": "succeeded jobs whose result in the store is not the one that was written",
    "missing_marker": "succeeded jobs that the store does not mark as done",
    "stray_output": "results in the store that no job names",
    "stray_upload": "photos in the store that no upload names",
    "foreign_object": "objects in the store whose names are not of this server's making",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: what it is.
        outcome: what became of it; `would_repair` in a dry run.
        detail: why, or why not.
        key: of the object, where there is one.
        job_id: where a job is concerned.
        batch_id: of that job, where it is known.
        owner: of that job, where it is known.
    """

    kind: Kind
    outcome: Outcome
    detail: str
    key: str | None = None
    job_id: str | None = None
    batch_id: str | None = None
    owner: str | None = None

    def as_json(self) -> dict[str, str]:
        """Return its fields; those that it does not have are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """Say it in a line."""
        job = f"job {self.job_id}" if self.job_id else None
        batch = f"batch {self.batch_id}" if self.batch_id else None
        owner = f"owner {self.owner}" if self.owner else None
        subject = ", ".join(part for part in (job, batch, owner, None if job else self.key) if part)
        return f"{subject}: {self.detail}"


class Tally:
    """Counts what was compared and found, in bounded memory."""

    def __init__(self) -> None:
        self.num_jobs = 0
        self.num_outputs = 0
        self.num_uploads = 0
        # Objects that no record names, and that are too young to judge.
        self.num_young = 0
        self.found: Counter[tuple[Kind, Outcome]] = Counter()

    def add(self, finding: Finding) -> None:
        """Count a finding."""
        self.found[finding.kind, finding.outcome] += 1

    @property
    def num_left(self) -> int:
        """How many findings are as they were."""
        return sum(count for (_, outcome), count in self.found.items() if outcome != "repaired")

    @property
    def num_repaired(self) -> int:
        """How many findings are none any more."""
        return self.found.total() - self.num_left
