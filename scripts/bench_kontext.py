"""Compares the whole server, from the first claim to the last commit, with a bare loop over the same real pipeline."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from bench_photos import Photo
from bench_report import Figure, Target
from bench_servers import REPOSITORY, BenchFailed, Servers
from bench_stack import KONTEXT_MODEL, Stack, open_stack

TARGET = Target("at least", 0.85)
_CALL_SECONDS = 0.1
_PROMPT = "A bright living room."
_WARM_UPS = 5


class BareLoop:
    """A process that calls the pipeline and does nothing else, as a context; it idles while it is not asked."""

    def __init__(self, servers: Servers, photos: Sequence[Photo]) -> None:
        environment = servers.environment(
            RESTAGE__MODELS__ENABLED=json.dumps([KONTEXT_MODEL]),
            RESTAGE__MODELS__DEFAULT=KONTEXT_MODEL,
            RESTAGE__MODELS__WEIGHTS_DIR=str(servers.folder / "weights"),
        )
        program = str(REPOSITORY / "scripts" / "bench_bare_loop.py")
        self._process = subprocess.Popen(  # noqa: S603 (the command is ours)
            [sys.executable, program, KONTEXT_MODEL, *(str(photo.path) for photo in photos)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        # At the end of its input it ends.
        self._process.communicate()

    def time_call(self, num_steps: int, num_calls: int, clock: str = "seconds") -> float:
        """Return the seconds that a call takes, on average.

        Args:
            num_steps: of each call.
            num_calls: how many.
            clock: `seconds` that pass, or `cpu_seconds` of the processor.

        Raises:
            BenchFailed: the process ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchFailed("the bare loop has no pipes")
        self._process.stdin.write(json.dumps({"num_inference_steps": num_steps, "num_calls": num_calls}) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise BenchFailed(f"the bare loop ended with status {self._process.wait()}")
        return json.loads(answer)[clock] / num_calls

    def steps_of_a_call(self) -> int:
        """Find how many steps make a call of about 100 ms on one core that nobody else uses."""
        self.time_call(2, _WARM_UPS)
        few, many = (self.time_call(num_steps, _WARM_UPS, "cpu_seconds") for num_steps in (2, 12))
        step_seconds = max(1e-4, (many - few) / 10)
        return max(1, min(100, 2 + round((_CALL_SECONDS - few) / step_seconds)))


@dataclass(frozen=True)
class StackTimes:
    """Seconds a job: from first claim to last commit over the jobs; on the device; and what the stages took."""

    job_seconds: float
    device_seconds: float
    fetch_seconds: float
    store_seconds: float


def measure_kontext(servers: Servers, photos: Sequence[Photo], *, num_jobs: int, rounds: int) -> Iterator[Figure]:
    """Run both in turn, so that what changes on the machine changes for both; the other idles meanwhile."""
    with open_stack(servers, KONTEXT_MODEL) as stack, BareLoop(servers, photos) as bare:
        num_steps = bare.steps_of_a_call()
        uploads = stack.upload(photos)
        _run_jobs(stack, uploads, _WARM_UPS, num_steps)
        bare_seconds: list[float] = []
        times: list[StackTimes] = []
        for _ in range(rounds):
            bare_seconds.append(bare.time_call(num_steps, num_jobs))
            times.append(_run_jobs(stack, uploads, num_jobs, num_steps))
    yield from _figures(bare_seconds, times, num_jobs, num_steps)


def _run_jobs(stack: Stack, uploads: Sequence[str], num_jobs: int, num_steps: int) -> StackTimes:
    items = [{"upload_id": uploads[number % len(uploads)], "params": {"seed": number}} for number in range(num_jobs)]
    batch = stack.submit(items, defaults={"prompt": _PROMPT, "params": {"num_inference_steps": num_steps}})
    jobs = [job["id"] for job in batch["jobs"]]
    stack.wait_succeeded(jobs)
    claimed, done = stack.log.times("job.claimed"), stack.log.times("job.succeeded")
    ends = stack.log.fields("job.succeeded")

    def mean(field: str) -> float:
        return statistics.fmean(ends[job][field] for job in jobs)

    span_seconds = max(done[job] for job in jobs) - min(claimed[job] for job in jobs)
    return StackTimes(span_seconds / num_jobs, mean("run_seconds"), mean("fetch_seconds"), mean("store_seconds"))


def _figures(
    bare_seconds: Sequence[float], times: Sequence[StackTimes], num_jobs: int, num_steps: int
) -> Iterator[Figure]:
    bare = statistics.fmean(bare_seconds)
    job, device, fetch, store = (
        statistics.fmean(getattr(one, name) for one in times)
        for name in ("job_seconds", "device_seconds", "fetch_seconds", "store_seconds")
    )
    ratios = [alone / one.job_seconds for alone, one in zip(bare_seconds, times, strict=True)]
    yield Figure(
        "throughput of the whole stack against a bare loop, tiny Kontext",
        bare / job,
        "x",
        f"{len(times)} times {num_jobs} jobs of {num_steps} steps in turn: {1000 * bare:.1f} ms a call against "
        f"{1000 * job:.1f} ms a job, ratios {', '.join(f'{one:.3f}' for one in ratios)}; photos of 1 MP",
        TARGET,
    )
    yield Figure(
        "the same: what a job takes more on the device than in the loop",
        1000 * (device - bare),
        "ms",
        f"{1000 * device:.1f} ms of the lane against {1000 * bare:.1f} ms; the stages take cores and interpreter",
    )
    yield Figure(
        "the same: what passes between two jobs",
        1000 * (job - device),
        "ms",
        f"beside the device, meanwhile: {1000 * fetch:.1f} ms to fetch and decode, {1000 * store:.1f} ms to encode and "
        "store",
    )
