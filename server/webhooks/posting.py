"""Sends one request to a receiver that nobody vouches for: to a checked address only, bounded in time and size."""

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Final, Self, cast

import anyio
import anyio.to_thread
import httpcore
import structlog

from server.hosts import normalise_host
from server.settings import WebhooksSettings
from server.webhooks.addresses import Target, is_public

# Host and port → the addresses, in the order in which they are to be tried.
Resolve = Callable[[str, int], Awaitable[list[str]]]

MOST_ANSWER_BYTES: Final = 64 * 1024
_log = structlog.stdlib.get_logger()
_CONNECT_SECONDS: Final = 5.0
_MOST_ADDRESSES: Final = 4
_TROUBLE: Final = (OSError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)


class NotDelivered(Exception):
    """Raised when a receiver gave no answer; the text is of our own words and may be shown to the client."""


class Poster:
    """Sends requests, each on a connection of its own; follows no redirect, uses no proxy, sends no cookie.

    Certificates are checked against the system's and certifi's; `SSL_CERT_FILE` names others.

    Args:
        settings: which hosts may be anywhere, and the time that a request may take.
        resolve: finds the addresses of a host.
    """

    def __init__(self, settings: WebhooksSettings, resolve: Resolve | None = None) -> None:
        self._timeout_seconds = settings.timeout_seconds
        self._tls = httpcore.default_ssl_context()
        self._allowed_hosts = frozenset(map(normalise_host, settings.allowed_hosts))
        self._resolve = resolve or resolve_host

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """Send a body; returns the status of the answer, of which little is read and nothing kept.

        Raises:
            NotDelivered: there was no answer in time, or the host may not be called.
        """
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        network = _CheckedNetwork(self._allowed_hosts, self._resolve)
        connection = httpcore.AsyncHTTPConnection(url.origin, ssl_context=self._tls, network_backend=network)
        status = 0
        try:
            async with asyncio.timeout(self._timeout_seconds), network, connection:
                request = connection.stream(
                    "POST",
                    url,
                    headers={"Host": target.host_header, "Connection": "close", **headers},
                    content=body,
                    extensions={"timeout": self._timeouts()},
                )
                async with request as response:
                    status = response.status
                    await _read_a_little(response)
        except _TROUBLE as error:
            # Once the status is there it counts, whatever comes of the rest.
            if not status:
                raise NotDelivered(self._in_words(error)) from error
        return status

    def _timeouts(self) -> dict[str, float]:
        return {
            "connect": min(_CONNECT_SECONDS, self._timeout_seconds),
            "read": self._timeout_seconds,
            "write": self._timeout_seconds,
        }

    def _in_words(self, error: Exception) -> str:
        match error:
            case httpcore.ConnectTimeout():
                return f"no connection within {self._timeouts()['connect']:g} s"
            case TimeoutError() | httpcore.TimeoutException():
                return f"no answer within {self._timeout_seconds:g} s"
            case httpcore.ConnectError() if isinstance(error.__cause__, ssl.SSLError):
                return "no secure connection: the host needs a certificate for its name, of a known authority"
            case httpcore.ConnectError():
                return "no connection could be made"
            case _:
                return "the connection ended without an answer of HTTP"


async def resolve_host(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a host; none where it knows no such host."""

    def look_up() -> list[str]:
        # As bytes: text would be encoded once more, by older rules for names that are not ASCII.
        found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    try:
        # A name server that is silent holds its thread for a while, never us.
        return await anyio.to_thread.run_sync(look_up, abandon_on_cancel=True)
    except socket.gaierror:
        return []


async def _read_a_little(response: httpcore.Response) -> None:
    """Let a receiver finish its answer: some stop their work when the caller leaves."""
    size_bytes = 0
    async for chunk in response.aiter_stream():
        size_bytes += len(chunk)
        if size_bytes >= MOST_ANSWER_BYTES:
            break


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Looks a host up once, checks every address that it has, and connects to one of these: no second look-up.

    Leaving the context closes the connection, also one that was cut off while it was made.
    """

    def __init__(self, allowed_hosts: Collection[str], resolve: Resolve) -> None:
        self._allowed_hosts = allowed_hosts
        self._resolve = resolve
        self._network = cast("httpcore.AsyncNetworkBackend", httpcore.AnyIOBackend())
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._stream is not None:
            await self._stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers; all share the time.

        Raises:
            NotDelivered: the host has no address, or one that may not be called.
            httpcore.ConnectError: no address answers.
            httpcore.ConnectTimeout: none does in time.
        """
        deadline = time.monotonic() + (timeout or _CONNECT_SECONDS)
        addresses = await self._look_up(host, port, deadline)
        for num_left in range(len(addresses), 0, -1):
            share = max(deadline - time.monotonic(), 0) / num_left
            try:
                stream = await self._network.connect_tcp(
                    addresses[-num_left], port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if num_left == 1:
                    raise
            else:
                self._stream = stream
                return stream
        # One text for both: whether a name exists inside our network is nobody's business.
        raise NotDelivered(
            "the host has no address that may be called; it must be public, or the host in webhooks.allowed_hosts"
        )

    async def _look_up(self, host: str, port: int, deadline: float) -> list[str]:
        try:
            with anyio.fail_after(max(deadline - time.monotonic(), 0)):
                addresses = await self._resolve(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        if host not in self._allowed_hosts and not all(map(is_public, addresses)):
            _log.warning("webhook.refused", host=host, addresses=addresses)
            return []
        return addresses[:_MOST_ADDRESSES]
