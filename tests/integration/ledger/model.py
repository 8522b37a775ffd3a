"""The promises of the ledger, as a plain Python model: one method for each call, without Redis and without a clock."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from server.eta import ModelLoad
from tests.integration.ledger.model_due import ModelDue
from tests.integration.ledger.model_moves import SWEPT_SECONDS
from tests.integration.ledger.model_records import ModelBatch, ModelJob, ModelUpload, Remembered, usable_seconds
from tests.integration.ledger.model_workers import SPEED_SECONDS, ModelWorkers

IDEMPOTENCY_SECONDS = 1250
REPLY_SECONDS = 60

Place = tuple[int, int]


class LedgerModel(ModelWorkers, ModelDue):
    """Every method does what one call of the ledger must do, and returns what it must answer."""

    # Uploads and submissions.

    def announce_uploads(
        self, uploads: Sequence[ModelUpload], form_seconds: float, unused_seconds: float, offer_seconds: float
    ) -> list[str]:
        """Expect the ids to use."""
        self.call += 1
        answers: list[str] = []
        for upload in uploads:
            if found := self._find_same(upload, offer_seconds):
                found.keep_until = max(found.keep_until, self.now + unused_seconds)
                if found.unused_due is not None:
                    found.unused_due = max(found.unused_due, self.now + unused_seconds)
                answers.append(found.id)
                continue
            upload.form_until = upload.keep_until = self.now + usable_seconds(form_seconds)
            upload.unused_due = self.now + unused_seconds
            self.uploads[upload.id] = upload
            answers.append(upload.id)
        return answers

    def _find_same(self, upload: ModelUpload, offer_seconds: float) -> ModelUpload | None:
        """Find the upload that is offered instead: its bytes were seen, and it is neither too young nor too old."""
        digest = (upload.owner, upload.sha256 or "")
        found = self.uploads.get(self.digests.get(digest, ""))
        if not found or not found.is_like(upload):
            return None
        if found.form_until <= self.now - offer_seconds:
            del self.digests[digest]
            return None
        return found if found.form_until <= self.now else None

    def note_lost_upload(self, owner: str, upload_id: str) -> None:
        """Offer an upload no more."""
        self.call += 1
        upload = self.uploads.get(upload_id)
        if upload and upload.sha256 and self.digests.get((owner, upload.sha256)) == upload_id:
            del self.digests[owner, upload.sha256]

    def submit(
        self,
        batch: ModelBatch,
        etags: dict[str, str],
        max_open: int,
        max_owner_open: int | None,
        idempotency: tuple[str, str, str] | None,
        grace_seconds: float | None = None,
    ) -> tuple[str, str]:
        """Expect a submission's answer; `idempotency` is key, body and answer.

        With `grace_seconds` a worker must have been ready for each model lately, or nothing be known of it yet.
        """
        self.call += 1
        first = self.remembered.get((batch.owner, idempotency[0])) if idempotency else None
        if first and first.batch_id != batch.id:
            assert idempotency
            return ("replayed", first.answer) if first.body == idempotency[1] else ("conflict", "")
        if first or batch.id in self.batches:
            return "accepted", ""
        if refusal := self._find_no_room(batch, max_open, max_owner_open):
            return refusal, ""
        for upload_id in (upload_id for job in batch.jobs for upload_id in job.upload_ids):
            if upload_id not in self.uploads or self.uploads[upload_id].owner != batch.owner:
                return "missing_upload", upload_id
        if grace_seconds is not None:
            for model in dict.fromkeys(job.model for job in batch.jobs):
                if self.now - self.served_at.get(model, self.now) > grace_seconds:
                    return "unserved", model
            self.served_at = {job.model: self.now for job in batch.jobs} | self.served_at
        self._accept(batch, etags)
        if idempotency:
            key, body, answer = idempotency
            until = self.now + IDEMPOTENCY_SECONDS
            self.remembered[batch.owner, key] = Remembered(batch.id, body, answer, until)
        return "accepted", ""

    def _find_no_room(self, batch: ModelBatch, max_open: int, max_owner_open: int | None) -> str | None:
        if self.num_open() + len(batch.jobs) > max_open:
            return "full"
        if max_owner_open is not None and self.num_open(batch.owner) + len(batch.jobs) > max_owner_open:
            return "owner_full"
        return None

    def _accept(self, batch: ModelBatch, etags: dict[str, str]) -> None:
        self.batches[batch.id] = batch
        batch.order = self.call
        for place, job in enumerate(batch.jobs):
            job.age = (self.call, place)
            self.jobs[job.id] = job
            for upload in (self.uploads[upload_id] for upload_id in job.upload_ids):
                upload.references += 1
                upload.etag, upload.unused_due = etags[upload.id], None
                if upload.sha256:
                    self.digests.setdefault((upload.owner, upload.sha256), upload.id)
            self.line_up(job)
        # A bell more than there are workers would find nobody.
        for model, count in Counter(job.model for job in batch.jobs).items():
            self.asked_models.add(model)
            self.asked_until = self.now + SPEED_SECONDS
            self.bells[model] += min(count, max(1, len(self.workers)))
        self.tell_workers_ready(batch.jobs)
        self.announce_change(batch.id)

    def num_open(self, owner: str | None = None) -> int:
        """Count the jobs that are still to be done, of one owner or of all."""
        return sum(job.is_open and owner in {None, job.batch.owner} for job in self.jobs.values())

    # Users.

    def keep(self, token: str, answer: Any) -> Any:
        """Remember what a change was answered, for whoever repeats it."""
        self.replies[token] = answer, self.now + REPLY_SECONDS
        return answer

    def cancel(self, token: str, owner: str, job_ids: list[str]) -> list[str]:
        """Expect the answers to CANCEL."""
        self.call += 1
        if token in self.replies:
            return self.replies[token][0]
        replies: list[str] = []
        for job_id in job_ids:
            job = self.jobs.get(job_id)
            if not job or owner not in {"", job.batch.owner}:
                replies.append("unknown")
            elif job.status == "queued":
                self.end(job, "cancelled")
                replies.append("cancelled")
            elif job.status == "running":
                job.cancel = True
                self.tell_workers("cancel", "job_id", job.id)
                replies.append("requested")
            else:
                replies.append("finished")
        return self.keep(token, replies)

    def reopen(
        self, token: str, owner: str, job_ids: list[str], max_open: int, limited: tuple[str, int] | None
    ) -> list[str]:
        """Expect the answers to REOPEN."""
        self.call += 1
        if token in self.replies:
            return self.replies[token][0]
        wanted = {job_id for job_id in job_ids if self._judge(owner, job_id) == "queued"}
        refusal = "full" if self.num_open() + len(wanted) > max_open else None
        if not refusal and limited:
            num_limited = sum(self.jobs[job_id].batch.owner == limited[0] for job_id in wanted)
            is_full = num_limited and self.num_open(limited[0]) + num_limited > limited[1]
            refusal = "owner_full" if is_full else None
        replies: list[str] = []
        reopened: list[ModelJob] = []
        for place, job_id in enumerate(job_ids):
            answer = self._judge(owner, job_id)
            if answer == "queued" and refusal:
                answer = refusal
            elif answer == "queued":
                self._reopen(self.jobs[job_id], place)
                reopened.append(self.jobs[job_id])
            replies.append(answer)
        if reopened:
            self.tell_workers_ready(reopened)
        return self.keep(token, replies)

    def _judge(self, owner: str, job_id: str) -> str:
        job = self.jobs.get(job_id)
        if not job or owner not in {"", job.batch.owner}:
            return "unknown"
        if job.is_open:
            return "open"
        if job.status == "succeeded":
            return "succeeded"
        return "expired" if job.batch.inputs_released else "queued"

    def _reopen(self, job: ModelJob, place: int) -> None:
        if job.batch.status == "finished":
            self.begin_round(job.batch)
        self.move(job, "queued")
        job.age = (self.call, place)
        job.errors = job.deaths = job.device_deaths = 0
        job.suspect, job.error, job.worker, job.step = False, None, None, None
        self.line_up(job)
        self.bells[job.model] += 1
        self.tell_job(job, "retrying")

    def delete(self, token: str, owner: str, batch_id: str) -> str:
        """Expect the answer to DELETE_BATCH."""
        self.call += 1
        if token in self.replies:
            return self.replies[token][0]
        batch = self.batches.get(batch_id)
        if not batch or owner not in {"", batch.owner}:
            return "unknown"
        if batch.status != "finished":
            return "open"
        self.forget(batch)
        return self.keep(token, "deleted")

    # Time.

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what lives for a time only go."""
        now = self.now = self.now + seconds
        self.remembered = {key: one for key, one in self.remembered.items() if one.until > now}
        self.claims = {worker: claim for worker, claim in self.claims.items() if claim[2] > now}
        self.replies = {token: reply for token, reply in self.replies.items() if reply[1] > now}
        self.workers = {worker: one for worker, one in self.workers.items() if one.until > now}
        self.holders = {model: one for model, one in self.holders.items() if max(one.values()) > now}
        if self.placed_until <= now:
            self.num_placed = 0
        self.speeds = {model: one for model, one in self.speeds.items() if one[1] > now}
        self.served_at = {model: at for model, at in self.served_at.items() if at + SPEED_SECONDS > now}
        if self.asked_until <= now:
            self.asked_models = set()
        if self.changes_until <= now:
            self.changes = []
        if self.control_until <= now:
            self.control = []
        if self.swept_at is not None and self.swept_at + SWEPT_SECONDS <= now:
            self.swept_at, self.grace_until = None, 0

    # What is read.

    def loads(self, batch: ModelBatch) -> dict[str, ModelLoad]:
        """Expect what an estimate of a batch's end needs, found by playing the claims through."""
        loads: dict[str, ModelLoad] = {}
        for model in {job.model for job in batch.jobs if job.is_open}:
            order = list(self.claim_order(model))
            places = [place for place, job in enumerate(order) if job.batch is batch]
            num_workers = sum(one.models.get(model, False) for one in self.workers.values())
            speeds = {name: float(text) for name, text in self.speeds.get(model, ({}, 0))[0].items()}
            loads[model] = ModelLoad(max(places, default=0), num_workers, speeds)
        return loads

    def list_batches(
        self, owner: str, status: str | None, label: str | None, limit: int, behind: Place | None, most_looks: int
    ) -> tuple[list[ModelBatch], Place | None]:
        """Expect a page of batches, and the place where the next one begins."""
        shelf = [
            one
            for one in sorted(self.batches.values(), key=lambda one: -one.order)
            if one.owner == owner and status in {None, one.status} and (behind is None or one.order < behind[0])
        ]
        found: list[ModelBatch] = []
        for num_looks, batch in enumerate(shelf, 1):
            if label in {None, batch.label}:
                found.append(batch)
            if len(found) == limit or num_looks == most_looks:
                return found, (batch.order, 0) if num_looks < len(shelf) else None
        return found, None

    def list_jobs(
        self,
        owner: str | None,
        status: str | None,
        model: str | None,
        limit: int,
        behind: Place | None,
        most_looks: int,
    ) -> tuple[list[ModelJob], Place | None]:
        """Expect a page of jobs, and the place where the next one begins."""
        shelf = [
            one
            for one in sorted(self.batches.values(), key=lambda one: -one.order)
            if owner in {None, one.owner} and (status is None or one.count(status))
        ]
        places = [(job, (one.order, index + 1)) for one in shelf for index, job in enumerate(one.jobs)]
        if behind is not None:
            places = [(job, place) for job, place in places if (-place[0], place[1]) > (-behind[0], behind[1])]
        found: list[ModelJob] = []
        for num_looks, (job, place) in enumerate(places, 1):
            if status in {None, job.status} and model in {None, job.model}:
                found.append(job)
            if len(found) == limit or num_looks == most_looks:
                return found, place if num_looks < len(places) else None
        return found, None
