"""Between records and Redis hashes: every value is a string, nested ones are JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.jobs import (
    Batch,
    BatchStatus,
    Delivery,
    Job,
    JobError,
    JobInput,
    JobOutput,
    JobStatus,
    OutputSpec,
    Priority,
    Webhook,
)
from server.settings import RetentionSettings

# Made once: json.dumps would make one for each call, and a batch of 50 needs 250.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_COUNTED = ("total", "queued", "running", "succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class UploadRecord:
    """A photo that was announced. `references` counts the jobs of batches that still need it.

    `etag` is known once a batch has named the upload.
    """

    id: str
    owner: str
    key: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str | None = None
    references: int = 0
    etag: str | None = None


def dump(value: object) -> str:
    """Write `value` as JSON without spaces."""
    return _ENCODER.encode(value)


def job_fields(job: Job) -> dict[str, str]:
    """Return what SUBMIT stores of a new job; the script adds state, times and counters.

    What neither a script reads nor a run changes stands in one field: a batch of 50 is written and read faster so.
    """
    request = {
        "name": job.name,
        "metadata": job.metadata,
        "model_version": job.model_version,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "loras": job.loras,
        "output_spec": vars(job.output_spec),
    }
    return {
        "index": str(job.index),
        "model": job.model,
        "priority": job.priority.value,
        "request": dump(request),
        "params": dump(job.params),
        "inputs": dump([vars(one) for one in job.inputs]),
    }


def batch_fields(batch: Batch, retention: RetentionSettings) -> dict[str, str]:
    """Return what SUBMIT stores of a new batch; the script adds state, times and counts."""
    fields = {
        "priority": batch.priority.value,
        "metadata": dump(batch.metadata),
        "inputs_ms": _milliseconds(retention.inputs_seconds),
        "outputs_ms": _milliseconds(retention.outputs_seconds),
        "records_ms": _milliseconds(retention.records_seconds),
        "orphans_ms": _milliseconds(retention.orphans_seconds),
    }
    optional = {
        "label": batch.label,
        "key_id": batch.key_id,
        "webhook_url": None if batch.webhook is None else batch.webhook.url,
    }
    return fields | {name: value for name, value in optional.items() if value is not None}


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _int(fields: Mapping[str, str], name: str) -> int | None:
    return int(fields[name]) if fields.get(name) else None


def _error(fields: Mapping[str, str]) -> JobError | None:
    if "error_code" not in fields:
        return None
    return JobError(code=fields["error_code"], detail=fields.get("error_detail", ""))


def parse_job(fields: Mapping[str, str], queue_position: int | None = None) -> Job:
    """Build a job from its hash."""
    output: dict[str, Any] | None = json.loads(fields["output"]) if "output" in fields else None
    request: dict[str, Any] = json.loads(fields["request"])
    return Job(
        id=fields["id"],
        batch_id=fields["batch_id"],
        index=int(fields["index"]),
        owner=fields["owner"],
        name=request["name"],
        metadata=request["metadata"],
        model=fields["model"],
        model_version=request["model_version"],
        prompt=request["prompt"],
        negative_prompt=request["negative_prompt"],
        params=json.loads(fields["params"]),
        loras=tuple(request["loras"]),
        inputs=tuple(JobInput(**one) for one in json.loads(fields["inputs"])),
        output_spec=OutputSpec(**request["output_spec"]),
        weights_sha256=fields.get("weights_sha256"),
        optimizations=json.loads(fields.get("optimizations", "{}")),
        priority=Priority(fields["priority"]),
        status=JobStatus(fields["status"]),
        attempts=int(fields["attempts"]),
        fence=int(fields["fence"]),
        suspect=fields["suspect"] == "1",
        worker=fields.get("worker"),
        step=_int(fields, "step"),
        total_steps=_int(fields, "total_steps"),
        queue_position=queue_position,
        error=_error(fields),
        output=None if output is None else JobOutput(**output),
        created_at_ms=int(fields["created_at"]),
        queued_at_ms=int(fields["queued_at"]),
        started_at_ms=_int(fields, "started_at"),
        finished_at_ms=_int(fields, "finished_at"),
        timings=json.loads(fields.get("timings", "{}")),
    )


def parse_batch(fields: Mapping[str, str], jobs: tuple[Job, ...] = (), deliveries: Sequence[str] = ()) -> Batch:
    """Build a batch from its hash, its jobs in the order of the request, and the JSON of its webhook's deliveries."""
    url = fields.get("webhook_url")
    return Batch(
        id=fields["id"],
        owner=fields["owner"],
        priority=Priority(fields["priority"]),
        label=fields.get("label"),
        metadata=json.loads(fields["metadata"]),
        status=BatchStatus(fields["status"]),
        round=int(fields["round"]),
        counts={name: int(fields[name]) for name in _COUNTED},
        created_at_ms=int(fields["created_at"]),
        started_at_ms=_int(fields, "started_at"),
        finished_at_ms=_int(fields, "finished_at"),
        expires_at_ms=_int(fields, "expires_at"),
        webhook=None if url is None else Webhook(url, tuple(Delivery(**json.loads(one)) for one in deliveries)),
        key_id=fields.get("key_id"),
        jobs=jobs,
    )


def upload_fields(record: UploadRecord) -> dict[str, str]:
    """Return what ANNOUNCE_UPLOADS stores of an upload; the script adds owner, times and references."""
    fields = {
        "key": record.key,
        "filename": record.filename,
        "content_type": record.content_type,
        "size_bytes": str(record.size_bytes),
    }
    return fields if record.sha256 is None else fields | {"sha256": record.sha256}


def parse_upload(fields: Mapping[str, str]) -> UploadRecord:
    """Build an upload from its hash."""
    return UploadRecord(
        id=fields["id"],
        owner=fields["owner"],
        key=fields["key"],
        filename=fields["filename"],
        content_type=fields["content_type"],
        size_bytes=int(fields["size_bytes"]),
        sha256=fields.get("sha256"),
        references=int(fields["references"]),
        etag=fields.get("etag"),
    )
