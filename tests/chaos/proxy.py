"""A TCP proxy before Redis or the store, which is a good line until it is told what to do to it.

    with Proxy(valkey_port) as proxy:
        connect(proxy.address)
        proxy.lose_replies(script_needle("commit"), times=2)

Faults that last (`black_hole`, `slow`) end by `pass_again`, `slow(None)` or `heal`. All methods may be called from any
thread. A side that has said all it has to say is taken for one that has gone: half-closed connections are not known
here.
"""

import asyncio
import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from server.ledger.scripts import script_text

_CHUNK_BYTES = 65_536
_OVERLAP_BYTES = 200
_PATIENCE_SECONDS = 30.0


def script_needle(name: str) -> bytes:
    """Return the bytes by which a call of the ledger's script `name` is known on the line."""
    return hashlib.sha1(script_text(name).encode(), usedforsecurity=False).hexdigest().encode()


@dataclass
class Trap:
    """What happens to the next requests that hold one of some needles.

    Attributes:
        needles: bytes of a request, of which one is enough.
        times_left: how many requests it still waits for.
        num_passed_bytes: of the answer that the client still gets before its connection is cut.
        answer: what the client hears instead of the server, which hears nothing; None: the server is asked.
    """

    needles: tuple[bytes, ...]
    times_left: int
    num_passed_bytes: int = 0
    answer: bytes | None = None

    def springs_at(self, before: bytes, chunk: bytes) -> bool:
        """Tell whether a needle ends in `chunk`; it may have begun in what was sent `before`."""
        return any(needle in before[max(0, len(before) - len(needle) + 1) :] + chunk for needle in self.needles)


@dataclass(eq=False)
class Connection:
    """A client's connection and ours to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    # How much of the answer is still passed on before the cut; None: it is not to be cut.
    bytes_until_cut: int | None = None
    # The end of what the client sent before: a needle may begin there.
    last_sent: bytes = b""

    def cut(self) -> None:
        """End both sides with a reset, as a line does that is gone; what was on the way is lost."""
        for writer in (self.client, self.server):
            line: socket.socket | None = writer.get_extra_info("socket")
            if line is not None and line.fileno() >= 0:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


@dataclass
class Proxy:
    """Carries bytes between its own port on loopback and `target_port`, until it is told otherwise.

    Args:
        target_port: of the server, which need not be there yet, and may go and come.
        port: its own; any free one when left out.

    Attributes:
        num_lost: answers that were kept from their client so far.
    """

    target_port: int
    port: int = 0
    num_lost: int = 0
    _traps: list[Trap] = field(default_factory=list)
    _connections: set[Connection] = field(default_factory=set)
    _bytes_per_second: float | None = None

    def start(self) -> Self:
        """Listen; `port` is known afterwards."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._passable = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._do(self._passable.set)
        listening = asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_CHUNK_BYTES)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(_PATIENCE_SECONDS)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def address(self) -> str:
        """Host and port for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def num_to_lose(self) -> int:
        """How many requests the traps still wait for."""
        return sum(trap.times_left for trap in self._traps)

    def lose_replies(self, *needles: bytes, times: int = 1, after_bytes: int = 0) -> Trap:
        """Let the next `times` requests with one of `needles` be done, and cut their connections instead of answering.

        With `after_bytes` so much of the answer still passes: it breaks off in its midst.
        """
        return self._set(Trap(needles, times, after_bytes))

    def answer_instead(self, *needles: bytes, answer: bytes, times: int = 1) -> Trap:
        """Answer the next `times` requests with one of `needles` without the server, and close their connections."""
        return self._set(Trap(needles, times, answer=answer))

    def withdraw(self, trap: Trap) -> None:
        """Let a trap wait no longer; what it waited for stays in `times_left`."""
        self._do(lambda: trap in self._traps and self._traps.remove(trap))

    def cut(self) -> int:
        """Cut all connections there are, and return how many there were; new ones are carried."""
        return self._do(self._cut)

    def black_hole(self) -> None:
        """Carry nothing more, and answer nothing; connections can be made, and what is sent waits for `pass_again`."""
        self._do(self._passable.clear)

    def pass_again(self) -> None:
        """End a black hole."""
        self._do(self._passable.set)

    def slow(self, bytes_per_second: float | None) -> None:
        """Carry no more than that in each direction of each connection; None: as much as there is."""
        self._do(setattr, self, "_bytes_per_second", bytes_per_second)

    def heal(self) -> None:
        """Be a good line again: no hole, full speed, no more traps."""
        self._do(self._heal)

    def close(self) -> None:
        """Cut all connections and listen no more."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_PATIENCE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_SECONDS)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _do(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Act on the proxy's own thread, so that no two changes meet, and return what comes of it."""

        async def acting() -> Any:
            return act(*arguments)

        return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(_PATIENCE_SECONDS)

    def _set(self, trap: Trap) -> Trap:
        self._do(self._traps.append, trap)
        return trap

    def _cut(self) -> int:
        for connection in self._connections:
            connection.cut()
        return len(self._connections)

    def _heal(self) -> None:
        self._traps.clear()
        self._bytes_per_second = None
        self._passable.set()

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:  # by `close`, which asyncio's own callback would report as a mistake
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passable.wait()
        try:
            opened = await asyncio.open_connection("127.0.0.1", self.target_port, limit=_CHUNK_BYTES)
        except OSError:  # the server is away, which its client must see too
            return
        connection = Connection(writer, opened[1])
        self._connections.add(connection)
        ways = [
            asyncio.create_task(self._carry(reader, opened[1], connection, self._pass_request)),
            asyncio.create_task(self._carry(opened[0], writer, connection, self._pass_reply)),
        ]
        try:
            # Whichever side ends, the other hears of it once all that came before has been sent on.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for end in (writer, opened[1]):
                end.close()
                with suppress(OSError, TimeoutError):
                    await asyncio.wait_for(end.wait_closed(), _PATIENCE_SECONDS)
        finally:
            self._connections.discard(connection)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            opened[1].transport.abort()

    async def _carry(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        connection: Connection,
        look: Callable[[Connection, bytes], bytes | None],
    ) -> None:
        """Carry one direction to its end; `look` says what of a chunk is passed on, and None that it was the last."""
        while True:
            rate = self._bytes_per_second
            chunk = await source.read(max(1, int(rate / 10)) if rate else _CHUNK_BYTES)
            if rate:
                await asyncio.sleep(len(chunk) / rate)
            await self._passable.wait()
            if not chunk or (passed := look(connection, chunk)) is None:
                return
            target.write(passed)
            await target.drain()

    def _pass_request(self, connection: Connection, chunk: bytes) -> bytes | None:
        before, connection.last_sent = connection.last_sent, chunk[-_OVERLAP_BYTES:]
        if connection.bytes_until_cut is not None:
            return chunk
        trap = next((one for one in self._traps if one.springs_at(before, chunk)), None)
        if trap is None:
            return chunk
        trap.times_left -= 1
        if not trap.times_left:
            self._traps.remove(trap)
        self.num_lost += 1
        if trap.answer is not None:
            connection.client.write(trap.answer)
            return None
        connection.bytes_until_cut = trap.num_passed_bytes
        return chunk

    @staticmethod
    def _pass_reply(connection: Connection, chunk: bytes) -> bytes | None:
        if connection.bytes_until_cut is None:
            return chunk
        if len(chunk) <= connection.bytes_until_cut:
            connection.bytes_until_cut -= len(chunk)
            return chunk
        connection.client.write(chunk[: connection.bytes_until_cut])
        return None
