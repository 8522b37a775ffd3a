"""`/v1/batches/{id}/archive`: all results of a batch as one zip, written while it is sent."""

import hashlib
import io
import json
import zipfile
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
import structlog
from litestar import Request, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath
from litestar.response import Stream

from server.api.batches import find_batch
from server.api.errors import problems
from server.api.jobs import OutputExpired
from server.api.outputs import download_name
from server.api.request_context import opened_files
from server.api.services import Services
from server.api.views import record_of_batch
from server.errors import ObjectNotFound, ServerError, StoreUnavailable
from server.jobs import Batch, Job, JobOutput, JobStatus
from server.keys import Principal

_log = structlog.stdlib.get_logger()
_MANIFEST = "manifest.json"
_PIECE_BYTES = 256 * 1024


@get(
    "/batches/{batch_id:str}/archive",
    media_type="application/zip",
    tags=["Batches"],
    summary="Download all results",
    responses={
        200: ResponseSpec(bytes, description="A zip file", media_type="application/zip", generate_examples=False),
        **problems(404, 410),
    },
)
async def download_archive(
    batch_id: FromPath[str],
    request: Request[Any, Any, Any],
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
) -> Stream:
    """Answer a zip of the results that there are by now, as `001-<name>.<ext>` and so on, and `manifest.json`.

    The manifest is the batch without URLs; `file` of each output names its entry. An archive that breaks off has no end
    and does not open: better none than one that lacks a picture unnoticed.
    """
    services.streams.take_for_archive(opened_files(request.scope))
    batch = await find_batch(services, principal, batch_id)
    ready = [(job, job.output) for job in batch.jobs if job.output]
    if not ready and any(job.status == JobStatus.SUCCEEDED for job in batch.jobs):
        raise OutputExpired(f"the results of batch {batch_id} were removed after their time")
    chunks = _write_archive(services, batch, ready)
    # Before the answer begins, a store that is away can still be told as an error.
    first = await anext(chunks)
    return Stream(
        _chain(first, chunks),
        media_type="application/zip",
        headers={
            "Content-Disposition": f'attachment; filename="restage-{batch_id}.zip"',
            # A proxy that collects the answer would keep all of it, and hand it over when it is whole.
            "X-Accel-Buffering": "no",
        },
    )


async def _chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    try:
        async for chunk in rest:
            yield chunk
    except ServerError as error:  # the connection ends without the end of the body, which clients notice
        _log.warning("archive.broken_off", error=error.detail)
        raise


async def _write_archive(services: Services, batch: Batch, ready: list[tuple[Job, JobOutput]]) -> AsyncGenerator[bytes]:
    """Yield the archive; one result is in memory at a time."""
    sink = _Sink()
    # Pictures do not get smaller.
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for job, output in ready:
            data = await anyio.to_thread.run_sync(_read_output, services, output, limiter=services.store_threads)
            archive.writestr(_entry(download_name(job, output), batch), data)
            del data
            for piece in sink.take():
                yield piece
        archive.writestr(_entry(_MANIFEST, batch), json.dumps(_manifest(batch), indent=2, ensure_ascii=False))
    for piece in sink.take():
        yield piece


def _read_output(services: Services, output: JobOutput) -> bytes:
    try:
        data = services.store.read_output(output.key, size_bytes=output.size_bytes)
    except ObjectNotFound as error:
        raise OutputExpired(f"the result {output.key} is not in the store any more") from error
    if hashlib.sha256(data).hexdigest() != output.sha256:
        raise StoreUnavailable(f"the store gave other bytes for {output.key} than the worker wrote")
    return data


def _entry(name: str, batch: Batch) -> zipfile.ZipInfo:
    finished_at = datetime.fromtimestamp((batch.finished_at_ms or batch.created_at_ms) / 1000, UTC)
    entry = zipfile.ZipInfo(name, finished_at.timetuple()[:6])
    entry.external_attr = 0o644 << 16  # else unpacked without any right to read
    return entry


def _manifest(batch: Batch) -> dict[str, Any]:
    record = record_of_batch(batch)
    for job, shown in zip(batch.jobs, record["jobs"], strict=True):
        if job.output:
            shown["output"]["file"] = download_name(job, job.output)
    return record


class _Sink(io.RawIOBase):
    """Takes what `zipfile` writes; it may go back within what was not taken yet.

    So the header of each entry tells its size: entries that tell it behind their data only, some unpackers refuse.
    """

    def __init__(self) -> None:
        self._num_taken = 0
        self._waiting = io.BytesIO()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_taken + self._waiting.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._num_taken + self._waiting.seek(offset - self._num_taken, whence)

    def write(self, data: Any, /) -> int:
        return self._waiting.write(data)

    def take(self) -> Iterator[bytes]:
        """Yield what was written since the last call, in pieces: on their way out there are buffers for each."""
        data, self._waiting = self._waiting.getvalue(), io.BytesIO()
        self._num_taken += len(data)
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]
