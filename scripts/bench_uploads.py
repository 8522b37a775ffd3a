"""Measures how long photos take from the client's disk to an accepted batch, over lines of several lengths."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import httpx
from bench_calls import accept, open_client
from bench_photos import Photo
from bench_report import Figure, Target
from bench_servers import Servers

from server.ports import free_ports

TARGET = Target("at least", 10)
# The sizes and lines that the target is for.
_TARGET_KB, _TARGET_RTT_MS = 300, 60


def measure_uploads(
    servers: Servers, photos_by_kb: Mapping[int, Sequence[Photo]], *, rtts_ms: Sequence[float], repetitions: int
) -> Iterator[Figure]:
    """Compare one batch of all photos with as many batches of one photo, one after another.

    Both make the same calls (forms, transfers to the store, submission), with connections that are kept open. The
    digests of the photos are known beforehand. Photos of 1 MB and more are sent in one repetition only.
    """
    api_port, store_port = free_ports(2)
    environment = {
        "RESTAGE__STORE__PUBLIC_ENDPOINT": f"127.0.0.1:{store_port}",
        # As long as its form can be used, a photo is not offered in place of sending it again.
        "RESTAGE__LIMITS__FORM_TTL_SECONDS": "43200",
    }
    with servers.api(**environment) as api:
        targets = {api_port: api.port, store_port: servers.store.ports[0]}
        for size_kb, photos in photos_by_kb.items():
            num_runs = repetitions if size_kb < 1000 else 1
            for rtt_ms in rtts_ms:
                with servers.proxy(targets, rtt_ms=rtt_ms):
                    compared = asyncio.run(_compare(f"http://127.0.0.1:{api_port}", photos, num_runs))
                yield _figure(size_kb, rtt_ms, len(photos), num_runs, *compared)


def _figure(
    size_kb: int, rtt_ms: float, num_photos: int, num_runs: int, batch_seconds: float, single_seconds: float
) -> Figure:
    runs = "one run" if num_runs == 1 else f"medians of {num_runs}"
    return Figure(
        f"{num_photos} photos of {size_kb} kB accepted, {rtt_ms:g} ms round trip: one batch against one by one",
        single_seconds / batch_seconds,
        "x faster",
        f"{batch_seconds:.2f} s against {single_seconds:.2f} s, {runs}",
        TARGET if (size_kb, rtt_ms) == (_TARGET_KB, _TARGET_RTT_MS) else None,
    )


async def _compare(url: str, photos: Sequence[Photo], num_runs: int) -> tuple[float, float]:
    """Time both ways in turn; returns the medians in seconds, the batch first."""
    batch_seconds, single_seconds = [], []
    async with open_client(url) as client:
        await accept(client, photos[:2])
    for _ in range(num_runs):
        async with open_client(url) as client:
            batch_seconds.append(await _time(client, [photos]))
        async with open_client(url) as client:
            single_seconds.append(await _time(client, [[photo] for photo in photos]))
    return statistics.median(batch_seconds), statistics.median(single_seconds)


async def _time(client: httpx.AsyncClient, batches: Sequence[Sequence[Photo]]) -> float:
    start = time.perf_counter()
    for photos in batches:
        await accept(client, photos)
    return time.perf_counter() - start
