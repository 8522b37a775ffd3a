"""Measure how fast others are answered while hundreds of clients send slowly, or follow batches that stand still.

`python scripts/bench_slow_clients.py` runs against a Valkey, a SeaweedFS and one API process of its own, on loopback
and in a temporary folder. Slow clients have a process of their own, so that they do not slow the clock. The exit status
is 0 also where a target is missed, and 1 where something could not be measured.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import httpx
import psutil
from bench_options import count
from bench_report import Figure, Target
from bench_run import FAILURES, BenchRun
from bench_servers import MODEL, Api, BenchFailed, Servers

TARGET = Target("under", 200)
MEMORY_TARGET = Target("under", 300)
_PAUSE_SECONDS = 0.01
# About so often a byte comes from each slow upload.
_DRIP_SECONDS = 0.25
_PATIENCE_SECONDS = 60
# Enough of a PNG for the API, which does not decode: 1000 x 1000 pixels.
_PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000003e8000003e80802000000c2c143b30000000049444154")
_FORM = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n' + _PNG


def main() -> int:
    """Measure, print, and clean up whatever happens."""
    options = read_options()
    run = BenchRun(options)
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
        try:
            with Servers(Path(folder)) as servers:
                figures = list(measure(servers, options))
        except FAILURES as error:
            print(f"bench_slow_clients: {error}", file=sys.stderr)
            return 1
    run.finish(figures)
    return 0


def measure(servers: Servers, options: argparse.Namespace) -> Iterator[Figure]:
    """Measure without slow clients, with each kind, and with both."""
    # Nobody is given up while the measurement lasts.
    patient = {"RESTAGE__SERVER__BODY_TIMEOUT_SECONDS": str(10 * options.seconds + 60)}
    uploads, streams = options.uploads, options.streams
    with servers.api(**patient) as api:
        events = f"/v1/batches/{_submit(api)}/events"
        for name, num_uploads, num_streams in (
            ("alone", 0, 0),
            (f"beside {uploads} slow uploads", uploads, 0),
            (f"beside {streams} idle streams", 0, streams),
            (f"beside {uploads} slow uploads and {streams} idle streams", uploads, streams),
        ):
            with _slow_clients(api.port, events, num_uploads, num_streams, options.seed):
                times_ms = sorted(_time_probes(api.port, options.seconds))
            p50, p99 = times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)]
            detail = f"p99 of {len(times_ms)} calls in {options.seconds} s; p50 {p50:.1f}, max {times_ms[-1]:.1f} ms"
            target = TARGET if num_uploads and num_streams else None
            yield _told(Figure(f"/health/live {name}", p99, "ms", detail, target))
        after_mb = psutil.Process(api.pid).memory_info().rss / 1e6
        yield _told(
            Figure("memory of the API", _peak_mb(api.pid), "MB", f"peak; {after_mb:.0f} MB after", MEMORY_TARGET)
        )


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def _told(figure: Figure) -> Figure:
    print(figure, flush=True)
    return figure


def _submit(api: Api) -> str:
    batch = json.dumps({"items": [{"file": "a"}], "defaults": {"model": MODEL}})
    files = {"batch": (None, batch), "a": ("a.png", _PNG)}
    answer = httpx.post(f"{api.url}/v1/batches", files=files, trust_env=False)
    if answer.status_code != 201:
        raise BenchFailed(f"the API answers {answer.status_code}: {answer.text[:500]}")
    return answer.json()["batch"]["id"]


def _time_probes(port: int, seconds: int) -> Iterator[float]:
    """Ask again and again over one connection, as a load balancer does; gives milliseconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_SECONDS)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise BenchFailed(f"/health/live answers {answer.status}")
        yield 1000 * (time.perf_counter() - started)
        time.sleep(_PAUSE_SECONDS)
    connection.close()


@contextmanager
def _slow_clients(port: int, events: str, num_uploads: int, num_streams: int, seed: int) -> Iterator[None]:
    """Keep so many slow clients while the block runs; all are connected when it begins, and still at its end."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    process = spawn.Process(target=_run_clients, args=(port, events, num_uploads, num_streams, seed, barrier))
    process.start()
    try:
        barrier.wait(_PATIENCE_SECONDS)
        yield
        if not process.is_alive():
            raise BenchFailed("a slow client was given up, or refused")
    finally:
        process.kill()
        process.join()


def _run_clients(port: int, events: str, num_uploads: int, num_streams: int, seed: int, barrier: Barrier) -> None:
    asyncio.run(_keep_clients(port, events, num_uploads, num_streams, random.Random(seed), barrier))  # noqa: S311 (pauses)


async def _keep_clients(
    port: int, events: str, num_uploads: int, num_streams: int, random_: random.Random, barrier: Barrier
) -> None:
    async with asyncio.TaskGroup() as clients:
        ready = [asyncio.Event() for _ in range(num_uploads + num_streams)]
        for number, one in enumerate(ready):
            pause_seconds = random_.uniform(0.5, 1.5) * _DRIP_SECONDS
            is_upload = number < num_uploads
            clients.create_task(_drip(port, pause_seconds, one) if is_upload else _follow(port, events, one))
        for one in ready:
            await one.wait()
        await asyncio.to_thread(barrier.wait)
        await asyncio.Event().wait()


async def _drip(port: int, pause_seconds: float, ready: asyncio.Event) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    writer.write(head + b"Content-Length: 10000000\r\n\r\n" + _FORM)
    answer = asyncio.create_task(reader.read(1))
    while not answer.done():
        writer.write(b"\0")
        await writer.drain()
        ready.set()
        await asyncio.sleep(pause_seconds)
    raise ConnectionError("an upload was ended")


async def _follow(port: int, events: str, ready: asyncio.Event) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {events} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    if b" 200 " not in await reader.readline():
        raise ConnectionError("a stream was refused")
    ready.set()
    while await reader.read(65_536):
        pass
    raise ConnectionError("a stream was ended")


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--uploads", type=count, default=200, help="forms that are sent slowly (default: 200)")
    add("--streams", type=count, default=200, help="event streams that stand still (default: 200)")
    add("--seconds", type=count, default=15, help="how long each measurement takes (default: 15)")
    add("--seed", type=count, default=7, help="of the pauses between bytes (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
