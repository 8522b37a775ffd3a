"""Measures what an idle worker costs, and how soon it claims a job."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence

import psutil
from bench_busy import percentile
from bench_photos import Photo
from bench_report import Figure, Target
from bench_servers import Servers
from bench_stack import Stack

_MEDIAN_TARGET, _P99_TARGET = Target("under", 30), Target("under", 150)
_POLLING_TARGET = Target("under", 5)
_QUICK = {"num_inference_steps": 1, "step_milliseconds": 1, "height": 64, "width": 64}
_SETTLE_SECONDS = 3


def measure_idle(
    servers: Servers, stack: Stack, photos: Sequence[Photo], *, num_jobs: int, seconds: float, seed: int
) -> Iterator[Figure]:
    """Watch processes that have nothing to do, then submit jobs one by one, each once the last is committed."""
    time.sleep(_SETTLE_SECONDS)
    shares = _watch({"worker": stack.worker.pid or 0, "Valkey": servers.valkey.child.pid or 0}, seconds)
    yield Figure(
        "polling of an idle worker, with Valkey",
        sum(shares.values()),
        "% of a core",
        f"over {seconds:g} s: {', '.join(f'{name} {share:.2f} %' for name, share in shares.items())}; Valkey also "
        "serves the API meanwhile",
        _POLLING_TARGET,
    )
    upload = stack.upload(photos[:1])[0]
    draw = random.Random(seed)  # noqa: S311 (seeded, so that a run can be repeated)
    waits_ms = sorted(_time_claim(stack, upload, draw) for _ in range(num_jobs))
    detail = f"{num_jobs} jobs at random moments; shortest {waits_ms[0]:.1f}, longest {waits_ms[-1]:.1f}"
    name = "from the 201 to the claim, idle worker"
    yield Figure(f"{name}, median", statistics.median(waits_ms), "ms", detail, _MEDIAN_TARGET)
    yield Figure(f"{name}, p99", percentile(waits_ms, 99), "ms", detail, _P99_TARGET)


def _time_claim(stack: Stack, upload: str, draw: random.Random) -> float:
    """Return from when the answer was there to when the worker says that it has claimed; below 0 where it was first."""
    time.sleep(draw.uniform(0.02, 0.2))
    batch = stack.submit([{"upload_id": upload}], defaults={"params": _QUICK})
    answered_at = time.time()
    job = batch["jobs"][0]["id"]
    stack.wait_succeeded([job])
    return 1000 * (stack.log.times("job.claimed")[job] - answered_at)


def _watch(processes: dict[str, int], seconds: float) -> dict[str, float]:
    """Return what share of a core each process takes, with its children, in per cent."""
    before = {name: _cpu_seconds(pid) for name, pid in processes.items()}
    start = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - start
    return {name: 100 * (_cpu_seconds(pid) - before[name]) / took for name, pid in processes.items()}


def _cpu_seconds(pid: int) -> float:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in family))
