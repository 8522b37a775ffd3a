"""Photos on their way to the store, results and archives on their way back; each whole or not at all."""

import asyncio
import hashlib
import io
import os
import re
from collections.abc import Callable, Generator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.client.archive import check_archive
from server.client.errors import TransferFailed, WrongBytes
from server.client.http import RestageClient, describe, host_of, read_reason
from server.client.photos import Photo, plain
from server.client.whole_files import put_in_place

# A slow line may take minutes for what lies in the kernel's buffers, which counts as sent, before the store can answer.
_SEND_TIMEOUT = httpx.Timeout(30.0, connect=10.0, write=120.0, read=300.0)

Counter = Callable[[int], None]


async def send_photo(client: RestageClient, photo: Photo, form: Mapping[str, Any], count: Counter) -> None:
    """Send a photo to the store with the form that the server gave for it, again after a cut.

    Args:
        client: whose connections and patience are used.
        photo: to be sent.
        form: an entry of `uploads` in the answer of `request_forms`.
        count: told how many bytes went out; a negative number takes back those of a lost attempt.

    Raises:
        TransferFailed: the store refuses it, or cannot be reached for too long.
        OSError: the photo cannot be read.
    """
    patience = client.new_patience()
    while failure := await _try_to_send(client, photo, form, count):
        if not failure.is_worth_another_try:
            raise failure
        client.on_wait(f"waiting for the store: {failure}")
        if not await patience.pause():
            raise failure


async def _try_to_send(
    client: RestageClient, photo: Photo, form: Mapping[str, Any], count: Counter
) -> TransferFailed | None:
    with _CountingFile(photo.path, count) as file:
        if file.size_bytes != photo.size_bytes:
            return WrongBytes(f"{photo.path} was changed while it was sent")
        part = (plain(photo.path.name), file, photo.content_type)
        try:
            response = await client.http.post(
                form["url"], data=form["fields"], files={"file": part}, timeout=_SEND_TIMEOUT
            )
        except httpx.TransportError as error:
            reason, http_status = describe(error), None
        else:
            if response.is_success:
                return None
            reason, http_status = _read_store_reason(response), response.status_code
        file.take_back()
    return TransferFailed(f"the store at {host_of(form['url'])} did not take the photo: {reason}", http_status)


async def fetch_result(client: RestageClient, output: Mapping[str, Any], file: Path, *, tag: str) -> None:
    """Fetch a result into `file`, once.

    Args:
        client: whose connections are used.
        output: of a job in the server's answer.
        file: appears whole, or stays as it was.
        tag: keeps the unfinished file apart from those of other batches in the same folder.

    Raises:
        TransferFailed: it cannot be fetched.
        WrongBytes: it is not what the server recorded.
        OSError: the file cannot be written.
    """
    with _part_of(file, tag) as part:
        store = f"the store at {host_of(output['url'])}"
        digest = await _write_answer(part, client.http.stream("GET", output["url"]), store, _read_store_reason)
        if digest != output["sha256"]:
            raise WrongBytes("the store gave other bytes than the worker wrote")
        await asyncio.to_thread(put_in_place, part, file)


async def fetch_archive(client: RestageClient, batch_id: str, file: Path, sha256s: AbstractSet[str]) -> None:
    """Fetch all results of a batch as one zip into `file`, once.

    Args:
        client: whose connections are used.
        batch_id: of a batch that has finished.
        file: appears whole, or stays as it was.
        sha256s: of the results that must be in it.

    Raises:
        TransferFailed: it cannot be fetched, or was cut.
        OSError: the file cannot be written.
    """
    with _part_of(file, batch_id) as part:
        await _write_answer(part, client.open_archive(batch_id), f"the server at {client.url}", read_reason)
        await asyncio.to_thread(check_archive, part, sha256s)
        await asyncio.to_thread(put_in_place, part, file)


@contextmanager
def _part_of(file: Path, tag: str) -> Generator[Path]:
    part = file.with_name(f".{file.name}.{tag[:8]}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


async def _write_answer(
    part: Path,
    answer: AbstractAsyncContextManager[httpx.Response],
    who: str,
    read_why: Callable[[httpx.Response], str],
) -> str:
    """Write the body of an answer to a file; returns its sha256."""
    digest = hashlib.sha256()
    try:
        async with answer as response:
            if not response.is_success:
                await response.aread()
                raise TransferFailed(f"{who} did not give it: {read_why(response)}", response.status_code)
            with part.open("wb") as file:
                async for chunk in response.aiter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise TransferFailed(f"{who} cannot be reached: {describe(error)}") from error
    return digest.hexdigest()


class _CountingFile(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, count: Counter) -> None:
        super().__init__(path, "rb")
        self.size_bytes = os.fstat(self.fileno()).st_size
        self._count = count
        self._num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._num_read += len(data)
        self._count(len(data))
        return data

    def take_back(self) -> None:
        """Take back what was told: it did not arrive."""
        self._count(-self._num_read)
        self._num_read = 0


def _read_store_reason(response: httpx.Response) -> str:
    """Say what an S3 server's XML says."""
    parts = [re.search(f"<{tag}>([^<]*)</{tag}>", response.text) for tag in ("Code", "Message")]
    said = ": ".join(part[1] for part in parts if part)
    return f"{response.status_code} {said}".strip()
