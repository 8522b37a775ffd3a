"""Measures how busy the lane is, and how soon a `high` job begins, with runs that wait in place of a device."""

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench_photos import Photo, make_camera_photos
from bench_report import Figure, Target
from bench_servers import BenchFailed
from bench_stack import Stack

# 1 to 12 megapixels, as cameras and phones make them.
MEGAPIXELS = (12, 3, 8, 1, 5, 2, 12, 6, 4, 10, 1, 7)
# (milliseconds of a job, steps, target).
LANE_RUNS = ((250, 5, 98.0), (2000, 10, 99.5))
_SEEDS = itertools.count(1)
_HIGH_STEP_MILLISECONDS = 250
_NORMAL_STEPS = 8
_SLACK_MILLISECONDS = 50


def measure_busy(stack: Stack, folder: Path, *, num_jobs: Sequence[int], seed: int) -> Iterator[Figure]:
    """Run as many jobs as are asked for with short runs and with long ones, on photos of 1 to 12 megapixels."""
    uploads = stack.upload(make_camera_photos(folder, MEGAPIXELS, seed=seed))
    for count, (job_milliseconds, num_steps, target) in zip(num_jobs, LANE_RUNS, strict=True):
        runs = _run_jobs(stack, uploads, count, job_milliseconds, num_steps)
        yield from _busy_figures(runs, job_milliseconds / 1000, num_steps, target)


def _run_jobs(
    stack: Stack, uploads: Sequence[str], num_jobs: int, job_milliseconds: int, num_steps: int
) -> list[dict[str, float]]:
    """Submit all at once and wait for the last commit; returns the runs as they followed one another."""
    seeds = [next(_SEEDS) for _ in range(num_jobs)]
    items = [
        {"upload_id": upload, "params": {"seed": seed}}
        for seed, upload in zip(seeds, itertools.cycle(uploads), strict=False)
    ]
    params = {"num_inference_steps": num_steps, "step_milliseconds": job_milliseconds // num_steps}
    batch = stack.submit(items, defaults={"params": params})
    jobs = {job["params"]["seed"]: job["id"] for job in batch["jobs"]}
    stack.wait_succeeded([*jobs.values()], patience_seconds=120 + num_jobs * job_milliseconds / 200)
    runs, staged = stack.runs(), stack.staged_at()
    return sorted(({**runs[seed], "staged": staged[job]} for seed, job in jobs.items()), key=lambda run: run["called"])


def _busy_figures(
    runs: Sequence[Mapping[str, float]], job_seconds: float, num_steps: int, target: float
) -> Iterator[Figure]:
    span_seconds = runs[-1]["waited"] - runs[0]["called"]
    yield Figure(
        f"lane busy, {len(runs)} jobs that keep the device {job_seconds * 1000:g} ms in {num_steps} steps",
        100 * len(runs) * job_seconds / span_seconds,
        "%",
        f"{len(runs) * job_seconds:.1f} s on the timer within {span_seconds:.2f} s; photos of 1 to 12 MP, 1-MP results",
        Target("at least", target),
    )
    pairs = [*itertools.pairwise(runs)]
    gaps_ms = [1000 * (after["called"] - before["waited"]) for before, after in pairs]
    # The lane had nothing to do: the photo of the next job was not there yet.
    starved_ms = [1000 * max(0.0, after["staged"] - before["ended"]) for before, after in pairs]
    between_ms = statistics.fmean(1000 * (after["prepared"] - before["ended"]) for before, after in pairs)
    build_ms = statistics.fmean(1000 * (run["built"] - run["prepared"]) for run in runs)
    start_ms = statistics.fmean(1000 * (run["called"] - run["built"]) for run in runs)
    steps_ms = statistics.fmean(1000 * (run["waited"] - run["called"] - job_seconds) for run in runs)
    yield Figure(
        f"between two jobs of {job_seconds * 1000:g} ms",
        statistics.fmean(gaps_ms),
        "ms",
        f"mean; median {statistics.median(gaps_ms):.1f}, longest {max(gaps_ms):.1f}; of the mean {between_ms:.2f} from "
        f"the end of a run to the next ({statistics.fmean(starved_ms):.2f} of it until the photo was ready, in "
        f"{sum(one > 0 for one in starved_ms)} of {len(pairs)} gaps), {build_ms:.2f} to build the call, {start_ms:.2f} "
        f"to start it; besides, {steps_ms / num_steps:.2f} for each step that is handed over",
    )


def measure_high(stack: Stack, photos: Sequence[Photo], *, num_jobs: int, seed: int) -> Iterator[Figure]:
    """Submit `high` jobs one by one while `normal` ones wait without end, each at a random moment of some step."""
    draw = random.Random(seed)  # noqa: S311 (seeded, so that a run can be repeated)
    uploads = stack.upload(photos)
    step = {"step_milliseconds": _HIGH_STEP_MILLISECONDS}
    # More than can run meanwhile: a `high` job takes about a second from one to the next.
    num_normal = 10 + round(num_jobs * 1000 / (_NORMAL_STEPS * _HIGH_STEP_MILLISECONDS))
    items = [{"upload_id": uploads[0], "params": {"seed": next(_SEEDS)}} for _ in range(num_normal)]
    normal = stack.submit(items, defaults={"params": {**step, "num_inference_steps": _NORMAL_STEPS}})
    stack.wait_for(lambda: bool({job["id"] for job in normal["jobs"]} & stack.log.times("job.claimed").keys()))
    time.sleep(1)
    late_ms = sorted(_time_high(stack, uploads[1], step, draw) for _ in range(num_jobs))
    still_queued = {job["id"] for job in normal["jobs"]} - stack.log.times("job.claimed").keys()
    if not still_queued:
        raise BenchFailed(f"the {num_normal} normal jobs were done before the high ones: nothing was measured")
    stack.call(f"/v1/batches/{normal['id']}/cancel")
    yield Figure(
        f"a high job under a load of normal ones begins, steps of {_HIGH_STEP_MILLISECONDS} ms, p99",
        percentile(late_ms, 99),
        "ms",
        f"from its 201, {num_jobs} jobs; median {statistics.median(late_ms):.0f}, longest {late_ms[-1]:.0f}; "
        "its photo has 2 MP",
        Target("under", _HIGH_STEP_MILLISECONDS + _SLACK_MILLISECONDS),
    )


def _time_high(stack: Stack, upload: str, step: Mapping[str, int], draw: random.Random) -> float:
    time.sleep(draw.uniform(0.1, 0.6))
    seed = next(_SEEDS)
    items = [{"upload_id": upload, "params": {"seed": seed, "num_inference_steps": 1, **step}}]
    stack.submit(items, priority="high")
    answered = time.monotonic()
    stack.wait_for(lambda: seed in stack.runs())
    return 1000 * (stack.runs()[seed]["called"] - answered)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many per cent do not exceed; `values` rise."""
    return values[min(len(values) - 1, -(-len(values) * int(percent) // 100) - 1)]
