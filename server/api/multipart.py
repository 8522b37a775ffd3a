"""Reads a form as it streams in: its files go to disk, and only the JSON that they belong to is held in memory.

Litestar's own reader holds a text part in memory whatever its size, and tells about parts too late to refuse them.
"""

import hashlib
import re
import tempfile
from collections.abc import AsyncIterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import BinaryIO, ClassVar
from urllib.parse import unquote

import anyio.to_thread
from multipart import (  # pyright: ignore[reportMissingTypeStubs]: it has its types in the code
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
)

from server.api.crowding import LARGE_BYTES, LargeBodies
from server.errors import (
    DependencyError,
    FieldError,
    InvalidRequest,
    MalformedBody,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from server.settings import LimitsSettings
from server.submit.files import ReceivedFile
from server.submit.request import TOO_MANY_ITEMS

BATCH_PART = "batch"
# Headers of one part: the parser takes eight lines of 4,224 bytes at most; and the boundary before them.
_MAX_PART_OVERHEAD_BYTES = 40_000
# A thread is asked for each write, so that a slow disk holds up only its own request: not for every few bytes. So much
# is in memory of each form that is being sent, and there may be as many forms as connections.
_WRITE_BYTES = 128 * 1024
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_IDENTITIES = frozenset({"binary", "8bit", "7bit"})
_EXTENDED_FILENAME = re.compile(r"filename\*=utf-8'[^']*'([^;\s]*)", re.IGNORECASE)  # RFC 5987
_MAX_FILENAME_CHARACTERS = 255


class FilesNotKept(DependencyError):
    """Raised when the files of a form cannot be written to this machine's disk."""

    code: ClassVar[str] = "files_not_kept"
    title: ClassVar[str] = "The server has no room for the files"
    retry_after_seconds: ClassVar[int] = 30


@dataclass(frozen=True)
class Form:
    """What a form held: the bytes of its part `batch`, and its files by the names of their parts."""

    batch: bytes
    files: dict[str, ReceivedFile]


def max_form_bytes(limits: LimitsSettings) -> int:
    """Return how large a form may be in all."""
    num_files = limits.max_batch_items
    return limits.max_body_bytes + num_files * limits.max_upload_bytes + (num_files + 1) * _MAX_PART_OVERHEAD_BYTES


async def read_form(
    chunks: AsyncIterable[bytes],
    boundary: str | None,
    *,
    limits: LimitsSettings,
    large_bodies: LargeBodies,
    opened: AsyncExitStack,
) -> Form:
    """Read a form to its end.

    Args:
        chunks: the body, cut anywhere.
        boundary: as the content type of the request names it.
        limits: `max_body_bytes` holds for the part `batch`, `max_batch_items` for the number of files. Of a file that
            is larger than `max_upload_bytes` the rest is read and dropped.
        large_bodies: where the part `batch` takes a place when it turns out to be large.
        opened: closes the files, which are on disk and have no name there.

    Raises:
        MalformedBody: it is no form, or ends too early.
        InvalidRequest: it has parts that it may not have.
        PayloadTooLarge: its part `batch` is too large.
        UnsupportedMediaType: its part `batch` is not in UTF-8.
        TooManyLargeBodies: its part `batch` is large, and so are too many others.
        FilesNotKept: the disk does not take the files.
    """
    if boundary is None or not _BOUNDARY.fullmatch(boundary):
        raise MalformedBody(
            "the content type multipart/form-data needs a boundary of 1 to 70 characters; HTTP clients add it"
        )
    parser = PushMultipartParser(boundary)
    parts = _Parts(limits, large_bodies, opened)
    try:
        async for chunk in chunks:
            for event in parser.parse(chunk) if chunk else ():
                await parts.take(event)
    except MultipartError as error:
        raise MalformedBody(f"the form cannot be read: {str(error.args[0]).lower()}") from error
    except OSError as error:
        raise FilesNotKept(f"the files of the form cannot be written to disk: {error.strerror or error}") from error
    try:
        parser.close()
    except MultipartError as error:
        raise MalformedBody("the form ends before its last boundary; send it again, whole") from error
    return parts.finish()


class _Parts:
    """Takes one event of the parser after another, and knows which part they belong to."""

    def __init__(self, limits: LimitsSettings, large_bodies: LargeBodies, opened: AsyncExitStack) -> None:
        self._limits = limits
        self._large_bodies = large_bodies
        self._opened = opened
        self._batch: bytearray | None = None
        self._files: dict[str, ReceivedFile] = {}
        self._current: _Spool | None = None

    async def take(self, event: MultipartSegment | bytes | None) -> None:
        """Begin a part, add bytes to it, or end it (None)."""
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is not None:
            await self._add(event)
        elif self._current is not None:
            file = await self._current.finish()
            self._files[file.part] = file
            self._current = None

    def finish(self) -> Form:
        """Return all that was taken."""
        if not self._batch:
            missing = "has no part" if self._batch is None else "has nothing in its part"
            raise MalformedBody(f"the form {missing} {BATCH_PART}; send the JSON of the batch in it")
        return Form(bytes(self._batch), self._files)

    def _begin(self, segment: MultipartSegment) -> None:
        name = segment.name or ""
        _check_coding(segment, name)
        if name == BATCH_PART:
            if self._batch is not None:
                raise _twice(name)
            if (segment.charset or "utf-8").lower() not in _UTF8:
                raise UnsupportedMediaType(f"the part {BATCH_PART} must be in UTF-8, not {segment.charset!a}")
            self._batch = bytearray()
            return
        filename = _read_filename(segment)
        if filename is None:
            raise InvalidRequest(
                f"the part {name!a} is not a file; only {BATCH_PART} is text, and all settings stand in its JSON"
            )
        if name in self._files:
            raise _twice(name)
        if not name:
            raise MalformedBody(
                "a file of the form has no name for items to refer to; call its part photo1, for example"
            )
        if len(self._files) == self._limits.max_batch_items:
            detail = f"at most {self._limits.max_batch_items} files are allowed in one form"
            raise InvalidRequest(detail, (FieldError("", TOO_MANY_ITEMS, detail),))
        file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the request
        # Closing it gives back its room on the disk, which takes time.
        self._opened.push_async_callback(anyio.to_thread.run_sync, file.close)
        self._current = _Spool(name, _plain_name(filename), file, self._limits.max_upload_bytes)

    async def _add(self, data: bytes) -> None:
        if self._current is not None:
            await self._current.write(data)
        elif self._batch is not None:
            if len(self._batch) + len(data) > self._limits.max_body_bytes:
                raise PayloadTooLarge(
                    f"the part {BATCH_PART} has more than {self._limits.max_body_bytes} bytes, which is what "
                    "limits.max_body_bytes allows; photos belong into parts of their own"
                )
            if len(self._batch) <= LARGE_BYTES < len(self._batch) + len(data):
                self._large_bodies.take(self._opened)
            self._batch += data


class _Spool:
    """Writes a file to disk as it comes, up to a limit."""

    def __init__(self, part: str, filename: str | None, file: BinaryIO, max_bytes: int) -> None:
        self._part = part
        self._filename = filename
        self._file = file
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._waiting = bytearray()
        self._digest = hashlib.sha256()

    async def write(self, data: bytes) -> None:
        """Take the next bytes; those over the limit are counted only."""
        self._waiting += data[: max(0, self._max_bytes - self._size_bytes)]
        self._size_bytes += len(data)
        if len(self._waiting) >= _WRITE_BYTES:
            await anyio.to_thread.run_sync(self._flush)

    async def finish(self) -> ReceivedFile:
        """Write what waits, and go back to the start of the file."""
        await anyio.to_thread.run_sync(self._rewind)
        return ReceivedFile(self._part, self._filename, self._file, self._size_bytes, self._digest.hexdigest())

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._digest.update(self._waiting)
        self._waiting.clear()

    def _rewind(self) -> None:
        self._flush()
        self._file.seek(0)


def _check_coding(segment: MultipartSegment, name: str) -> None:
    coding = dict(segment.headerlist).get("Content-Transfer-Encoding", "binary")
    if coding.strip().lower() not in _IDENTITIES:
        raise MalformedBody(f"the part {name!a} is in the transfer encoding {coding!a}; send its bytes as they are")


def _twice(name: str) -> MalformedBody:
    return MalformedBody(f"the part {name!a} stands twice in the form")


def _read_filename(segment: MultipartSegment) -> str | None:
    """The name of a file as its sender has it; None where the part is text."""
    if segment.filename is not None:
        return segment.filename
    found = _EXTENDED_FILENAME.search(dict(segment.headerlist)["Content-Disposition"])
    return unquote(found[1]) if found else None


def _plain_name(filename: str) -> str | None:
    """The last step of a path, without characters that cannot be seen; None where nothing is left of it."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in name if character.isprintable())[:_MAX_FILENAME_CHARACTERS].strip()
    return shown if shown.strip(".") else None
