"""Calls to a Restage server and its store over HTTP, made again where that helps and never where it does harm."""

import asyncio
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from server.client.errors import ApiError, ServerUnreachable, TransferFailed
from server.client.photos import Photo

_PATIENCE_SECONDS = 120.0
_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
_AGAIN = frozenset({429, 502, 503, 504})
_TRANSFER_ATTEMPTS = 5

Counter = Callable[[int], None]


class RestageClient:
    """One server, called by one owner; use as `async with RestageClient(url) as client`.

    A call is made again while the server is away for a moment: `429`, `502`, `503` and `504` (after `Retry-After`),
    and connections that are refused or cut. Only the very first call gives up at once where nothing listens.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        api_key: sent to the server only, never to the store.
        patience_seconds: how long one call may be tried.
        on_wait: told why, each time that a call has to wait.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        patience_seconds: float = _PATIENCE_SECONDS,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience_seconds = patience_seconds
        self._on_wait = on_wait or _ignore
        self._was_reached = False
        # A proxy that the environment names is for other machines.
        direct: dict[str, httpx.AsyncBaseTransport | None] = {"all://127.0.0.1": None, "all://localhost": None}
        try:
            self._http = httpx.AsyncClient(timeout=_TIMEOUT, mounts=direct)
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ServerUnreachable(f"{url} is no URL of a server: {error}") from error

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._http.aclose()

    async def list_models(self) -> list[dict[str, Any]]:
        """Return the models that the server offers."""
        return (await self._call("GET", "/v1/models")).get("data", [])

    async def request_forms(self, photos: Sequence[Photo]) -> dict[str, Any]:
        """Announce photos; the answer has a form, or the reason against one, for each by its index."""
        return await self._call("POST", "/v1/uploads", json={"files": [photo.announcement for photo in photos]})

    async def submit(self, batch: Mapping[str, Any], *, idempotency_key: str) -> dict[str, Any]:
        """Submit a batch; made again with the same key after a lost answer, it is still accepted once."""
        return await self._call("POST", "/v1/batches", json=batch, headers={"Idempotency-Key": idempotency_key})

    async def read_batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch with its jobs as they are now."""
        return await self._call("GET", f"/v1/batches/{batch_id}")

    async def read_job(self, job_id: str) -> dict[str, Any]:
        """Return a job as it is now; its output's URL is fresh."""
        return await self._call("GET", f"/v1/jobs/{job_id}")

    async def _call(
        self, method: str, path: str, *, json: object = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        give_up_at = time.monotonic() + self._patience_seconds
        pauses = _pauses()
        while True:
            wait_seconds = next(pauses)
            try:
                response = await self._http.request(
                    method, self.url + path, json=json, headers={**self._headers, **(headers or {})}
                )
            except httpx.UnsupportedProtocol as error:
                raise ServerUnreachable(
                    f"{self.url} is no URL of a server: it begins with http:// or https://"
                ) from error
            except httpx.TransportError as error:
                reason = _describe(error)
                if not self._was_reached and isinstance(error, httpx.ConnectError):
                    raise self._unreachable(reason) from error
            else:
                self._was_reached = True
                if response.status_code not in _AGAIN:
                    return _read_answer(response)
                reason = _read_reason(response)
                wait_seconds = max(wait_seconds, _read_retry_after(response))
            if time.monotonic() + wait_seconds > give_up_at:
                raise self._unreachable(reason)
            self._on_wait(f"waiting for the server: {reason}")
            await asyncio.sleep(wait_seconds)

    def _unreachable(self, reason: str) -> ServerUnreachable:
        return ServerUnreachable(
            f"no Restage server can be used at {self.url} ({reason})\n"
            "  start one on this machine with `restage up`, or set RESTAGE_URL to where one runs"
        )

    async def send_photo(self, photo: Photo, form: Mapping[str, Any], count: Counter) -> None:
        """Send a photo to the store with the form that the server gave for it.

        Args:
            photo: to be sent.
            form: an entry of `uploads` in the answer of `request_forms`.
            count: told how many bytes went out; a negative number takes back those of a lost attempt.

        Raises:
            TransferFailed: the store refuses it, or cannot be reached after several attempts.
        """
        pauses = _pauses()
        for attempts_left in reversed(range(_TRANSFER_ATTEMPTS)):
            failure = await self._try_to_send(photo, form, count)
            if failure is None:
                return
            if not attempts_left or not failure.is_worth_another_try:
                raise failure
            await asyncio.sleep(next(pauses))

    async def _try_to_send(self, photo: Photo, form: Mapping[str, Any], count: Counter) -> TransferFailed | None:
        with _CountingFile(photo.path, count) as file:
            try:
                response = await self._http.post(
                    form["url"], data=form["fields"], files={"file": (photo.path.name, file, photo.content_type)}
                )
            except httpx.TransportError as error:
                reason, http_status = _describe(error), None
            else:
                if response.is_success:
                    return None
                reason, http_status = _read_store_reason(response), response.status_code
            file.take_back()
        return TransferFailed(f"the store at {_host(form['url'])} did not take the photo: {reason}", http_status)

    async def fetch_result(self, output: Mapping[str, Any], file: Path) -> None:
        """Fetch a result into `file`, which appears whole or not at all.

        Raises:
            TransferFailed: it cannot be fetched, or is not what the server recorded.
            OSError: the file cannot be written.
        """
        part = file.with_name(f".{file.name}.part")
        try:
            digest = hashlib.sha256()
            with part.open("wb") as sink:
                async with self._http.stream("GET", output["url"]) as response:
                    if not response.is_success:
                        await response.aread()
                        reason = _read_store_reason(response)
                        raise TransferFailed(f"the store did not give the result: {reason}", response.status_code)
                    async for chunk in response.aiter_bytes():
                        digest.update(chunk)
                        sink.write(chunk)
            if digest.hexdigest() != output["sha256"]:
                raise TransferFailed("the store gave other bytes than the worker wrote")
            part.replace(file)
        except httpx.TransportError as error:
            raise TransferFailed(
                f"the store at {_host(output['url'])} cannot be reached: {_describe(error)}"
            ) from error
        finally:
            part.unlink(missing_ok=True)


class _CountingFile(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, count: Counter) -> None:
        super().__init__(path, "rb")
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


def _ignore(_reason: str) -> None:
    pass


def _pauses() -> Iterator[float]:
    pause_seconds = 0.25
    while True:
        # Many clients that lost the same server must not all come back at once.
        yield pause_seconds * (0.75 + int.from_bytes(os.urandom(1)) / 512)
        pause_seconds = min(5.0, pause_seconds * 2)


def _read_answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        host = _host(str(response.request.url))
        raise ServerUnreachable(
            f"{host} answers {response.status_code} but not as a Restage server does; check RESTAGE_URL"
        )
    if response.is_success:
        return body  # pyright: ignore[reportUnknownVariableType]
    raise ApiError(response.status_code, body)  # pyright: ignore[reportUnknownArgumentType]


def _read_reason(response: httpx.Response) -> str:
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return f"it answers {response.status_code}"
    return f"it answers {response.status_code}: {detail}"


def _read_retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def _read_store_reason(response: httpx.Response) -> str:
    """Say what an S3 server's XML says."""
    parts = [re.search(f"<{tag}>([^<]*)</{tag}>", response.text) for tag in ("Code", "Message")]
    said = ": ".join(part[1] for part in parts if part)
    return f"{response.status_code} {said}".strip()


def _describe(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ConnectError):
        return "no connection can be made"
    if isinstance(error, httpx.TimeoutException):
        return "it does not answer in time"
    return f"the connection was cut: {error}" if str(error) else "the connection was cut"


def _host(url: str) -> str:
    return httpx.URL(url).netloc.decode()
