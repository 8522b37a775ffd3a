"""Measures the server's own time for forms and for the status of a batch, as its processes log it."""

import asyncio
import hashlib
import secrets
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import redis
from bench_calls import accept, announcement, open_client
from bench_photos import Photo
from bench_report import Figure, Target
from bench_servers import MODEL, Api, BenchFailed, Servers

from server.jobs import Job, JobOutput
from server.ledger.worker_side import WorkerLedger, connect
from server.settings import Settings

_WARM_UPS = 5
_WATCHED_READS = 10
FORMS_TARGET = Target("under", 10)
STATUS_TARGET = Target("under", 10)
ROUND_TRIPS_TARGET = Target("exactly", 1)
# Nothing of the API but the reads is seen in Valkey then, besides its one reader of changes.
_QUIET = {"RESTAGE__SWEEP__INTERVAL_SECONDS": "100000", "RESTAGE__WORKER__LEASE_SECONDS": "1000000"}
_READER_OF_CHANGES = "XREAD"


def measure_forms(servers: Servers, *, num_files: int, repetitions: int) -> Iterator[Figure]:
    """Ask for `num_files` forms at once, again and again."""
    with servers.api() as api, _http(api) as http:
        for number in range(_WARM_UPS + repetitions):
            files = [announcement(_invent_photo(number, index)) for index in range(num_files)]
            response = http.post("/v1/uploads", json={"files": files}, headers=_named(number))
            if response.status_code != 201 or len(response.json()["uploads"]) != num_files:
                raise BenchFailed(f"the API answers {response.status_code}: {response.text[:500]}")
        yield _server_time(f"{num_files} forms, server time", api, repetitions, FORMS_TARGET)


def measure_status(servers: Servers, photos: Sequence[Photo], *, repetitions: int) -> Iterator[Figure]:
    """Read a batch of finished jobs, each with a signed URL."""
    with servers.api(**_QUIET) as api, _http(api) as http:
        batch_id = asyncio.run(_submit(api, photos))
        _finish_all(servers.settings(), len(photos))
        for number in range(_WARM_UPS + repetitions):
            _read(http, batch_id, len(photos), number)
        name = f"status of a batch of {len(photos)} finished jobs"
        yield _server_time(f"{name}, server time", api, repetitions, STATUS_TARGET)
        num_commands = _count_commands(servers, lambda: _read(http, batch_id, len(photos), None))
        yield Figure(
            f"{name}, commands to Redis",
            num_commands / _WATCHED_READS,
            "round trips",
            f"{num_commands} commands for {_WATCHED_READS} reads, seen by MONITOR",
            ROUND_TRIPS_TARGET,
        )


def _http(api: Api) -> httpx.Client:
    return httpx.Client(base_url=api.url, trust_env=False, timeout=30)


def _named(number: int) -> dict[str, str]:
    return {"X-Request-Id": f"measured-{number}"}


def _server_time(name: str, api: Api, repetitions: int, target: Target) -> Figure:
    by_id = api.server_seconds()
    times_ms = sorted(1000 * by_id[f"measured-{number}"] for number in range(_WARM_UPS, _WARM_UPS + repetitions))
    detail = f"median of {repetitions} request.answered events; slowest {times_ms[-1]:.1f} ms"
    return Figure(name, statistics.median(times_ms), "ms", detail, target)


def _invent_photo(number: int, index: int) -> Photo:
    name = f"photo-{number}-{index + 1:02d}.jpg"
    return Photo(Path(name), 300_000, hashlib.sha256(name.encode()).hexdigest())


async def _submit(api: Api, photos: Sequence[Photo]) -> str:
    async with open_client(api.url) as client:
        return (await accept(client, photos))["id"]


def _finish_all(settings: Settings, num_jobs: int) -> None:
    """Do as a worker does whose runs take no time; the results need not exist to be told."""
    with connect(settings.redis) as client:
        ledger = WorkerLedger(client, worker_id="bench", key_prefix=settings.redis.key_prefix, lease_seconds=600)
        for _ in range(num_jobs):
            job = ledger.claim([MODEL], num_held=0)
            if not isinstance(job, Job):
                raise BenchFailed("there is no job where there should be one")
            ledger.start(job.id, job.fence, on_device=True)
            output = JobOutput(f"{job.id}/{job.fence}/output.webp", "5" * 64, "image/webp", 1024, 1360, 150_000)
            timings = {"fetch": 0.1, "run": 2.5, "store": 0.1}
            reply = ledger.commit(
                job.id,
                job.fence,
                output=output,
                timings=timings,
                params=job.params,
                inputs=job.inputs,
                speeds={"run": 2.5},
            )
            if reply != "ok":
                raise BenchFailed(f"the ledger answers {reply} to a commit")


def _read(http: httpx.Client, batch_id: str, num_jobs: int, number: int | None) -> None:
    response = http.get(f"/v1/batches/{batch_id}", headers={} if number is None else _named(number))
    outputs = [job["output"] for job in response.json()["jobs"]] if response.is_success else []
    if len(outputs) != num_jobs or not all(output and output["url"] for output in outputs):
        raise BenchFailed(f"the API answers {response.status_code}: {response.text[:500]}")


def _count_commands(servers: Servers, read: Callable[[], None]) -> int:
    """Read the batch a few times and count what reaches Valkey; a command of its own is a round trip at most."""
    # Two clients: with one, the last call would have to connect first, which would be seen and counted.
    with redis.Redis.from_url(servers.valkey.url) as client, redis.Redis.from_url(servers.valkey.url) as watcher:
        client.ping()
        with watcher.monitor() as monitor:
            for _ in range(_WATCHED_READS):
                read()
            end = secrets.token_hex(16)
            client.echo(end)
            return sum(_is_round_trip(seen) for seen in _seen_until(monitor, end))


def _seen_until(monitor: Any, end: str) -> Iterator[dict[str, Any]]:
    while end not in (seen := monitor.next_command())["command"]:
        yield seen


def _is_round_trip(seen: dict[str, Any]) -> bool:
    # What a script does inside Redis is none.
    return seen["client_type"] != "lua" and not seen["command"].startswith(_READER_OF_CHANGES)
