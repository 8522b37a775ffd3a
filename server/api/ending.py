"""How the API process ends: within five seconds of a signal, and no client is surprised more than HTTP must."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial

import structlog
import uvicorn

from server.api.stopping import Stopping

# Kept connections hear within this, with an answer, that they end; one that is silent for longer is closed.
_FAREWELL_SECONDS = 1.0
# What requests that run get to finish.
_FINISH_SECONDS = 3.0
# What their last answers get to go out.
_SEND_SECONDS = 0.3
# From the signal until the process is gone, whatever it waits for. Nothing is lost by it: what was accepted is in
# Redis, and the files of forms have no name.
_GIVE_UP_SECONDS = 4.5
_POLL_SECONDS = 0.02
_log = structlog.stdlib.get_logger()


class SignallessServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: they would close connections whose clients were not told."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals to `ended_by_signals`."""
        yield


@contextmanager
def ended_by_signals(server: SignallessServer, stopping: Stopping, listener: socket.socket) -> Generator[None]:
    """Let SIGINT and SIGTERM end the server in good order; a second signal changes nothing.

    The process is gone `_GIVE_UP_SECONDS` after the signal, even where what it does cannot be interrupted.

    Args:
        server: serves inside the block.
        stopping: is told, so that requests end.
        listener: where `server` listens.
    """
    loop = asyncio.get_running_loop()
    # Never cancelled: whatever still runs after the server, to the last thread, counts as well.
    last_resort = threading.Timer(_GIVE_UP_SECONDS, _give_up)
    last_resort.daemon = True
    endings: list[asyncio.Task[None]] = []

    def stop() -> None:
        if not endings:
            last_resort.start()
            _log.info("api.stopping", requests=len(stopping.requests))
            endings.append(loop.create_task(_end(server, stopping, listener)))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for ending in endings:
            ending.cancel()


async def _end(server: SignallessServer, stopping: Stopping, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    stopping.begin()
    # Before the start there is nobody to be told.
    if server.started:
        await _stop_listening(server, listener)
        while server.server_state.connections and loop.time() < begun_at + _FAREWELL_SECONDS:  # noqa: ASYNC110 (uvicorn tells nobody)
            await asyncio.sleep(_POLL_SECONDS)
    server.should_exit = True
    await asyncio.sleep(begun_at + _FINISH_SECONDS - loop.time())
    await stopping.end_requests()
    await asyncio.sleep(_SEND_SECONDS)
    # Clients that do not read, and threads that are with the store, would hold it.
    server.force_exit = True


async def _stop_listening(server: SignallessServer, listener: socket.socket) -> None:
    """Close the door behind those who have come: the kernel resets connections that nobody has taken by then."""
    loop = asyncio.get_running_loop()
    taken: list[socket.socket] = []
    with suppress(OSError):  # nobody waits
        while True:
            taken.append(listener.accept()[0])
    for listening in server.servers:
        listening.close()
    config, state = server.config, server.server_state
    protocol = partial(config.http_protocol_class, config=config, server_state=state, app_state=server.lifespan.state)
    for connection in taken:
        connection.setblocking(False)
        await loop.connect_accepted_socket(protocol, connection)


def _give_up() -> None:
    _log.warning("api.given_up", detail="something could not be interrupted: mostly a call of a store that hangs")
    os._exit(0)
