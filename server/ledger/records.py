"""Between records and Redis hashes: every value is a string, nested ones are JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from server.jobs import (
    Batch,
    BatchStatus,
    Job,
    JobError,
    JobInput,
    JobOutput,
    JobStatus,
    OutputSpec,
    Priority,
)

_COUNTED = ("total", "queued", "running", "succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class UploadRecord:
    """A form that was handed out. `references` counts the jobs whose record still names the upload."""

    id: str
    owner: str
    key: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str | None = None
    references: int = 0


def dump(value: object) -> str:
    """Write `value` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def job_fields(job: Job) -> dict[str, str]:
    """Return what SUBMIT stores of a new job; the script adds state, times and counters."""
    fields = {
        "index": str(job.index),
        "model": job.model,
        "model_version": job.model_version,
        "prompt": job.prompt,
        "metadata": dump(job.metadata),
        "params": dump(job.params),
        "loras": dump(job.loras),
        "output_spec": dump(asdict(job.output_spec)),
        "priority": job.priority.value,
        "inputs": dump([asdict(one) for one in job.inputs]),
    }
    optional = {"name": job.name, "negative_prompt": job.negative_prompt}
    return fields | {name: value for name, value in optional.items() if value is not None}


def batch_fields(batch: Batch, records_ttl_seconds: int) -> dict[str, str]:
    """Return what SUBMIT stores of a new batch; the script adds state, times and counts."""
    fields = {
        "priority": batch.priority.value,
        "metadata": dump(batch.metadata),
        "records_ms": str(records_ttl_seconds * 1000),
    }
    return fields if batch.label is None else fields | {"label": batch.label}


def _int(fields: Mapping[str, str], name: str) -> int | None:
    return int(fields[name]) if fields.get(name) else None


def _error(fields: Mapping[str, str]) -> JobError | None:
    if "error_code" not in fields:
        return None
    return JobError(code=fields["error_code"], detail=fields.get("error_detail", ""))


def parse_job(fields: Mapping[str, str], queue_position: int | None = None) -> Job:
    """Build a job from its hash."""
    output: dict[str, Any] | None = json.loads(fields["output"]) if "output" in fields else None
    return Job(
        id=fields["id"],
        batch_id=fields["batch_id"],
        index=int(fields["index"]),
        owner=fields["owner"],
        name=fields.get("name"),
        metadata=json.loads(fields["metadata"]),
        model=fields["model"],
        model_version=fields["model_version"],
        prompt=fields["prompt"],
        negative_prompt=fields.get("negative_prompt"),
        params=json.loads(fields["params"]),
        loras=tuple(json.loads(fields["loras"])),
        inputs=tuple(JobInput(**one) for one in json.loads(fields["inputs"])),
        output_spec=OutputSpec(**json.loads(fields["output_spec"])),
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


def parse_batch(fields: Mapping[str, str], jobs: tuple[Job, ...]) -> Batch:
    """Build a batch from its hash and its jobs, which are in the order of the request."""
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
        jobs=jobs,
    )


def upload_fields(record: UploadRecord) -> dict[str, str]:
    """Return the hash of an upload that was announced and may never come."""
    fields = {
        "id": record.id,
        "owner": record.owner,
        "key": record.key,
        "filename": record.filename,
        "content_type": record.content_type,
        "size_bytes": str(record.size_bytes),
        "references": "0",
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
    )
