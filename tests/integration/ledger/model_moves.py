"""The moves from which all calls of the model are made; `LedgerModel` has the calls."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from server.jobs import TRANSITIONS, JobStatus
from tests.integration.ledger.kit import (
    INPUTS_SECONDS,
    LEASE_SECONDS,
    ORPHANS_SECONDS,
    OUTPUTS_SECONDS,
    RECORDS_SECONDS,
)
from tests.integration.ledger.model_records import Announced, ModelBatch, ModelJob, ModelUpload, Remembered

PRIORITIES = ("high", "normal", "low")
CHANGES_SECONDS = 3600
SWEPT_SECONDS = 4 * LEASE_SECONDS


class ModelMoves:
    """The state of the model, and what several calls do to it."""

    def __init__(self) -> None:
        self.now: float = 0
        # Counts calls: what came with a later call stands behind what came with an earlier one.
        self.call = 0
        self.batches: dict[str, ModelBatch] = {}
        self.jobs: dict[str, ModelJob] = {}
        self.uploads: dict[str, ModelUpload] = {}
        self.digests: dict[tuple[str, str], str] = {}
        self.trash: dict[str, float] = {}
        self.remembered: dict[tuple[str, str], Remembered] = {}
        # For each model and priority, when each waiting owner took its place: the call, and the place within the call.
        self.lines: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self.bells: Counter[str] = Counter()
        self.asked_models: set[str] = set()
        self.asked_until: float = 0
        self.claims: dict[str, tuple[str, str, float]] = {}
        self.workers: dict[str, Announced] = {}
        # For each model, until when each worker counts as holding it.
        self.holders: dict[str, dict[str, float]] = {}
        # For each model, when a worker was last ready for it.
        self.served_at: dict[str, float] = {}
        self.num_placed = 0
        self.placed_until: float = 0
        self.speeds: dict[str, tuple[dict[str, str], float]] = {}
        self.replies: dict[str, tuple[Any, float]] = {}
        self.swept_at: float | None = None
        self.grace_until: float = 0
        # Both streams: what stands in them, and until when.
        self.changes: list[str] = []
        self.changes_until: float = 0
        self.control: list[list[str]] = []
        self.control_until: float = 0

    # Telling.

    def announce_change(self, batch_id: str) -> None:
        """Expect followers to be woken."""
        self.changes.append(batch_id)
        self.changes_until = self.now + CHANGES_SECONDS

    def tell(self, batch: ModelBatch, kind: str, data: dict[str, Any]) -> None:
        """Expect an event."""
        batch.told.append((kind, data))
        self.announce_change(batch.id)

    def tell_job(self, job: ModelJob, kind: str) -> None:
        """Expect an event about a job as it is now."""
        error = job.error and {"code": job.error[0], "detail": job.error[1]}
        data = {"job_id": job.id, "index": job.index, "status": job.status, "attempts": job.attempts, "error": error}
        self.tell(job.batch, f"job.{kind}", data)

    def tell_workers(self, *fields: str) -> None:
        """Expect all workers to hear of something at once."""
        self.control.append(["type", *fields])
        self.control_until = self.now + CHANGES_SECONDS

    def tell_workers_ready(self, jobs: Iterable[ModelJob]) -> None:
        """Expect them to hear that these jobs can be claimed."""
        told = list(jobs)
        has_high = any(job.batch.priority == "high" for job in told)
        models = ",".join(dict.fromkeys(job.model for job in told))
        self.tell_workers("ready", "high", str(int(has_high)), "models", models)

    # Lines.

    def line_up(self, job: ModelJob) -> None:
        """Let the job's owner stand in line exactly while one of its jobs is ready there."""
        owner, priority = job.batch.owner, job.batch.priority
        line = self.lines.setdefault((job.model, priority), {})
        if not self.ready(owner, job.model, priority):
            line.pop(owner, None)
        elif owner not in line:
            line[owner] = (self.call, sum(call == self.call for call, _ in line.values()))

    def ready(self, owner: str, model: str, priority: str) -> list[ModelJob]:
        """List an owner's ready jobs for a model, oldest first."""
        mine = [
            job
            for job in self.jobs.values()
            if job.is_ready and (job.batch.owner, job.model, job.batch.priority) == (owner, model, priority)
        ]
        return sorted(mine, key=lambda job: job.age)

    def claim_order(self, model: str) -> Iterable[ModelJob]:
        """Give the ready jobs of a model in the order in which one worker would claim them if nothing else happened."""
        for priority in PRIORITIES:
            line = self.lines.get((model, priority), {})
            waiting = [self.ready(owner, model, priority) for owner in sorted(line, key=lambda owner: line[owner])]
            while waiting:
                mine = waiting.pop(0)
                yield mine.pop(0)
                if mine:
                    waiting.append(mine)

    # Jobs and batches.

    def move(self, job: ModelJob, status: str) -> None:
        """Change a job's status by one of the documented moves."""
        assert JobStatus(status) in TRANSITIONS[JobStatus(job.status)]
        if job.status == "running" and status != "succeeded":
            self.trash[job.try_name] = self.now + ORPHANS_SECONDS
        job.changed = self.call
        job.status = status
        job.on_device = False

    def end(self, job: ModelJob, status: str, error: tuple[str, str] | None = None) -> None:
        """Bring a job to a final state, and its batch if it was the last."""
        self.move(job, status)
        job.lease_until = job.due_at = None
        job.cancel, job.error = False, error
        self.line_up(job)
        self.tell_job(job, status)
        if not any(one.is_open for one in job.batch.jobs):
            self._finish(job.batch)

    def _finish(self, batch: ModelBatch) -> None:
        batch.status = "finished"
        batch.inputs_due = self.now + INPUTS_SECONDS
        batch.outputs_due = self.now + OUTPUTS_SECONDS
        batch.forget_at = self.now + RECORDS_SECONDS
        if batch.hook:
            batch.webhooks[batch.round] = self.now
            batch.finished_rounds.append(batch.round)
        self.tell(batch, "batch.finished", {"batch_id": batch.id, "round": batch.round})

    def begin_round(self, batch: ModelBatch) -> None:
        """Open a batch that had finished."""
        batch.status, batch.round = "queued", batch.round + 1
        batch.inputs_due = batch.outputs_due = batch.forget_at = None

    def queue_again(self, job: ModelJob, delay_seconds: float = 0) -> None:
        """Put a job back to its old place in its owner's own order."""
        self.move(job, "queued")
        job.lease_until = job.worker = job.step = None
        if delay_seconds:
            job.due_at = self.now + delay_seconds
        else:
            self.line_up(job)
            self.bells[job.model] += 1
        self.tell_job(job, "retrying")

    def held(self, job_id: str, fence: int) -> ModelJob | None:
        """Return the job if whoever shows this fence still holds it."""
        job = self.jobs.get(job_id)
        return job if job and job.status == "running" and job.fence == fence else None

    # What goes.

    def release_inputs(self, batch: ModelBatch) -> None:
        """Let a batch give its photos back, once."""
        batch.inputs_due = None
        if batch.inputs_released:
            return
        batch.inputs_released = True
        for upload in (self.uploads[upload_id] for job in batch.jobs for upload_id in job.upload_ids):
            upload.references -= 1
            if not upload.references:
                upload.unused_due = max(self.now, upload.keep_until)

    def throw_away_outputs(self, batch: ModelBatch) -> None:
        """Let the results of a batch go."""
        batch.outputs_due = None
        for job in batch.jobs:
            if job.output:
                self.trash[f"outputs/{job.output}"] = self.trash[job.marker_name] = self.now
                job.output = None

    def forget(self, batch: ModelBatch) -> None:
        """Let a batch go with all that belongs to it."""
        self.release_inputs(batch)
        self.throw_away_outputs(batch)
        for job in batch.jobs:
            del self.jobs[job.id]
        del self.batches[batch.id]
        self.announce_change(batch.id)

    def discard(self, upload: ModelUpload) -> None:
        """Let an upload go; its object only once its form cannot bring it back."""
        self.trash[f"uploads/{upload.key}"] = max(self.now, upload.form_until)
        if upload.sha256 and self.digests.get((upload.owner, upload.sha256)) == upload.id:
            del self.digests[upload.owner, upload.sha256]
        del self.uploads[upload.id]
