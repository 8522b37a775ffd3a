"""The model written down as the keys that must be in Redis, and what is in Redis in the same form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.jobs import JobStatus
from server.ledger.api_side import Idempotency
from tests.integration.ledger.kit import HOOK_URL, RETENTION
from tests.integration.ledger.model import LedgerModel
from tests.integration.ledger.model_moves import SWEPT_SECONDS
from tests.integration.ledger.model_records import ModelBatch, ModelJob, ModelUpload
from tests.integration.ledger.model_workers import SPEED_SECONDS

# Everything under a prefix, and Redis' time. A stream that all batches share is told by its length and last entry.
DUMP = """
local readers = {
  hash = function(key) return redis.call("HGETALL", key) end,
  zset = function(key) return redis.call("ZRANGE", key, 0, -1, "WITHSCORES") end,
  set = function(key) return redis.call("SMEMBERS", key) end,
  list = function(key) return redis.call("LRANGE", key, 0, -1) end,
  string = function(key) return redis.call("GET", key) end,
  stream = function(key)
    if key:match(":events$") then return redis.call("XRANGE", key, "-", "+") end
    return { redis.call("XLEN", key), redis.call("XREVRANGE", key, "+", "-", "COUNT", 1)[1][2] }
  end,
}
local keys = {}
for _, key in ipairs(redis.call("KEYS", "*" .. ARGV[1] .. "*")) do
  keys[#keys + 1] = { key, redis.call("PTTL", key), readers[redis.call("TYPE", key).ok](key) }
end
return cjson.encode({ redis.call("TIME"), keys })
"""

# What is overdue in some sets; it is put into the order that is told, so that the next call meets it so. In Redis the
# order is that of milliseconds, and two calls may fall into one.
ARRANGE = """
local clock, overdue = redis.call("TIME"), {}
for i = 2, #ARGV, 2 do
  local key = ARGV[1] .. ":" .. ARGV[i]
  overdue[#overdue + 1] = redis.call("ZRANGEBYSCORE", key, "-inf", clock[1] * 1000 + math.floor(clock[2] / 1000))
  for place, member in ipairs(cjson.decode(ARGV[i + 1])) do redis.call("ZADD", key, "XX", place, member) end
end
return overdue
"""

# Of these only that they are there is compared: texts that no script looks at, and readings of the clock.
SOME = "some"
_NEW_JOB = dict.fromkeys(("request", "created_at", "queued_at", "order"), SOME)
_NEW_BATCH = dict.fromkeys(("metadata", "created_at", "order"), SOME)
_TIMED = {"leases", "delayed", "forget", "inputs_due", "outputs_due", "unused", "trash", "webhooks", "holders"}
_ORDERED = {"turns", "ready", "shelf"}


@dataclass(eq=False)
class Span:
    """Some seconds. All that are promised differ by 30 s or more, so what the test itself takes does not count."""

    seconds: float

    def __eq__(self, other: object) -> bool:
        """Compare with another one."""
        return isinstance(other, Span) and abs(self.seconds - other.seconds) < 25

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def left(seconds: float) -> Span:
    """Give the time until a deadline; what is overdue is so by no matter how much."""
    return Span(max(0, seconds))


def expected_keys(model: LedgerModel) -> dict[str, Any]:
    """Write the model down: every key that must be there, and no others, with what it must hold."""
    keys: dict[str, Any] = {"schema": "2", "unused": {}, "open": {job.id for job in model.jobs.values() if job.is_open}}
    for job in model.jobs.values():
        if job.is_open:
            keys.setdefault(f"open:{job.batch.owner}", set()).add(job.id)
    for upload in model.uploads.values():
        keys[f"upload:{upload.id}"] = _upload(upload, model.now)
        if upload.unused_due is not None:
            keys["unused"][upload.id] = left(upload.unused_due - model.now)
    for (owner, sha256), upload_id in model.digests.items():
        keys[f"digest:{owner}:{sha256}"] = upload_id
    for batch in model.batches.values():
        keys[f"batch:{batch.id}"] = _batch(batch)
        keys[f"batch:{batch.id}:jobs"] = [job.id for job in batch.jobs]
        keys[f"batch:{batch.id}:events"] = batch.told
        keys[f"batch:{batch.id}:deliveries"] = batch.deliveries
    for job in model.jobs.values():
        keys[f"job:{job.id}"] = _job(job)
    keys |= _expected_deadlines(model) | _expected_lines(model) | _expected_shelves(model)
    keys |= _expected_passing(model) | _expected_placement(model)
    return {key: value for key, value in keys.items() if value}


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Write fields as Redis has them; None are those that are not there."""
    return {name: str(value) for name, value in fields.items() if value is not None}


def _upload(upload: ModelUpload, now: float) -> dict[str, Any]:
    fields = {
        "id": upload.id,
        "owner": upload.owner,
        "key": upload.key,
        "filename": SOME,
        "content_type": upload.content_type,
        "size_bytes": upload.size_bytes,
        "sha256": upload.sha256,
        "references": upload.references,
        "etag": upload.etag,
    }
    return _texts(fields) | {"form_until": left(upload.form_until - now), "keep_until": left(upload.keep_until - now)}


def _batch(batch: ModelBatch) -> dict[str, Any]:
    at_the_end = SOME if batch.status == "finished" else None
    fields = _NEW_BATCH | {
        "id": batch.id,
        "owner": batch.owner,
        "priority": batch.priority,
        "label": batch.label,
        "webhook_url": HOOK_URL if batch.hook else None,
        "inputs_ms": RETENTION.inputs_seconds * 1000,
        "outputs_ms": RETENTION.outputs_seconds * 1000,
        "records_ms": RETENTION.records_seconds * 1000,
        "orphans_ms": RETENTION.orphans_seconds * 1000,
        "status": batch.status,
        "round": batch.round,
        "total": len(batch.jobs),
        "started_at": SOME if batch.is_started else None,
        "finished_at": at_the_end,
        "expires_at": at_the_end,
        "inputs_released": int(batch.inputs_released) or None,
    }
    fields |= {status.value: batch.count(status) for status in JobStatus}
    fields |= {f"webhook_since:{round_}": SOME for round_ in batch.finished_rounds}
    fields |= {f"webhook_attempts:{round_}": attempts for round_, attempts in batch.attempts.items()}
    return _texts(fields)


def _job(job: ModelJob) -> dict[str, Any]:
    has_begun = job.step is not None
    fields = _NEW_JOB | {
        "id": job.id,
        "batch_id": job.batch.id,
        "index": job.index,
        "owner": job.batch.owner,
        "model": job.model,
        "priority": job.batch.priority,
        "status": job.status,
        "attempts": job.attempts,
        "fence": job.fence,
        "errors": job.errors,
        "deaths": job.deaths,
        "device_deaths": job.device_deaths,
        "suspect": int(job.suspect),
        "on_device": int(job.on_device),
        "cancel": int(job.cancel),
        "worker": job.worker,
        "step": job.step,
        "total_steps": 9 if has_begun else None,
        "error_code": job.error and job.error[0],
        "error_detail": job.error and job.error[1],
        "timings": SOME if job.has_timings else None,
        "started_at": SOME if job.attempts else None,
        "finished_at": None if job.is_open else SOME,
    }
    parts = {"inputs": job.upload_ids, "params": job.params}
    return _texts(fields) | parts | ({"output": job.output} if job.output else {})


def _expected_deadlines(model: LedgerModel) -> dict[str, Any]:
    jobs, batches, now = model.jobs.values(), model.batches.values(), model.now
    dues: dict[str, dict[str, float | None]] = {
        "leases": {job.id: job.lease_until for job in jobs},
        "delayed": {job.id: job.due_at for job in jobs},
        "inputs_due": {batch.id: batch.inputs_due for batch in batches},
        "outputs_due": {batch.id: batch.outputs_due for batch in batches},
        "forget": {batch.id: batch.forget_at for batch in batches},
        "webhooks": {f"{batch.id}:{number}": due for batch in batches for number, due in batch.webhooks.items()},
        "trash": dict(model.trash),
    }
    return {
        name: {member: left(due - now) for member, due in members.items() if due is not None}
        for name, members in dues.items()
    }


def _expected_lines(model: LedgerModel) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for (name, priority), line in model.lines.items():
        keys[f"turns:{name}:{priority}"] = sorted(line, key=lambda owner, line=line: line[owner])
        for owner in line:
            keys[f"ready:{name}:{priority}:{owner}"] = [job.id for job in model.ready(owner, name, priority)]
    for name, count in model.bells.items():
        keys[f"bells:{name}"] = keys[f"messages:{name}"] = count
    return keys


def _expected_shelves(model: LedgerModel) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for batch in sorted(model.batches.values(), key=lambda batch: batch.order):
        for shelf in batch.shelves:
            for scope in (batch.owner, "*"):
                keys.setdefault(f"shelf:{scope}:{shelf}", []).append(batch.id)
    return keys


def _expected_passing(model: LedgerModel) -> dict[str, Any]:
    """What lives for a time only, each with what is left of it."""
    now, keys = model.now, dict[str, Any]()
    for (owner, key), first in model.remembered.items():
        idempotency = Idempotency(key=key, body_sha256=first.body, answer=first.answer, ttl_seconds=0)
        fields = {"batch_id": first.batch_id, "body_sha256": first.body, "answer": first.answer}
        keys[f"idempotency:{owner}:{idempotency.key_sha256}"] = fields, first.until - now
    for worker, (token, job_id, until) in model.claims.items():
        keys[f"worker:{worker}:claim"] = {"token": token, "job_id": job_id}, until - now
    for worker, announced in model.workers.items():
        keys[f"worker:{worker}"] = announced.models, announced.until - now
        keys["workers"] = set(model.workers), max(one.until for one in model.workers.values()) - now
    for name, (speeds, until) in model.speeds.items():
        keys[f"speed:{name}"] = speeds, until - now
    for token, (reply, until) in model.replies.items():
        keys[f"reply:{token}"] = reply, until - now
    if model.asked_models:
        keys["models"] = model.asked_models, model.asked_until - now
    if model.changes:
        keys["changes"] = [len(model.changes), ["batch_id", model.changes[-1]]], model.changes_until - now
    if model.control:
        keys["control"] = [len(model.control), model.control[-1]], model.control_until - now
    if model.swept_at is not None:
        fields = {"at": Span(now - model.swept_at), "grace_until": left(model.grace_until - now)}
        keys["swept"] = fields, model.swept_at + SWEPT_SECONDS - now
    return {key: (content, Span(seconds)) for key, (content, seconds) in keys.items()}


def _expected_placement(model: LedgerModel) -> dict[str, Any]:
    """Who holds which model, and how often that was changed."""
    keys: dict[str, Any] = {}
    for name, holders in model.holders.items():
        due = {worker: left(until - model.now) for worker, until in holders.items()}
        keys[f"holders:{name}"] = due, left(max(holders.values()) - model.now)
    for name, at in model.served_at.items():
        keys[f"served:{name}"] = Span(model.now - at), left(at + SPEED_SECONDS - model.now)
    if model.num_placed:
        keys["placement"] = str(model.num_placed), left(model.placed_until - model.now)
    return keys


def observed_keys(prefix: str, dump: str) -> dict[str, Any]:
    """Read every key of the ledger into the form of `expected_keys`."""
    (seconds, micros), found = json.loads(dump)
    now = int(seconds) + int(micros) / 1e6
    keys: dict[str, Any] = {}
    for full_name, ttl_ms, value in found:
        if full_name.startswith("dramatiq:"):
            model = full_name.split(f"{prefix}.", 1)[1]
            if model.endswith(".msgs"):
                keys[f"messages:{model.removesuffix('.msgs')}"] = len(value) // 2
            else:
                keys[f"bells:{model}"] = len(value)
            continue
        key = full_name.removeprefix(f"{prefix}:")
        content = _observed(key, value, now)
        keys[key] = content if ttl_ms < 0 else (content, Span(ttl_ms / 1000))
    return keys


def _observed(key: str, value: Any, now: float) -> Any:
    kind, _, name = key.partition(":")
    content: Any = value
    if kind in _TIMED:
        content = {member: left(float(due) / 1000 - now) for member, due in _pairs(value).items()}
    elif kind in _ORDERED:
        content = value[::2]
    elif kind in {"open", "workers", "models"}:
        content = set(value)
    elif kind in {"reply", "served"}:
        content = json.loads(value) if kind == "reply" else Span(now - int(value) / 1000)
    elif key.endswith(":events"):
        content = [(one["type"], json.loads(one["data"])) for one in (_pairs(fields) for _, fields in value)]
    elif key.endswith(":deliveries"):
        content = [_delivery(json.loads(text)) for text in value]
    elif kind == "worker" and ":" not in name:
        content = {model: one["ready"] for model, one in json.loads(_pairs(value)["models"]).items()}
    elif kind in {"job", "batch", "upload", "swept"} and not key.endswith(":jobs"):
        content = _fields(kind, _pairs(value), now)
    elif kind in {"speed", "idempotency", "worker"}:
        content = _pairs(value)
    return content


def _pairs(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _delivery(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"at_ms": SOME if fields["at_ms"] > 0 else 0}


def _fields(kind: str, fields: dict[str, Any], now: float) -> dict[str, Any]:
    some = {
        "job": {*_NEW_JOB, "timings", "started_at", "finished_at"},
        "batch": {*_NEW_BATCH, "started_at", "finished_at", "expires_at"},
        "upload": {"filename"},
    }.get(kind, set())
    fields = {name: SOME if name in some or name.startswith("webhook_since:") else fields[name] for name in fields}
    if kind == "job":
        fields["inputs"] = [one["upload_id"] for one in json.loads(fields["inputs"])]
        fields["params"] = json.loads(fields["params"])
        if "output" in fields:
            fields["output"] = json.loads(fields["output"])["key"]
    for name in fields.keys() & {"form_until", "keep_until", "grace_until"}:
        fields[name] = left(int(fields[name]) / 1000 - now)
    if "at" in fields:
        fields["at"] = Span(now - int(fields["at"]) / 1000)
    return fields
