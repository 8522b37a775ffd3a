"""The model's answers to those who look for what is due: the sweep, the janitor, and the sender of webhooks."""

from collections import Counter
from typing import Any

from tests.integration.ledger.kit import LEASE_SECONDS
from tests.integration.ledger.model_moves import PRIORITIES, ModelMoves
from tests.integration.ledger.model_records import ModelBatch, ModelJob, ModelUpload

OUTAGE_SECONDS = LEASE_SECONDS / 3
POISON_DEATHS = 3
DELIVERIES_KEPT = 50
AT_ONCE = 100


class ModelDue(ModelMoves):
    """The calls of what runs by itself. Where several are due, the model does not say in which order they come."""

    # What is due.

    def expired_leases(self) -> list[ModelJob]:
        """List the jobs whose lease has run out, the one that was renewed first before the others."""
        jobs = [job for job in self.jobs.values() if job.lease_until is not None and job.lease_until <= self.now]
        return sorted(jobs, key=lambda job: (job.changed, job.id))

    def delays_over(self) -> list[ModelJob]:
        """List the jobs whose wait for another try is over, oldest first."""
        jobs = [job for job in self.jobs.values() if job.due_at is not None and job.due_at <= self.now]
        return sorted(jobs, key=lambda job: job.changed)

    def sweep(self, models: list[str]) -> dict[str, Any]:
        """Expect a sweep's report."""
        self.call += 1
        report: Counter[str] = Counter()
        pause = None if self.swept_at is None else self.now - self.swept_at
        if pause is None or pause > OUTAGE_SECONDS:
            self.grace_until = self.now + LEASE_SECONDS
        self.swept_at = self.now

        waiting = bool(self.expired_leases()) and self.now < self.grace_until
        if self.now >= self.grace_until:
            for job in self.expired_leases():
                report[self._take_back(job)] += 1
        for job in self.delays_over():
            job.due_at = None
            self.line_up(job)
            self.bells[job.model] += 1
            report["due"] += 1
        for model in models:
            if not self.bells[model] and any(self.lines.get((model, priority)) for priority in PRIORITIES):
                self.bells[model] += 1
                report["rung"] += 1
        names = ("requeued", "cancelled", "poisoned", "due", "rung")
        return {name: report[name] for name in names} | {"waiting": waiting}

    def _take_back(self, job: ModelJob) -> str:
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        job.deaths += 1
        if job.on_device:
            job.device_deaths += 1
            job.suspect = True
            if job.device_deaths == POISON_DEATHS:
                self.end(job, "failed", ("poisoned", "The worker died 3 times while this job was on its device."))
                return "poisoned"
        self.queue_again(job)
        return "requeued"

    def overdue(self, name: str) -> list[ModelBatch]:
        """List the batches whose `inputs_due`, `outputs_due` or `forget_at` is over, in no matter which order."""
        return [one for one in self.batches.values() if (due := getattr(one, name)) is not None and due <= self.now]

    def overdue_uploads(self) -> list[ModelUpload]:
        """List the uploads that nobody needs, in no matter which order."""
        return [one for one in self.uploads.values() if one.unused_due is not None and one.unused_due <= self.now]

    def expire(self) -> dict[str, int]:
        """Expect the report of EXPIRE."""
        self.call += 1
        report: dict[str, int] = {}
        # What batches let go of in this call stands behind what was due before.
        due_before = self.overdue_uploads()
        steps = (
            ("inputs", "inputs_due", self.release_inputs),
            ("outputs", "outputs_due", self.throw_away_outputs),
            ("records", "forget_at", self.forget),
        )
        for kind, name, act in steps:
            batches = self.overdue(name)[:AT_ONCE]
            for batch in batches:
                act(batch)
            report[kind] = len(batches)
        released = [one for one in self.overdue_uploads() if one not in due_before]
        uploads = [*due_before, *released][:AT_ONCE]
        for upload in uploads:
            self.discard(upload)
        return report | {"uploads": len(uploads)}

    def overdue_trash(self) -> list[str]:
        """List the names that are due in the trash, in no matter which order."""
        return [name for name, due in self.trash.items() if due <= self.now]

    def take_trash(self, limit: int, lease_seconds: float) -> list[str]:
        """Expect names."""
        self.call += 1
        names = self.overdue_trash()[:limit]
        for name in names:
            self.trash[name] = self.now + lease_seconds
        return names

    # Webhooks.

    def due_webhooks(self) -> list[tuple[ModelBatch, int]]:
        """List the deliveries that are due, in no matter which order."""
        return [
            (batch, round_)
            for batch in self.batches.values()
            for round_, due in batch.webhooks.items()
            if due <= self.now
        ]

    def take_webhooks(self, limit: int, lease_seconds: float) -> list[tuple[ModelBatch, int, int]]:
        """Expect deliveries: batch, round and attempt."""
        self.call += 1
        taken: list[tuple[ModelBatch, int, int]] = []
        for batch, round_ in self.due_webhooks()[:limit]:
            batch.webhooks[round_] = self.now + lease_seconds
            batch.attempts[round_] = batch.attempts.get(round_, 0) + 1
            taken.append((batch, round_, batch.attempts[round_]))
        return taken

    def note_delivery(self, batch_id: str, round_: int, delivery: dict[str, Any], delay_seconds: float | None) -> None:
        """Note how a delivery went."""
        self.call += 1
        if not (batch := self.batches.get(batch_id)):
            return
        batch.deliveries = [*batch.deliveries, delivery][-DELIVERIES_KEPT:]
        if delay_seconds is None:
            batch.webhooks.pop(round_, None)
        elif round_ in batch.webhooks:
            batch.webhooks[round_] = self.now + delay_seconds
