"""From the files of a form to uploads, which then go the way of those that were sent to the store directly."""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import anyio
import anyio.to_thread

from server.errors import FieldError, InvalidRequest, RequestError
from server.images import PhotoHeader
from server.ledger.api_side import ApiLedger
from server.ledger.records import UploadRecord
from server.settings import Settings
from server.store import Store
from server.submit.look import MORE_BYTES, check_file_size, check_photo_size, read_last_header
from server.submit.request import BatchRequest

_PARALLEL_PUTS = 4
_MAX_REPORTED_ERRORS = 50


@dataclass(frozen=True)
class ReceivedFile:
    """A file of a form, on disk; whoever received it closes it.

    Attributes:
        part: the name of the part, by which items refer to it.
        filename: what its sender calls it, without folders; None where nothing of it can be used.
        file: at its start; of a file over `limits.max_upload_bytes` so many bytes only.
        size_bytes: of all that was sent.
        sha256: of `file`.
    """

    part: str
    filename: str | None
    file: BinaryIO
    size_bytes: int
    sha256: str


def check_files(request: BatchRequest, parts: Collection[str] | None) -> None:
    """Compare the files that items name with those that were sent.

    Args:
        request: of one batch.
        parts: names of the form's files; None where the request is no form.

    Raises:
        InvalidRequest: an item names a file that there is not, or no item names one that there is.
    """
    named = {index: item.file for index, item in enumerate(request.items) if item.file is not None}
    if parts is None:
        detail = (
            "names a part of a form, and this request is none; send it as multipart/form-data, or send the photo "
            "with POST /v1/uploads and name its upload_id"
        )
        mistakes = [FieldError(f"/items/{index}/file", "invalid_value", detail) for index in named]
    else:
        mistakes = [
            FieldError(f"/items/{index}/file", "invalid_value", f"the form has no file in a part {name!a}")
            for index, name in named.items()
            if name not in parts
        ]
        unused = set(parts).difference(named.values())
        mistakes += [FieldError("", "invalid_value", f"no item names the part {part!a}") for part in sorted(unused)]
    if mistakes:
        first = f"{mistakes[0].location or 'the form'}: {mistakes[0].detail}"
        more = f" (and {len(mistakes) - 1} more; see errors)" if len(mistakes) > 1 else ""
        raise InvalidRequest(f"{first}{more}", tuple(mistakes[:_MAX_REPORTED_ERRORS]))


class FileUploads:
    """Stores files as uploads; its threads are those of all calls to the store."""

    def __init__(self, store: Store, ledger: ApiLedger, settings: Settings, *, threads: anyio.CapacityLimiter) -> None:
        self._store = store
        self._ledger = ledger
        self._limits = settings.limits
        self._offer_seconds = settings.retention.records_seconds
        self._threads = threads

    async def store(self, owner: str, files: Sequence[ReceivedFile]) -> dict[str, str | RequestError]:
        """Store the files that are photos, each of them once.

        Returns:
            For each part the id of its upload, or why it cannot be one.

        Raises:
            DependencyError: Redis or the store is away. What was stored already expires like any unused upload.
        """
        uploads: dict[str, str | RequestError] = {}
        photos: dict[str, tuple[ReceivedFile, PhotoHeader]] = {}
        for file in files:
            try:
                photos[file.sha256] = file, await anyio.to_thread.run_sync(self._inspect, file)
            except RequestError as error:
                uploads[file.part] = error
        records = [_record(owner, file, header) for file, header in photos.values()]
        ids = await self._announce(records)
        new = [
            (record, file)
            for record, (file, _), upload_id in zip(records, photos.values(), ids, strict=True)
            if upload_id == record.id
        ]
        await self._put(new)
        stored = dict(zip(photos, ids, strict=True))
        return uploads | {file.part: stored[file.sha256] for file in files if file.part not in uploads}

    async def _announce(self, records: Sequence[UploadRecord]) -> list[str]:
        """Before anything is sent: what the ledger does not know, nobody would ever delete."""
        return await self._ledger.announce_uploads(
            records,
            form_ttl_seconds=0,
            unused_ttl_seconds=self._limits.unused_upload_ttl_seconds,
            offer_seconds=self._offer_seconds,
        )

    async def _put(self, photos: Sequence[tuple[UploadRecord, ReceivedFile]]) -> None:
        at_once = anyio.CapacityLimiter(_PARALLEL_PUTS)

        async def put(record: UploadRecord, file: ReceivedFile) -> None:
            async with at_once:
                await anyio.to_thread.run_sync(self._put_one, record, file, limiter=self._threads)

        try:
            # anyio's group waits for the threads, asyncio's does not: they read from files that the request closes.
            async with anyio.create_task_group() as group:
                for record, file in photos:
                    group.start_soon(put, record, file)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _put_one(self, record: UploadRecord, file: ReceivedFile) -> None:
        self._store.put_upload(record.key, file.file, record.size_bytes, record.content_type)

    def _inspect(self, file: ReceivedFile) -> PhotoHeader:
        check_file_size(file.size_bytes, self._limits)
        file.file.seek(0)
        header = read_last_header(file.file.read(MORE_BYTES), file.size_bytes)
        check_photo_size(header, self._limits)
        return header


def _record(owner: str, file: ReceivedFile, header: PhotoHeader) -> UploadRecord:
    upload_id = secrets.token_hex(16)
    return UploadRecord(
        id=upload_id,
        owner=owner,
        key=upload_id,
        filename=file.filename or file.part,
        content_type=header.content_type,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
    )
