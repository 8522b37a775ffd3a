"""Bounds what a client may keep of a process by doing nothing: how long it may owe a request, and how many may come.

uvicorn waits for ever for the head of a request, for the rest of a body that was answered before its end, and for a
client that does not read its answer; and the 503 that it gives beyond a limit of its own says neither why nor when to
come back.
"""

import asyncio
import resource
import socket
from functools import partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.crowding import CROWDED
from server.settings import ServerSettings

# So many beyond `server.max_connections` are told that they are too many; those behind them are not even heard.
_HEARD_BEYOND = 100


class BoundedConnection(H11Protocol):
    """One connection of a client; arguments as uvicorn gives them, and the settings with the bounds."""

    def __init__(self, *args: Any, limits: ServerSettings, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        num_beyond = len(self.connections) - self._limits.max_connections
        if num_beyond > _HEARD_BEYOND:
            transport.abort()
            return
        if num_beyond > 0:
            self.app_state = self.app_state | {CROWDED: True}
        _set_up_socket(transport, self._limits.send_timeout_seconds)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop_watch()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends; only the whole head of a request stops the clock."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._watch()

    def _should_upgrade(self) -> bool:
        """Speak HTTP/1.1 only; uvicorn would log how to install what it lacks, each time that somebody asks."""
        return False

    def _watch(self) -> None:
        """Let the clock run while a head is owed: from the begin of that, whatever dribbles in meanwhile.

        What is left of a body that was answered already stands before the next head. A body that a handler waits for
        has a deadline there, which can say so.
        """
        is_owed = self.conn.our_state in {h11.IDLE, h11.DONE} and self.conn.their_state in {h11.IDLE, h11.SEND_BODY}
        if not is_owed:
            self._stop_watch()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.header_timeout_seconds, self._give_up)

    def _stop_watch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.conn.send(h11.ConnectionClosed())
            self.transport.close()


def allow_many_files() -> None:
    """Let this process have as many files open as it may: each connection is one, and each file of a form."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bounded_connections(limits: ServerSettings) -> type[asyncio.Protocol]:
    """Return what uvicorn makes its connections of."""
    return cast("type[asyncio.Protocol]", partial(BoundedConnection, limits=limits))


def _set_up_socket(transport: asyncio.Transport, send_timeout_seconds: float) -> None:
    peer: socket.socket = transport.get_extra_info("socket")
    # The kernel ends a connection whose peer has taken nothing for so long, or is not there any more. A stream that
    # nobody reads looks alive from here: what is written waits in buffers.
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # macOS has none: there such a client stays
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_timeout_seconds * 1000))
    # An answer is written in two pieces, and the second would wait for the client to confirm the first: 40 ms on a
    # connection that is kept. asyncio sets this only on sockets that were made with a protocol's number.
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
