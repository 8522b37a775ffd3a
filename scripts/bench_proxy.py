"""Puts a longer line before servers on loopback: a TCP proxy that holds back every chunk, and limits nothing else.

`python scripts/bench_proxy.py --rtt-ms 60 20001:8000 20002:9000` listens on 20001 and 20002 until it is killed. A new
connection costs one round trip more before its first byte arrives, as the handshake does on a real line.
"""

import argparse
import asyncio
from collections.abc import Mapping

_CHUNK_BYTES = 256 * 1024
# How much a stream reads ahead before it stops reading: more than loopback brings in one go.
_STREAM_BYTES = 1024 * 1024


def main() -> None:
    """Carry bytes until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ports", nargs="+", metavar="LISTEN:TARGET", help="ports of 127.0.0.1")
    parser.add_argument("--rtt-ms", type=float, required=True, help="what a round trip takes longer, in milliseconds")
    options = parser.parse_args()
    pairs = (pair.split(":") for pair in options.ports)
    asyncio.run(carry({int(listen): int(target) for listen, target in pairs}, rtt_seconds=options.rtt_ms / 1000))


async def carry(targets: Mapping[int, int], *, rtt_seconds: float) -> None:
    """Listen on each port of `targets` and carry what comes to the port that it names, until cancelled."""
    line = Line(rtt_seconds)
    servers = [
        await asyncio.start_server(line.accept_for(target), "127.0.0.1", port, limit=_STREAM_BYTES)
        for port, target in targets.items()
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


class Line:
    """Carries connections, each direction half a round trip late."""

    def __init__(self, rtt_seconds: float) -> None:
        self._rtt_seconds = rtt_seconds

    def accept_for(self, target: int):  # noqa: ANN201 (asyncio's callback)
        """Return what takes a new connection and carries it to port `target`."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accept(target, reader, writer)

        return accept

    async def _accept(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened_at = asyncio.get_running_loop().time() + self._rtt_seconds
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target, limit=_STREAM_BYTES)
        except OSError:  # the server is away, which its client must see too
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer, opened_at))
                group.create_task(self._carry(far_reader, writer, opened_at))
        except* OSError:  # one side has cut the connection
            pass
        finally:
            writer.transport.abort()
            far_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opened_at: float) -> None:
        """Carry one direction to its end; `opened_at` is when the client knows that it is connected."""
        loop = asyncio.get_running_loop()
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, chunk = await on_the_way.get()
                if (wait_seconds := due - loop.time()) > 0:
                    await asyncio.sleep(wait_seconds)
                if not chunk:
                    writer.write_eof()
                    return
                writer.write(chunk)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            is_open = True
            while is_open:
                chunk = await reader.read(_CHUNK_BYTES)
                on_the_way.put_nowait((max(loop.time(), opened_at) + self._rtt_seconds / 2, chunk))
                is_open = bool(chunk)
            await delivering
        finally:
            delivering.cancel()


if __name__ == "__main__":
    main()
