"""Calls to a Restage server over HTTP, made again where that helps and never where it does harm."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

import httpx

from server.client.errors import ApiError, ClientError, ServerUnreachable
from server.client.patience import PATIENCE_SECONDS, Patience
from server.client.photos import Photo

# Connections are made while photos take all of a slow line, so that 5 s would be too short.
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_AGAIN = frozenset({408, 429, 502, 503, 504})


class RestageClient:
    """One server, called by one owner; use as `async with RestageClient(url) as client`.

    A call is made again while the server is away for a moment: `408`, `429`, `502`, `503` and `504` (after
    `Retry-After`), and connections that are refused or cut. Only the very first call gives up at once where nothing
    listens.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        api_key: sent to the server only, never to the store.
        patience_seconds: how long one call or transfer is tried after its first failure.
        on_wait: told why, each time that something has to wait.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.on_wait = on_wait or _ignore
        self._headers = _authorize(api_key)
        self._patience_seconds = patience_seconds
        self._was_reached = False
        # A proxy that the environment names is for other machines.
        direct: dict[str, httpx.AsyncBaseTransport | None] = {"all://127.0.0.1": None, "all://localhost": None}
        try:
            self.http = httpx.AsyncClient(timeout=_TIMEOUT, mounts=direct)
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ServerUnreachable(f"{url} is no URL of a server: {error}") from error

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.http.aclose()

    async def list_models(self) -> list[dict[str, Any]]:
        """Return the models that the server offers."""
        return (await self._call("GET", "/v1/models")).get("data", [])

    async def request_forms(self, photos: Sequence[Photo]) -> dict[str, Any]:
        """Announce photos; the answer has a form, or the reason against one, for each by its index."""
        return await self._call("POST", "/v1/uploads", json={"files": [photo.announcement for photo in photos]})

    async def submit(self, batch: Mapping[str, Any], *, idempotency_key: str) -> dict[str, Any]:
        """Submit a batch; made again with the same key after a lost answer, it is still accepted once."""
        return await self._call("POST", "/v1/batches", json=batch, headers={"Idempotency-Key": idempotency_key})

    async def check_settings(self, batch: Mapping[str, Any]) -> None:
        """Have the server look at the settings of a batch before its photos are sent.

        Args:
            batch: a submission of one item, whose upload does not exist, so that it cannot be accepted.

        Raises:
            ApiError: the request as a whole is refused.
            ClientError: the settings are refused.
        """
        try:
            await self._call("POST", "/v1/batches", json=batch)
        except ApiError as error:
            if not error.items:
                raise
            if reasons := [str(item) for item in error.items if item.code != "upload_not_found"]:
                raise ClientError("\n".join(("the server does not take these settings:", *reasons))) from error

    async def read_batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch with its jobs as they are now."""
        return await self._call("GET", f"/v1/batches/{batch_id}")

    async def cancel_batch(self, batch_id: str) -> None:
        """Cancel what is not done of a batch; one that has finished, or is gone, stays as it is."""
        try:
            await self._call("POST", f"/v1/batches/{batch_id}/cancel")
        except ApiError as error:
            if error.http_status not in {404, 409}:
                raise

    async def read_job(self, job_id: str) -> dict[str, Any]:
        """Return a job as it is now; its output's URL is fresh."""
        return await self._call("GET", f"/v1/jobs/{job_id}")

    def open_archive(self, batch_id: str) -> AbstractAsyncContextManager[httpx.Response]:
        """Begin to read the archive of a batch, once; use as `async with client.open_archive(id) as response`."""
        return self.http.stream("GET", f"{self.url}/v1/batches/{batch_id}/archive", headers=self._headers)

    def new_patience(self) -> Patience:
        """Begin the tries of one call or transfer."""
        return Patience(self._patience_seconds)

    async def _call(
        self, method: str, path: str, *, json: object = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        patience = self.new_patience()
        while True:
            wait_seconds = 0.0
            try:
                response = await self.http.request(
                    method, self.url + path, json=json, headers={**self._headers, **(headers or {})}
                )
            except httpx.UnsupportedProtocol as error:
                raise ServerUnreachable(
                    f"{self.url} is no URL of a server: it begins with http:// or https://"
                ) from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                reason = describe(error)
                if not self._was_reached and isinstance(error, httpx.ConnectError):
                    raise self._unreachable(reason) from error
            else:
                self._was_reached = True
                if response.status_code not in _AGAIN:
                    return _read_answer(response)
                reason = read_reason(response)
                wait_seconds = _read_retry_after(response)
            pause_seconds = patience.next_pause_seconds(wait_seconds)
            if pause_seconds is None:
                raise self._unreachable(reason)
            self.on_wait(f"waiting for the server: {reason}")
            await asyncio.sleep(pause_seconds)

    def _unreachable(self, reason: str) -> ServerUnreachable:
        if self._was_reached:
            return ServerUnreachable(f"the server at {self.url} is not to be had any more: {reason}")
        return ServerUnreachable(
            f"no Restage server can be used at {self.url} ({reason})\n"
            "  start one on this machine with `restage up`, or set RESTAGE_URL to where one runs"
        )


def _authorize(api_key: str | None) -> dict[str, str]:
    api_key = (api_key or "").strip()
    if not (api_key.isascii() and api_key.isprintable()):
        raise ClientError("RESTAGE_API_KEY is no key; set it to what `restage keys add` printed")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _ignore(_reason: str) -> None:
    pass


def _read_answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        host = host_of(str(response.request.url))
        raise ServerUnreachable(
            f"{host} answers {response.status_code} but not as a Restage server does; check RESTAGE_URL"
        )
    if response.is_success:
        return body  # pyright: ignore[reportUnknownVariableType]
    raise ApiError(response.status_code, body)  # pyright: ignore[reportUnknownArgumentType]


def read_reason(response: httpx.Response) -> str:
    """Say what a Restage server answered instead of what was asked for; the body has been read."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return f"it answers {response.status_code}"
    return f"it answers {response.status_code}: {detail}"


def _read_retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def describe(error: httpx.TransportError | httpx.DecodingError) -> str:
    """Say why there was no answer."""
    if isinstance(error, httpx.ConnectError):
        return "no connection can be made"
    if isinstance(error, httpx.TimeoutException):
        return "it does not answer in time"
    return f"the connection was cut: {error}" if str(error) else "the connection was cut"


def host_of(url: str) -> str:
    """Name a server without what else a URL may hold: signatures."""
    return httpx.URL(url).netloc.decode()
