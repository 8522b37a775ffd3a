"""Random lives of a ledger on a real Valkey, compared after every call with a plain Python model of its promises."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from server.jobs import TRANSITIONS, JobStatus
from server.ledger.api_side import Idempotency
from server.ledger.records import UploadRecord
from server.ledger.worker_side import Alone, HeldJob
from server.queue import create_broker, queue_name

# Some 40 s. For a long run: LEDGER_MACHINE_EXAMPLES=5000 pytest tests/integration/ledger/test_ledger_machine.py
EXAMPLES = int(os.environ.get("LEDGER_MACHINE_EXAMPLES", "140"))

OWNERS = ("ana", "bo", "cy")
MODELS = ("flux", "kontext", "qwen")
WORKERS = ("w1", "w2", "w3")
PRIORITIES = ("high", "normal", "low")

# Time passes in steps of 100 s, and no deadline but the claim's own falls on such a step: the seconds that the test
# itself takes never decide. The claim's record lives for 60 s, less than one step.
STEP_SECONDS = 100
LEASE_SECONDS = 650
OUTAGE_SECONDS = LEASE_SECONDS / 3
SWEEP_SECONDS = 50
DELAY_SECONDS = 250
RECORDS_SECONDS = 950
UPLOAD_SECONDS = 1550
IDEMPOTENCY_SECONDS = 1250
CLAIM_SECONDS = 60
SWEPT_SECONDS = 4 * LEASE_SECONDS
STREAM_SECONDS = 3600
MAX_ERRORS = 2
POISON_DEATHS = 3
FORGOTTEN_AT_ONCE = 10
MAX_OPEN = 20

_DUMP = """
local readers = {
  hash = function(key) return redis.call("HGETALL", key) end,
  zset = function(key) return redis.call("ZRANGE", key, 0, -1) end,
  set = function(key) return redis.call("SMEMBERS", key) end,
  list = function(key) return redis.call("LRANGE", key, 0, -1) end,
  stream = function(key) return redis.call("XRANGE", key, "-", "+") end,
  string = function(key) return redis.call("GET", key) end,
}
local dump = {}
for _, key in ipairs(redis.call("KEYS", "*" .. ARGV[1] .. "*")) do
  dump[#dump + 1] = { key, redis.call("PTTL", key), readers[redis.call("TYPE", key).ok](key) }
end
return cjson.encode(dump)
"""


@dataclass
class ModelJob:
    """What the ledger must know of a job."""

    id: str
    batch: "ModelBatch"
    index: int
    model: str
    upload_ids: list[str]
    age: tuple[int, int]
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
    error: str | None = None
    due_at: float | None = None
    lease_until: float | None = None
    changed: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether a worker may have it now."""
        return self.status == "queued" and self.due_at is None


@dataclass
class ModelBatch:
    """What the ledger must know of a batch; `told` are the events that its followers must have seen."""

    id: str
    owner: str
    priority: str
    jobs: list[ModelJob] = field(default_factory=list[ModelJob])
    status: str = "queued"
    round: int = 1
    forget_at: float | None = None
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])

    def count(self, status: str) -> int:
        """Count its jobs in a status."""
        return sum(job.status == status for job in self.jobs)


@dataclass
class ModelUpload:
    """Who may use an upload, how many jobs name it, and when it goes if none does."""

    owner: str
    references: int = 0
    expires_at: float | None = None


@dataclass
class Remembered:
    """The first submission under an idempotency key."""

    batch_id: str
    body: str
    answer: str
    until: float


class LedgerModel:
    """The promises: every method does what one call of the ledger must do, and returns what it must answer."""

    def __init__(self) -> None:
        self.now: float = 0
        # Counts calls: what came with a later call stands behind what came with an earlier one.
        self.call = 0
        self.batches: dict[str, ModelBatch] = {}
        self.jobs: dict[str, ModelJob] = {}
        self.uploads: dict[str, ModelUpload] = {}
        self.remembered: dict[tuple[str, str], Remembered] = {}
        # For each model and priority, when each waiting owner took its place: the call, and the place within the call.
        self.lines: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self.bells: Counter[str] = Counter()
        self.claims: dict[str, tuple[str, str, float]] = {}
        self.swept_at: float | None = None
        self.grace_until: float = 0
        self.streams: dict[str, float] = {}

    # What several calls have in common.

    def tell(self, batch: ModelBatch, kind: str, data: dict[str, Any]) -> None:
        """Expect an event."""
        batch.told.append((kind, data))
        self.streams["changes"] = self.now + STREAM_SECONDS

    def tell_job(self, job: ModelJob, kind: str) -> None:
        """Expect an event about a job as it is now."""
        error = job.error and {"code": job.error, "detail": f"{job.error}!"}
        if job.error == "poisoned":
            error = {"code": "poisoned", "detail": "The worker died 3 times while this job was on its device."}
        data = {"job_id": job.id, "index": job.index, "status": job.status, "attempts": job.attempts, "error": error}
        self.tell(job.batch, f"job.{kind}", data)

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

    def move(self, job: ModelJob, status: str) -> None:
        """Change a job's status by one of the documented moves."""
        assert JobStatus(status) in TRANSITIONS[JobStatus(job.status)]
        job.changed = self.call
        job.status = status
        job.on_device = False

    def end(self, job: ModelJob, status: str, error: str | None = None) -> None:
        """Bring a job to a final state, and its batch if it was the last."""
        self.move(job, status)
        job.lease_until = job.due_at = None
        job.cancel, job.error = False, error
        self.line_up(job)
        self.tell_job(job, status)
        batch = job.batch
        if batch.count("queued") + batch.count("running") == 0:
            batch.status, batch.forget_at = "finished", self.now + RECORDS_SECONDS
            self.tell(batch, "batch.finished", {"batch_id": batch.id, "round": batch.round})

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

    # The calls.

    def submit(
        self,
        batch: ModelBatch,
        max_open: int,
        idempotency: tuple[str, str, str] | None,
    ) -> tuple[str, str]:
        """Expect a submission's answer; `idempotency` is key, body and answer."""
        self.call += 1
        first = self.remembered.get((batch.owner, idempotency[0])) if idempotency else None
        if first and first.batch_id != batch.id:
            assert idempotency
            return ("replayed", first.answer) if first.body == idempotency[1] else ("conflict", "")
        if first or batch.id in self.batches:
            return "accepted", ""
        num_open = sum(job.status in {"queued", "running"} for job in self.jobs.values())
        if num_open + len(batch.jobs) > max_open:
            return "full", ""
        for upload_id in (upload_id for job in batch.jobs for upload_id in job.upload_ids):
            if upload_id not in self.uploads or self.uploads[upload_id].owner != batch.owner:
                return "missing_upload", upload_id

        self.batches[batch.id] = batch
        for place, job in enumerate(batch.jobs):
            job.age = (self.call, place)
            self.jobs[job.id] = job
            for upload_id in job.upload_ids:
                self.uploads[upload_id].references += 1
                self.uploads[upload_id].expires_at = None
            self.line_up(job)
            self.bells[job.model] += 1
        if idempotency:
            key, body, answer = idempotency
            until = self.now + IDEMPOTENCY_SECONDS
            self.remembered[batch.owner, key] = Remembered(batch.id, body, answer, until)
        self.streams["changes"] = self.now + STREAM_SECONDS
        return "accepted", ""

    def claim(self, worker: str, token: str, models: list[str], num_held: int) -> ModelJob | str | None:
        """Expect the job that a claim must hand out, "alone", or None."""
        self.call += 1
        if worker in self.claims and self.claims[worker][0] == token:
            again = self.jobs.get(self.claims[worker][1])
            return again if again and again.status == "running" and again.worker == worker else None
        for priority in PRIORITIES:
            waiting = [
                (place, self.ready(owner, model, priority)[0])
                for model in models
                for owner, place in self.lines.get((model, priority), {}).items()
            ]
            if waiting:
                job = min(waiting, key=lambda one: (one[0], one[1].age))[1]
                if job.suspect and num_held:
                    return "alone"
                self._hand_out(job, worker, models)
                self.claims[worker] = (token, job.id, self.now + CLAIM_SECONDS)
                return job
        return None

    def _hand_out(self, job: ModelJob, worker: str, models: list[str]) -> None:
        self.move(job, "running")
        job.attempts += 1
        job.fence += 1
        job.worker, job.error, job.step = worker, None, None
        job.lease_until = self.now + LEASE_SECONDS
        self.line_up(job)
        for model in models:
            line = self.lines.get((model, job.batch.priority), {})
            if job.batch.owner in line:
                line[job.batch.owner] = (self.call, 0)
        if job.batch.status == "queued":
            job.batch.status = "running"
        self.tell_job(job, "started")

    def start(self, job_id: str, fence: int, *, on_device: bool) -> str:
        """Expect the answer to START."""
        self.call += 1
        if not (job := self.held(job_id, fence)):
            return "lost"
        job.on_device = on_device
        return "cancelled" if job.cancel else "ok"

    def renew(self, held: list[tuple[str, int, int | None]]) -> list[str]:
        """Expect the answers to RENEW of (job, fence, step)."""
        self.call += 1
        replies: list[str] = []
        for job_id, fence, step in held:
            if not (job := self.held(job_id, fence)):
                replies.append("lost")
                continue
            job.lease_until, job.changed = self.now + LEASE_SECONDS, self.call
            if step is not None and step != job.step:
                job.step = step
                self.streams["changes"] = self.now + STREAM_SECONDS
            replies.append("cancelled" if job.cancel else "ok")
        return replies

    def commit(self, job_id: str, fence: int) -> str:
        """Expect the answer to COMMIT."""
        self.call += 1
        job = self.jobs.get(job_id)
        if job and job.status == "succeeded" and job.fence == fence:
            return "ok"
        if not (job := self.held(job_id, fence)):
            return "lost"
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        self.end(job, "succeeded")
        return "ok"

    def fail(self, job_id: str, fence: int, code: str) -> str:
        """Expect the answer to FAIL."""
        self.call += 1
        job = self.jobs.get(job_id)
        if job and job.fence == fence and job.status in {"failed", "cancelled"}:
            return "ok" if job.status == "failed" else "cancelled"
        if not (job := self.held(job_id, fence)):
            return "lost"
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        self.end(job, "failed", code)
        return "ok"

    def retry(self, job_id: str, fence: int, delay_seconds: float, code: str, *, counts: bool) -> str:
        """Expect the answer to RETRY."""
        self.call += 1
        if not (job := self.held(job_id, fence)):
            return "lost"
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        if counts:
            job.errors += 1
            if job.errors == MAX_ERRORS:
                self.end(job, "failed", code)
                return "failed"
            job.error = code
        self.queue_again(job, delay_seconds)
        return "ok"

    def cancel(self, owner: str, job_ids: list[str]) -> list[str]:
        """Expect the answers to CANCEL."""
        self.call += 1
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
                self.streams["control"] = self.now + STREAM_SECONDS
                replies.append("requested")
            else:
                replies.append("finished")
        return replies

    def reopen(self, owner: str, batch_id: str, job_ids: list[str]) -> list[str]:
        """Expect the ids that REOPEN queues again."""
        self.call += 1
        batch = self.batches.get(batch_id)
        if not batch or owner not in {"", batch.owner}:
            return []
        reopened: list[str] = []
        for job_id in job_ids:
            job = self.jobs.get(job_id)
            if not job or job.batch is not batch or job.status not in {"failed", "cancelled"}:
                continue
            self.move(job, "queued")
            job.age = (self.call, len(reopened))
            job.errors = job.deaths = job.device_deaths = 0
            job.suspect, job.error, job.worker, job.step = False, None, None, None
            self.line_up(job)
            self.bells[job.model] += 1
            self.tell_job(job, "retrying")
            reopened.append(job_id)
        if reopened and batch.status == "finished":
            batch.status, batch.forget_at, batch.round = "queued", None, batch.round + 1
        return reopened

    def expired(self) -> list[ModelJob]:
        """List the jobs whose lease has run out, the one that was renewed first before the others."""
        jobs = [job for job in self.jobs.values() if job.lease_until is not None and job.lease_until <= self.now]
        return sorted(jobs, key=lambda job: (job.changed, job.id))

    def due(self) -> list[ModelJob]:
        """List the jobs whose wait for another try is over, oldest first."""
        jobs = [job for job in self.jobs.values() if job.due_at is not None and job.due_at <= self.now]
        return sorted(jobs, key=lambda job: job.changed)

    def old(self) -> list[ModelBatch]:
        """List the batches that may be forgotten, in no matter which order."""
        return [batch for batch in self.batches.values() if batch.forget_at is not None and batch.forget_at <= self.now]

    def sweep(self, models: list[str]) -> dict[str, Any]:
        """Expect a sweep's report."""
        self.call += 1
        report: Counter[str] = Counter()
        pause = None if self.swept_at is None else self.now - self.swept_at
        if pause is None or pause > OUTAGE_SECONDS:
            self.grace_until = self.now + LEASE_SECONDS
        self.swept_at = self.now

        waiting = bool(self.expired()) and self.now < self.grace_until
        if self.now >= self.grace_until:
            for job in self.expired():
                report[self._take_back(job)] += 1
        for job in self.due():
            job.due_at = None
            self.line_up(job)
            self.bells[job.model] += 1
            report["due"] += 1
        for model in models:
            if not self.bells[model] and any(self.lines.get((model, priority)) for priority in PRIORITIES):
                self.bells[model] += 1
                report["rung"] += 1
        for batch in self.old()[:FORGOTTEN_AT_ONCE]:
            self._forget(batch)
            report["forgotten"] += 1
        names = ("requeued", "cancelled", "poisoned", "due", "rung", "forgotten")
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
                self.end(job, "failed", "poisoned")
                return "poisoned"
        self.queue_again(job)
        return "requeued"

    def _forget(self, batch: ModelBatch) -> None:
        for job in batch.jobs:
            for upload_id in job.upload_ids:
                self.uploads[upload_id].references -= 1
                if not self.uploads[upload_id].references:
                    del self.uploads[upload_id]
            del self.jobs[job.id]
        del self.batches[batch.id]

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what lives for a time only go."""
        now = self.now = self.now + seconds
        self.uploads = {key: one for key, one in self.uploads.items() if one.expires_at is None or one.expires_at > now}
        self.remembered = {key: one for key, one in self.remembered.items() if one.until > now}
        self.claims = {worker: claim for worker, claim in self.claims.items() if claim[2] > now}
        self.streams = {name: until for name, until in self.streams.items() if until > now}
        if self.swept_at is not None and self.swept_at + SWEPT_SECONDS <= now:
            self.swept_at, self.grace_until = None, 0


def _bit(flag: bool) -> str:
    return "1" if flag else "0"


def _without_none(fields: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}


def expected_keys(model: LedgerModel) -> dict[str, Any]:
    """Write the model down as the keys that must be there, and no others, with what they must hold."""
    keys: dict[str, Any] = {"schema": "1"}
    for upload_id, upload in model.uploads.items():
        keys[f"upload:{upload_id}"] = {
            "owner": upload.owner,
            "references": str(upload.references),
            "expires": upload.expires_at is not None,
        }
    for (owner, key), first in model.remembered.items():
        idempotency = Idempotency(key=key, body_sha256=first.body, answer=first.answer, ttl_seconds=0)
        keys[f"idempotency:{owner}:{idempotency.key_sha256}"] = {
            "batch_id": first.batch_id,
            "body_sha256": first.body,
            "answer": first.answer,
        }
    for batch in model.batches.values():
        counts = {status.value: str(batch.count(status)) for status in JobStatus}
        keys[f"batch:{batch.id}"] = counts | {
            "status": batch.status,
            "round": str(batch.round),
            "total": str(len(batch.jobs)),
            "owner": batch.owner,
        }
        keys[f"batch:{batch.id}:jobs"] = [job.id for job in batch.jobs]
        if batch.told:
            keys[f"batch:{batch.id}:events"] = batch.told
    for job in model.jobs.values():
        keys[f"job:{job.id}"] = _without_none(
            {
                "status": job.status,
                "batch_id": job.batch.id,
                "owner": job.batch.owner,
                "attempts": str(job.attempts),
                "fence": str(job.fence),
                "errors": str(job.errors),
                "deaths": str(job.deaths),
                "device_deaths": str(job.device_deaths),
                "suspect": _bit(job.suspect),
                "on_device": _bit(job.on_device),
                "cancel": _bit(job.cancel),
                "worker": job.worker,
                "step": None if job.step is None else str(job.step),
                "error_code": job.error,
            }
        )
    keys |= _expected_indexes(model)
    return keys


def _expected_indexes(model: LedgerModel) -> dict[str, Any]:
    jobs = model.jobs.values()
    keys: dict[str, Any] = {
        "open": {job.id for job in jobs if job.status in {"queued", "running"}},
        "leases": {job.id for job in jobs if job.lease_until is not None},
        "delayed": {job.id for job in jobs if job.due_at is not None},
        "forget": {batch.id for batch in model.batches.values() if batch.forget_at is not None},
    }
    for (name, priority), line in model.lines.items():
        keys[f"turns:{name}:{priority}"] = sorted(line, key=lambda owner, line=line: line[owner])
        for owner in line:
            keys[f"ready:{name}:{priority}:{owner}"] = [job.id for job in model.ready(owner, name, priority)]
    for name, count in model.bells.items():
        keys[f"bells:{name}"] = keys[f"messages:{name}"] = count
    for worker, (token, job_id, _) in model.claims.items():
        keys[f"worker:{worker}:claim"] = {"token": token, "job_id": job_id}
    keys |= dict.fromkeys(model.streams, True)
    if model.swept_at is not None:
        keys["swept"] = True
    return {key: value for key, value in keys.items() if value}


JOB_FIELDS = (
    "status", "batch_id", "owner", "attempts", "fence", "errors", "deaths", "device_deaths", "suspect", "on_device",
    "cancel", "worker", "step", "error_code",
)  # fmt: skip
UPLOAD_FIELDS = ("owner", "references")
BATCH_FIELDS = ("status", "round", "total", "owner", *(status.value for status in JobStatus))
EXPIRING = ("idempotency:", "worker:", "swept", "changes", "control")


def observed_keys(prefix: str, dump: list[Any]) -> dict[str, Any]:
    """Read every key of the ledger into the form of `expected_keys`; what must expire must have a time to live."""
    keys: dict[str, Any] = {}
    for full_name, ttl_ms, value in dump:
        if full_name.startswith("dramatiq:"):
            model = full_name.split(f"{prefix}.", 1)[1]
            if model.endswith(".msgs"):
                keys[f"messages:{model.removesuffix('.msgs')}"] = len(value) // 2
            else:
                keys[f"bells:{model}"] = len(value)
            continue
        key = full_name.removeprefix(f"{prefix}:")
        expires = ttl_ms >= 0
        if not key.startswith("upload:"):
            assert expires == key.startswith(EXPIRING), f"{key} has a time to live of {ttl_ms} ms"
        keys[key] = _observed(key, value, expires=expires)
    return keys


def _observed(key: str, value: Any, *, expires: bool) -> Any:
    kind = key.split(":", 1)[0]
    content: Any = value
    if kind in {"changes", "control", "swept"}:
        content = True
    elif kind in {"open", "leases", "delayed", "forget"}:
        content = set(value)
    elif key.endswith(":events"):
        entries = (dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in value)
        content = [(one["type"], json.loads(one["data"])) for one in entries]
    elif kind not in {"schema", "turns", "ready"} and not key.endswith(":jobs"):
        fields = dict(zip(value[::2], value[1::2], strict=True))
        wanted = {"job": JOB_FIELDS, "batch": BATCH_FIELDS, "upload": UPLOAD_FIELDS}.get(kind, tuple(fields))
        content = {name: fields[name] for name in wanted if name in fields}
        if kind == "upload":
            content["expires"] = expires
    return content


class LedgerMachine(RuleBasedStateMachine):
    """Calls the ledger at random and checks every answer, and every key after every call."""

    def __init__(self, new_ledger: Any, reached: Counter[str]) -> None:
        super().__init__()
        self.kit = new_ledger(f"m{uuid4().hex[:12]}")
        self.kit.run(self.kit.api.check_schema())
        self.dump = self.kit.client.register_script(_DUMP)
        self.workers = {name: self.kit.worker(name, lease_seconds=LEASE_SECONDS) for name in WORKERS}
        self.model = LedgerModel()
        self.reached = reached
        self.num_ids = 0
        self.submissions: list[tuple[Any, int, tuple[str, str, str] | None]] = []
        # Every (job, fence) that was ever handed out: late workers come back with theirs.
        self.hands: list[tuple[str, int]] = []
        self.last_claims: dict[str, tuple[str, list[str]]] = {}

    # What the rules share.

    def check(self, call: str, answer: Any, expected: Any) -> None:
        """Compare an answer with the promised one."""
        assert answer == expected, f"{call}: {answer}, promised: {expected}"
        answers = answer if isinstance(answer, list) else [answer]
        self.reached.update(f"{call} {one}" for one in answers)

    def new_id(self, kind: str) -> str:
        """Draw an id, as the API does."""
        self.num_ids += 1
        return f"{kind}{self.num_ids:03d}"

    def make_uploads(self, owner: str, count: int) -> list[str]:
        """Hand out forms."""
        ids = [self.new_id("u") for _ in range(count)]
        records = [
            UploadRecord(id=one, owner=owner, key=one, filename="a.jpg", content_type="image/jpeg", size_bytes=9)
            for one in ids
        ]
        self.kit.run(self.kit.api.create_uploads(records, ttl_seconds=UPLOAD_SECONDS))
        for one in ids:
            self.model.uploads[one] = ModelUpload(owner, expires_at=self.model.now + UPLOAD_SECONDS)
        return ids

    def submit(self, batch: Any, max_open: int, idempotency: tuple[str, str, str] | None) -> None:
        """Submit and check the answer."""
        twin = ModelBatch(batch.id, batch.owner, batch.priority.value)
        twin.jobs = [
            ModelJob(job.id, twin, job.index, job.model, [one.upload_id for one in job.inputs], (0, 0))
            for job in batch.jobs
        ]
        key = None
        if idempotency:
            key = Idempotency(*idempotency, ttl_seconds=IDEMPOTENCY_SECONDS)
        result = self.kit.submit(batch, idempotency=key, max_open_jobs=max_open)
        expected = self.model.submit(twin, max_open, idempotency)
        assert (result.kind, result.text) == expected
        self.reached[f"submit {result.kind}"] += 1

    def claim(self, worker: str, models: list[str], num_held: int, token: str) -> None:
        """Claim and check that exactly the promised job is handed out."""
        ledger = self.workers[worker]
        ledger._claim_token = token
        answer = ledger.claim(models, num_held=num_held)
        expected = self.model.claim(worker, token, models, num_held)
        self.last_claims[worker] = (token, models)
        if isinstance(expected, ModelJob):
            assert answer is not None
            assert not isinstance(answer, Alone)
            assert (answer.id, answer.fence, answer.attempts) == (expected.id, expected.fence, expected.attempts)
            assert (answer.worker, answer.suspect, answer.status) == (worker, expected.suspect, JobStatus.RUNNING)
            assert [one.upload_id for one in answer.inputs] == expected.upload_ids
            if (answer.id, answer.fence) not in self.hands:
                self.hands.append((answer.id, answer.fence))
            self.reached["claim job"] += 1
        else:
            self.check("claim", "alone" if isinstance(answer, Alone) else answer, expected)

    def sweep(self, models: list[str]) -> None:
        """Sweep and check the report."""
        overdue = {"leases": self.model.expired(), "delayed": self.model.due(), "forget": self.model.old()}
        for name, expected in overdue.items():
            self.check_overdue(f"{self.kit.prefix}:{name}", [one.id for one in expected])
        report = self.kit.run(
            self.kit.api.sweep(models, lease_seconds=LEASE_SECONDS, interval_seconds=SWEEP_SECONDS),
        )
        promised = self.model.sweep(models)
        assert vars(report) == promised
        self.reached.update(f"sweep {name}" for name, count in promised.items() if count)

    def check_overdue(self, key: str, expected: list[str]) -> None:
        """Compare what is overdue, and let the sweep meet it in the model's order.

        In Redis the order is that of milliseconds, and two calls may fall into one.
        """
        seconds, micros = self.kit.client.time()
        overdue: Any = self.kit.client.zrangebyscore(key, "-inf", int(seconds) * 1000 + int(micros) // 1000)
        assert set(overdue) == set(expected)
        if expected:
            self.kit.client.zadd(key, {member: place for place, member in enumerate(expected)}, xx=True)

    def pass_time(self, seconds: float) -> None:
        """Let time pass in Redis and in the model."""
        self.kit.pass_time(seconds)
        self.model.pass_time(seconds)

    def start(self, hand: tuple[str, int], *, on_device: bool) -> None:
        """Put a job on the device or take it off."""
        answer = self.workers["w1"].start(*hand, on_device=on_device)
        self.check("start", answer, self.model.start(*hand, on_device=on_device))

    def live_hands(self) -> list[tuple[str, int]]:
        """List the hands that still hold their job."""
        return [hand for hand in self.hands if self.model.held(*hand)]

    def commit(self, hand: tuple[str, int]) -> None:
        """Hand in a result and check the answer."""
        job = self.model.jobs.get(hand[0])
        answer = self.kit.commit_as(self.workers["w1"], *hand, job.upload_ids if job else [])
        self.check("commit", answer, self.model.commit(*hand))

    def fail(self, hand: tuple[str, int]) -> None:
        """Give a job up and check the answer."""
        answer = self.workers["w1"].fail(*hand, code="invalid_input", detail="invalid_input!", timings={"run": 1})
        self.check("fail", answer, self.model.fail(*hand, "invalid_input"))

    def retry(self, hand: tuple[str, int], delay_seconds: int, *, counts: bool) -> None:
        """Give a job back and check the answer."""
        answer = self.workers["w1"].retry(
            *hand, delay_seconds=delay_seconds, counts=counts, max_errors=MAX_ERRORS, code="odd", detail="odd!"
        )
        self.check("retry", answer, self.model.retry(*hand, delay_seconds, "odd", counts=counts))

    def renew(self, hands: list[tuple[str, int]], step: int | None) -> None:
        """Renew leases and check the answers."""
        held = [HeldJob(job_id, fence, step, None if step is None else 9) for job_id, fence in hands]
        expected = self.model.renew([(one.job_id, one.fence, one.step) for one in held])
        self.check("renew", self.workers["w1"].renew(held), expected)

    def act(self, name: str, hand: tuple[str, int]) -> None:
        """Make one of a holder's calls."""
        if name == "start":
            self.start(hand, on_device=True)
        elif name == "renew":
            self.renew([hand, hand], 3)
        elif name == "commit":
            self.commit(hand)
        elif name == "fail":
            self.fail(hand)
        else:
            self.retry(hand, 0, counts=True)

    def claim_again(self, job_id: str, worker: str) -> tuple[str, int] | None:
        """Claim what comes until it is this job; None when it does not come soon."""
        for _ in range(6):
            if not any(job.is_ready for job in self.model.jobs.values()):
                return None
            self.claim(worker, list(MODELS), 0, self.new_id("token"))
            if self.hands[-1][0] == job_id:
                return self.hands[-1]
        return None

    # The rules.

    @rule(owner=st.sampled_from(OWNERS), count=st.integers(1, 2))
    def uploads_are_made(self, owner: str, count: int) -> None:
        """Forms are handed out that may never be used."""
        self.make_uploads(owner, count)

    @rule(
        data=st.data(),
        owner=st.sampled_from(OWNERS),
        priority=st.sampled_from(PRIORITIES),
        models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3),
        trouble=st.sampled_from((*[None] * 7, "missing", "foreign", "full")),
        key=st.sampled_from((None, None, None, "k1", "k2")),
        body=st.sampled_from(("body-a", "body-b")),
    )
    def batch_is_submitted(
        self,
        data: st.DataObject,
        owner: str,
        priority: str,
        models: list[str],
        trouble: str | None,
        key: str | None,
        body: str,
    ) -> None:
        """A batch comes, sometimes under a used key, with an upload that is not there, or one too many."""
        mine = [name for name, one in self.model.uploads.items() if one.owner == owner] or self.make_uploads(owner, 1)
        foreign = [name for name, one in self.model.uploads.items() if one.owner != owner]
        batch_id = self.new_id("b")
        chosen = [data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=2)) for _ in models]
        if trouble == "missing":
            chosen[-1] = ["u-none"]
        if trouble == "foreign" and foreign:
            chosen[-1] = [data.draw(st.sampled_from(foreign))]
        batch = self.kit.batch(batch_id, models, owner=owner, priority=priority)
        batch = self.kit.with_uploads(batch, chosen)
        max_open = 0 if trouble == "full" else MAX_OPEN
        idempotency = (key, body, f"answer of {batch_id}") if key else None
        self.submissions.append((batch, max_open, idempotency))
        self.submit(batch, max_open, idempotency)

    @precondition(lambda self: self.submissions)
    @rule(data=st.data())
    def submission_is_repeated(self, data: st.DataObject) -> None:
        """The reply to a submission was lost, so the API sends it again, word for word."""
        batch, max_open, idempotency = data.draw(st.sampled_from(self.submissions[-3:]))
        # Once its records have gone, a batch's id is not used again.
        if batch.id in self.model.batches:
            self.submit(batch, max_open, idempotency)

    @precondition(lambda self: any(job.status == "queued" for job in self.model.jobs.values()))
    @rule(
        worker=st.sampled_from(WORKERS),
        models=st.lists(st.sampled_from(MODELS), min_size=1, unique=True),
        num_held=st.sampled_from((0, 0, 1)),
    )
    def worker_claims(self, worker: str, models: list[str], num_held: int) -> None:
        """A worker asks for the best job of the models it serves."""
        self.claim(worker, models, num_held, self.new_id("token"))

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 4), on_device=st.booleans())
    def worker_fills_its_hands(self, worker: str, count: int, on_device: bool) -> None:
        """A worker that serves all models claims a few jobs, and puts the last on its device."""
        for num_held in range(count):
            self.claim(worker, list(MODELS), num_held, self.new_id("token"))
        if on_device and self.hands:
            self.start(self.hands[-1], on_device=True)

    @precondition(lambda self: self.last_claims)
    @rule(data=st.data())
    def claim_is_repeated(self, data: st.DataObject) -> None:
        """The reply to a worker's latest claim was lost, so it claims again with the same token."""
        worker = data.draw(st.sampled_from(sorted(self.last_claims)))
        token, models = self.last_claims[worker]
        self.claim(worker, models, 0, token)

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), other=st.sampled_from(WORKERS), taken=st.booleans())
    def claim_is_repeated_too_late(self, worker: str, other: str, taken: bool) -> None:
        """The reply to a claim was lost, and the job is queued again or another's before it is repeated."""
        token = self.new_id("token")
        self.claim(worker, list(MODELS), 0, token)
        self.retry(self.hands[-1], 0, counts=False)
        if taken and other != worker:
            self.claim(other, list(MODELS), 0, self.new_id("token"))
        self.claim(worker, list(MODELS), 0, token)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), on_device=st.booleans())
    def job_starts(self, data: st.DataObject, on_device: bool) -> None:
        """A job goes on the device, or leaves it."""
        self.start(data.draw(st.sampled_from(self.live_hands())), on_device=on_device)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), step=st.one_of(st.none(), st.integers(0, 9)))
    def leases_are_renewed(self, data: st.DataObject, step: int | None) -> None:
        """A worker renews what it believes to hold."""
        self.renew(data.draw(st.lists(st.sampled_from(self.hands), max_size=1)) + self.live_hands(), step)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), times=st.integers(1, 2))
    def result_is_committed(self, data: st.DataObject, times: int) -> None:
        """A worker hands in its result, perhaps twice, because a reply was lost."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(times):
            self.commit(hand)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), times=st.integers(1, 2))
    def job_fails(self, data: st.DataObject, times: int) -> None:
        """A worker gives a job up, perhaps twice, because a reply was lost."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(times):
            self.fail(hand)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), delay_seconds=st.sampled_from((0, DELAY_SECONDS)), counts=st.booleans())
    def job_is_given_back(self, data: st.DataObject, delay_seconds: int, counts: bool) -> None:
        """A worker wants another try, for an error of the job's or for nobody's."""
        self.retry(data.draw(st.sampled_from(self.live_hands())), delay_seconds, counts=counts)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def late_worker_comes_back(self, data: st.DataObject) -> None:
        """A worker that slept uses whatever hand it had, in whatever way."""
        hand = data.draw(st.sampled_from(self.hands))
        self.act(data.draw(st.sampled_from(("start", "renew", "commit", "fail", "retry"))), hand)

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data(), owner=st.sampled_from(("", "", "", "", "ana")))
    def jobs_are_cancelled(self, data: st.DataObject, owner: str) -> None:
        """Somebody cancels jobs, own and foreign, in any state."""
        ids = [*self.model.jobs, "j-none"]
        chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=2))
        self.check("cancel", self.kit.run(self.kit.api.cancel(owner, chosen)), self.model.cancel(owner, chosen))

    @precondition(lambda self: self.live_hands())
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        ends=st.sampled_from((None, "commit", "fail")),
        act=st.sampled_from(("start", "renew", "commit", "fail", "retry")),
    )
    def job_changes_hands(self, data: st.DataObject, worker: str, ends: str | None, act: str) -> None:
        """A worker sleeps so long that another gets its job and perhaps ends it; then the first wakes up."""
        late = data.draw(st.sampled_from(self.live_hands()))
        self.sweeps_go_on_for_a_lease()
        if new := self.claim_again(late[0], worker):
            if ends:
                self.act(ends, new)
            self.act(act, late)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def job_runs_out_of_tries(self, data: st.DataObject, worker: str) -> None:
        """A job spends all its errors, and its user asks for another round, which begins with none spent."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(MAX_ERRORS):
            self.retry(hand, 0, counts=True)
            if not (again := self.claim_again(hand[0], worker)):
                break
            hand = again
        job = self.model.jobs[hand[0]]
        answer = self.kit.run(self.kit.api.reopen("", job.batch.id, [job.id]))
        assert answer == self.model.reopen("", job.batch.id, [job.id])

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), act=st.sampled_from(("renew", "commit", "fail", "retry", "die")))
    def running_job_is_cancelled(self, data: st.DataObject, act: str) -> None:
        """A user cancels a running job, and its worker learns of it in one way or another, or dies before."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        self.check("cancel", self.kit.run(self.kit.api.cancel("", [hand[0]])), self.model.cancel("", [hand[0]]))
        if act == "die":
            self.sweeps_go_on_for_a_lease()
        else:
            self.act(act, hand)

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data(), foreign=st.sampled_from((None, None, None, None, "ana")))
    def batch_is_reopened(self, data: st.DataObject, foreign: str | None) -> None:
        """A user asks for another round of a batch, naming all of its jobs and some of others."""
        batches = self.model.batches.values()
        wanted = [batch.id for batch in batches if batch.count("failed") + batch.count("cancelled")]
        batch = self.model.batches[data.draw(st.sampled_from(wanted or sorted(self.model.batches)))]
        owner = batch.owner if foreign is None else foreign
        ids = [job.id for job in batch.jobs] + data.draw(st.lists(st.sampled_from(sorted(self.model.jobs)), max_size=2))
        answer = self.kit.run(self.kit.api.reopen(owner, batch.id, ids))
        assert answer == self.model.reopen(owner, batch.id, ids)
        self.reached["reopen jobs" if answer else "reopen none"] += 1

    @rule(models=st.sampled_from((MODELS, MODELS, MODELS[:1])))
    def ledger_is_swept(self, models: tuple[str, ...]) -> None:
        """An API process sweeps."""
        self.sweep(list(models))

    @rule(steps=st.sampled_from((1, 1, 2, 3, 7, 13)))
    def time_passes(self, steps: int) -> None:
        """Nothing happens for a while."""
        self.pass_time(steps * STEP_SECONDS)

    @precondition(lambda self: self.model.jobs)
    @rule()
    def sweeps_go_on_for_a_lease(self) -> None:
        """Sweeps come in time for longer than a lease, so every lease that is not renewed is taken back."""
        for _ in range(LEASE_SECONDS // STEP_SECONDS + 2):
            self.sweep(list(MODELS))
            self.pass_time(STEP_SECONDS)
        self.sweep(list(MODELS))

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), on_device=st.sampled_from((True, True, False)), deaths=st.integers(1, 4))
    def workers_die_of_a_job(self, worker: str, on_device: bool, deaths: int) -> None:
        """A job is claimed, and its worker dies, as often as that job is next."""
        job_id = None
        for _ in range(deaths):
            self.claim(worker, list(MODELS), 1, self.new_id("token"))
            self.claim(worker, list(MODELS), 0, self.new_id("token"))
            taken = self.live_hands()[-1:]
            if not taken or job_id not in {None, taken[0][0]}:
                return
            job_id = taken[0][0]
            self.start(taken[0], on_device=on_device)
            self.sweeps_go_on_for_a_lease()

    @rule(model=st.sampled_from(MODELS))
    def bells_are_lost(self, model: str) -> None:
        """A worker answers all bells of a model, or a queue is flushed."""
        queue = f"dramatiq:{queue_name(self.kit.prefix, model)}"
        self.kit.client.delete(queue, f"{queue}.msgs")
        del self.model.bells[model]

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data())
    def batch_is_read(self, data: st.DataObject) -> None:
        """What clients read is what the model says, each job's place in its owner's line included."""
        expected = self.model.batches[data.draw(st.sampled_from(sorted(self.model.batches)))]
        batch = self.kit.read(expected.id)
        assert (batch.status.value, batch.round) == (expected.status, expected.round)
        assert batch.counts == {status.value: expected.count(status) for status in JobStatus} | {
            "total": len(expected.jobs)
        }
        for job, twin in zip(batch.jobs, expected.jobs, strict=True):
            line = self.model.ready(expected.owner, twin.model, expected.priority)
            place = line.index(twin) + 1 if twin.is_ready else None
            assert (job.id, job.status.value, job.queue_position) == (twin.id, twin.status, place)
            assert (job.error and job.error.code, job.step) == (twin.error, twin.step)
            assert (job.output is not None) == (twin.status == "succeeded")
            assert job == self.kit.job(job.id)

    @invariant()
    def redis_holds_what_was_promised(self) -> None:
        """Every key, and nothing but those, with exactly the promised content."""
        dump: Any = self.dump(args=[self.kit.prefix])
        assert observed_keys(self.kit.prefix, json.loads(dump)) == expected_keys(self.model)

    @invariant()
    def history_is_sane(self) -> None:
        """No two hands hold one job, nothing is committed twice, a batch finishes at most once a round."""
        live = self.live_hands()
        assert len({job_id for job_id, _ in live}) == len(live)
        for batch in self.model.batches.values():
            told = Counter((kind, data.get("job_id"), data.get("round")) for kind, data in batch.told)
            assert all(
                count == 1 for (kind, _, _), count in told.items() if kind in {"job.succeeded", "batch.finished"}
            )
            assert told["batch.finished", None, batch.round] == (batch.status == "finished")

    # The end.

    def teardown(self) -> None:
        """Everything ends and expires, and no key is left."""
        try:
            # A life that has already shown a mistake need not end well too.
            if sys.exception() is None:
                self.everything_ends()
        finally:
            self.kit.close()

    def everything_ends(self) -> None:
        """End every job, let every record expire, answer every bell."""
        for hand in self.live_hands():
            self.commit(hand)
        queued = [job.id for job in self.model.jobs.values() if job.status == "queued"]
        self.check("cancel", self.kit.run(self.kit.api.cancel("", queued)), self.model.cancel("", queued))
        self.redis_holds_what_was_promised()
        assert all(batch.status == "finished" for batch in self.model.batches.values())
        self.pass_time(RECORDS_SECONDS)
        while self.model.batches:
            self.sweep([])
        self.redis_holds_what_was_promised()
        self.pass_time(STREAM_SECONDS)
        self.answer_bells()
        self.redis_holds_what_was_promised()
        assert self.kit.client.keys(f"*{self.kit.prefix}*") == [f"{self.kit.prefix}:schema"]

    def answer_bells(self) -> None:
        """Answer every bell as Dramatiq does."""
        broker = create_broker(self.kit.raw_client)
        for model in MODELS:
            queue = queue_name(self.kit.prefix, model)
            broker.declare_queue(queue)
            consumer = broker.consume(queue, prefetch=100, timeout=10)
            for _ in range(self.model.bells.pop(model, 0)):
                message: Any = next(consumer)
                assert message.args == (model,)
                consumer.ack(message)
            consumer.close()


# What happens many times in every run; the rest depends on the draw.
MUST_BE_REACHED = {
    *("submit accepted", "claim job", "claim None", "start ok", "commit ok", "fail ok", "retry ok"),
    *("cancel cancelled", "sweep requeued", "sweep forgotten"),
}


@pytest.mark.timeout(60 + EXAMPLES * 2)
def test_the_ledger_keeps_its_promises(new_ledger: Any) -> None:
    """Whatever is called in whatever order, every script does what the model says, and nothing is left at the end."""
    reached: Counter[str] = Counter()
    run_state_machine_as_test(
        cast("Any", lambda: LedgerMachine(new_ledger, reached)),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=cast("Any", list(HealthCheck)),
            print_blob=True,
        ),
    )
    # Lives in which little happens would prove little.
    assert EXAMPLES < 140 or reached.keys() >= MUST_BE_REACHED, sorted(reached.items())
