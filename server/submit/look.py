"""Looks at uploaded photos without decoding them: one ranged read each, all at once."""

import asyncio
from collections.abc import Mapping
from typing import ClassVar

import anyio.to_thread

from server.errors import ObjectNotFound, RequestError, StoreUnavailable
from server.images import DamagedHeader, HeaderIncomplete, PhotoHeader, read_header
from server.jobs import JobInput
from server.ledger.records import UploadRecord
from server.settings import LimitsSettings
from server.store import ObjectStart, Store

_FIRST_BYTES = 64 * 1024
# Large previews and colour profiles may stand before a photo's size.
MORE_BYTES = 1024 * 1024


class UploadNotFound(RequestError):
    """Raised when an upload's id is unknown, has expired, or belongs to another owner."""

    code: ClassVar[str] = "upload_not_found"
    title: ClassVar[str] = "No such upload"
    http_status: ClassVar[int] = 422


class UploadLost(UploadNotFound):
    """Raised when a photo that was in the store is there no more, whoever took it."""


class UploadNotReceived(RequestError):
    """Raised when a form was handed out but its file has not arrived in the store."""

    code: ClassVar[str] = "upload_not_received"
    title: ClassVar[str] = "The file has not arrived"
    http_status: ClassVar[int] = 422


class FileTooLarge(RequestError):
    """Raised when a file has more bytes than `limits.max_upload_bytes`."""

    code: ClassVar[str] = "file_too_large"
    title: ClassVar[str] = "The file is too large"
    http_status: ClassVar[int] = 422


class PhotoTooSmall(RequestError):
    """Raised when a photo's side has fewer pixels than `limits.min_image_side`."""

    code: ClassVar[str] = "photo_too_small"
    title: ClassVar[str] = "The photo is too small"
    http_status: ClassVar[int] = 422


class PhotoTooLarge(RequestError):
    """Raised when a photo has more pixels than `limits.max_image_pixels`."""

    code: ClassVar[str] = "photo_too_large"
    title: ClassVar[str] = "The photo is too large"
    http_status: ClassVar[int] = 422


class PhotoLook:
    """Looks at uploads in the store; its threads are bounded, so a slow store cannot take all of the process."""

    def __init__(
        self, store: Store, limits: LimitsSettings, *, threads: anyio.CapacityLimiter, timeout_seconds: float
    ) -> None:
        self._store = store
        self._limits = limits
        self._threads = threads
        self._timeout_seconds = timeout_seconds

    async def look(self, records: Mapping[str, UploadRecord | None]) -> dict[str, JobInput | RequestError]:
        """Say for each upload what it is, or why it cannot be used.

        Args:
            records: by upload id; None where the owner has no such upload.

        Raises:
            StoreUnavailable: the store does not answer in time.
        """
        try:
            # A group: when the store fails one look, the others do not go on taking its threads.
            async with asyncio.timeout(self._timeout_seconds), asyncio.TaskGroup() as group:
                looks = [group.create_task(self._look_at(record)) for record in records.values()]
        except TimeoutError as error:
            raise StoreUnavailable(f"the store did not answer within {self._timeout_seconds:g} s") from error
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {upload_id: look.result() for upload_id, look in zip(records, looks, strict=True)}

    async def _look_at(self, record: UploadRecord | None) -> JobInput | RequestError:
        if record is None:
            return UploadNotFound(
                "there is no such upload; ask for a form with POST /v1/uploads and send the file to it"
            )
        try:
            # A thread that waits for the store may be left behind: its connection has a timeout of its own.
            return await anyio.to_thread.run_sync(self._inspect, record, limiter=self._threads, abandon_on_cancel=True)
        except RequestError as error:
            return error

    def _inspect(self, record: UploadRecord) -> JobInput:
        try:
            start, header = self._read_header(record.key)
        except ObjectNotFound as error:
            if record.etag is not None:
                raise UploadLost(
                    "the photo is not in the store any more; ask for a form with POST /v1/uploads and send it again"
                ) from error
            raise UploadNotReceived(
                "the file has not arrived in the store; send it to the form's url before naming it in a batch"
            ) from error
        check_file_size(start.size_bytes, self._limits)
        check_photo_size(header, self._limits)
        return JobInput(
            upload_id=record.id,
            key=record.key,
            etag=start.etag,
            sha256=record.sha256,
            content_type=header.content_type,
            size_bytes=start.size_bytes,
            height=header.height,
            width=header.width,
        )

    def _read_header(self, key: str) -> tuple[ObjectStart, PhotoHeader]:
        start = self._store.read_start(key, _FIRST_BYTES)
        try:
            return start, read_header(start.data)
        except HeaderIncomplete:
            if start.size_bytes <= len(start.data):
                raise
        start = self._store.read_start(key, MORE_BYTES)
        return start, read_last_header(start.data, start.size_bytes)


def read_last_header(data: bytes, size_bytes: int) -> PhotoHeader:
    """Tell format and size of a photo of `size_bytes` from `MORE_BYTES` of it, or all; raises as `read_header` does."""
    try:
        return read_header(data)
    except HeaderIncomplete as error:
        if size_bytes <= len(data):
            raise
        raise DamagedHeader(
            f"the photo does not tell its size within its first {MORE_BYTES} bytes; export it again"
        ) from error


def check_file_size(size_bytes: int, limits: LimitsSettings) -> None:
    """Refuse a file that is too large; raises FileTooLarge."""
    if size_bytes > limits.max_upload_bytes:
        raise FileTooLarge(f"the file has {size_bytes} bytes; at most {limits.max_upload_bytes} are allowed")


def check_photo_size(header: PhotoHeader, limits: LimitsSettings) -> None:
    """Refuse a photo with too few or too many pixels; raises PhotoTooSmall or PhotoTooLarge."""
    if min(header.height, header.width) < limits.min_image_side:
        raise PhotoTooSmall(
            f"the photo has {header.width} x {header.height} pixels; each side needs at least {limits.min_image_side}"
        )
    if header.height * header.width > limits.max_image_pixels:
        raise PhotoTooLarge(
            f"the photo has {header.width} x {header.height} pixels; "
            f"at most {limits.max_image_pixels} in all are allowed"
        )
