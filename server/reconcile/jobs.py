"""From the ledger to the store: whether the photos and results that jobs name are there."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime

import anyio

from server.errors import ObjectNotFound
from server.jobs import Job, JobOutput, JobStatus
from server.marker import BadMarker, Marker, marker_key
from server.reconcile.comparison import Comparison
from server.reconcile.findings import Finding, Kind, Outcome

# A worker leaves its marker behind its commit.
_MARKER_GRACE_MS = 60_000


async def compare_jobs(comparison: Comparison) -> AsyncGenerator[Finding]:
    """Walk through all batches, oldest first, with as many calls of the store at once as it has threads."""
    position = ""
    while True:
        batch_ids, position = await comparison.ledger.batch_page(position)
        if not batch_ids:
            return
        jobs = await comparison.ledger.jobs_of(batch_ids)
        comparison.tally.num_jobs += len(jobs)
        found: list[Finding] = []
        try:
            async with anyio.create_task_group() as group:
                for job in jobs:
                    group.start_soon(_compare_job, comparison, job, found)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for finding in found:
            yield finding


async def _compare_job(comparison: Comparison, job: Job, found: list[Finding]) -> None:
    finding: Finding | None = None
    if job.status is JobStatus.QUEUED:
        finding = await _compare_photos(comparison, job)
    elif job.status is JobStatus.SUCCEEDED and job.output:
        finding = await _compare_result(comparison, job, job.output)
    if finding:
        found.append(finding)


async def _compare_photos(comparison: Comparison, job: Job) -> Finding | None:
    for photo in job.inputs:
        if await comparison.ask(comparison.store.inventory.has_upload, photo.key):
            continue
        if not comparison.is_dry and not await comparison.ledger.fail_without_photo(job, photo.upload_id):
            return None  # a worker has taken it meanwhile, and will find out itself
        return _about(job, "lost_photo", comparison.repair, f"fails as input_missing: photo {photo.key}", photo.key)
    return None


async def _compare_result(comparison: Comparison, job: Job, output: JobOutput) -> Finding | None:
    stored = await comparison.ask(comparison.store.inventory.outputs_of, job.id)
    result = stored.get(output.key)
    if result is None:
        if not await _is_still_its(comparison, job, output):
            return None
        return _about(job, "lost_result", "left", "put it back from a copy of the bucket, or submit the photo again")
    if result.size_bytes != output.size_bytes:
        detail = f"it has {result.size_bytes} bytes; {output.size_bytes} were written"
        return _about(job, "changed_result", "left", detail, output.key)
    if comparison.reads_bytes and not await _has_its_bytes(comparison, output):
        return _about(job, "changed_result", "left", "its sha256 is not the one that was written", output.key)
    if marker_key(job.id) not in stored:
        return await _write_marker(comparison, job, output)
    return None


async def _has_its_bytes(comparison: Comparison, output: JobOutput) -> bool:
    try:
        return await comparison.ask(comparison.store.inventory.output_sha256, output.key) == output.sha256
    except ObjectNotFound:  # it was there a moment ago: its time was over
        return True


async def _write_marker(comparison: Comparison, job: Job, output: JobOutput) -> Finding | None:
    now_ms = datetime.now(UTC).timestamp() * 1000
    if job.finished_at_ms is None or now_ms - job.finished_at_ms < _MARKER_GRACE_MS:
        return None
    try:
        marker = Marker.of(
            job,
            finished_at_ms=job.finished_at_ms,
            output=output,
            inputs=job.inputs,
            params=job.params,
            timings=job.timings,
            weights_sha256=job.weights_sha256,
            optimizations=job.optimizations,
        ).encode()
    except BadMarker as error:
        return _about(job, "missing_marker", "left", f"a marker cannot say it: {error}")
    if not comparison.is_dry:
        await comparison.ask(comparison.store.put_marker, marker_key(job.id), marker)
        # Whoever took the result away meanwhile has named the marker to the trash, perhaps before it was there.
        if not await _is_still_its(comparison, job, output):
            await comparison.ask(comparison.store.delete_output, marker_key(job.id))
            return None
    return _about(job, "missing_marker", comparison.repair, "its marker is written")


async def _is_still_its(comparison: Comparison, job: Job, output: JobOutput) -> bool:
    state = (await comparison.ledger.job_states([job.id])).get(job.id)
    return state is not None and state.output_key == output.key


def _about(job: Job, kind: Kind, outcome: Outcome, detail: str, key: str | None = None) -> Finding:
    key = key or (job.output.key if job.output else None)
    return Finding(kind, outcome, detail, key=key, job_id=job.id, batch_id=job.batch_id, owner=job.owner)
