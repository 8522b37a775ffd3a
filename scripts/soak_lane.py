"""Keep one real worker at work on a real pipeline for as long as it takes to see whether its memory grows.

`python scripts/soak_lane.py` submits 2,000 jobs of mixed sizes to the tiny Kontext, cancels some of them at random
moments, and after each 200 asks the worker what memory it holds once its garbage is collected and its allocator has
given back what it keeps. The exit status is 0 also where the memory grew, and 1 where a job failed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_options import count
from bench_photos import make_camera_photos
from bench_report import Figure, Target
from bench_run import FAILURES, BenchRun
from bench_servers import REPOSITORY, BenchFailed, Servers
from bench_stack import KONTEXT_MODEL, Stack, open_stack

TARGET = Target("at most", 1.1)
_WORKER = (str(REPOSITORY / "scripts" / "soak_worker.py"),)
_MEGAPIXELS = (0.1, 0.3, 0.5, 1, 1.5, 2, 3)
_SIDES = (64, 96, 128, 160, 208, 256)
_FORMATS = ("webp", "webp", "png", "jpeg")
_CANCELLED_SHARE = 0.15
_WAVE_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Wave:
    """Some jobs that were submitted together: how they ended, and what the worker held afterwards."""

    num_succeeded: int
    num_cancelled: int
    num_cancelled_late: int
    rss_bytes: int


def main() -> int:
    """Measure, print, and clean up whatever happens."""
    options = read_options()
    run = BenchRun(options)
    waves: list[Wave] = []
    with tempfile.TemporaryDirectory(prefix="restage-soak-") as folder:
        try:
            for wave in soak(Path(folder), options):
                waves.append(wave)
                print(f"{len(waves) * options.wave} jobs: {wave.rss_bytes / 1e6:.1f} MB", flush=True)
        except FAILURES as error:
            print(f"soak_lane: {error}", file=sys.stderr)
            return 1
    run.finish([describe(waves, options.wave)], rss_bytes=[one.rss_bytes for one in waves])
    return 0


def soak(folder: Path, options: argparse.Namespace) -> Iterator[Wave]:
    """Run all jobs, wave by wave."""
    draw = random.Random(options.seed)  # noqa: S311 (seeded, so that a run can be repeated)
    with open_worker(folder) as (stack, memory_file):
        uploads = stack.upload(make_camera_photos(folder / "photos", _MEGAPIXELS, seed=options.seed))
        for _ in range(options.jobs // options.wave):
            yield run_wave(stack, memory_file, [draw_item(draw, uploads) for _ in range(options.wave)], draw)


@contextmanager
def open_worker(folder: Path) -> Iterator[tuple[Stack, Path]]:
    """Start all servers, and a worker that can be asked for its memory."""
    memory_file = folder / "memory"
    memory_file.touch()
    with (
        Servers(folder) as servers,
        open_stack(servers, KONTEXT_MODEL, worker=_WORKER, SOAK_MEMORY=str(memory_file)) as stack,
    ):
        yield stack, memory_file


def draw_item(draw: random.Random, uploads: Sequence[str]) -> dict[str, Any]:
    """Describe a job of any size."""
    size: dict[str, Any] = draw.choice(
        [
            {"aspect_ratio": draw.choice(("16:9", "1:1", "3:4"))},
            {"height": draw.choice(_SIDES), "width": draw.choice(_SIDES)},
        ]
    )
    return {
        "upload_id": draw.choice(uploads),
        "params": {"num_inference_steps": draw.randint(1, 3), **size},
        "output": {"format": draw.choice(_FORMATS), "size": draw.choice(("model", "model", "input"))},
    }


def run_wave(stack: Stack, memory_file: Path, items: Sequence[dict[str, Any]], draw: random.Random) -> Wave:
    """Submit jobs, cancel some of them while they wait or run, and look at the worker's memory after the last.

    Raises:
        BenchFailed: a job failed, or the worker ended.
    """
    batch = stack.submit(items, defaults={"prompt": "A bright living room."})
    jobs = [job["id"] for job in batch["jobs"]]
    for job in (one for one in jobs if draw.random() < _CANCELLED_SHARE):
        # Half of them once they are claimed: while their photo is fetched, a step runs, or the result is stored.
        if draw.random() < 0.5:
            stack.wait_for(lambda job=job: job in stack.log.times("job.claimed") or _is_over(stack, batch["id"]))
            time.sleep(draw.uniform(0, 0.15))
        stack.cancel_job(job)
    stack.wait_for(lambda: _is_over(stack, batch["id"]), _WAVE_PATIENCE_SECONDS)
    counts = stack.read(f"/v1/batches/{batch['id']}")["counts"]
    if counts["failed"]:
        raise BenchFailed(stack.worker.describe_end(f"has failed {counts['failed']} jobs"))
    late = stack.log.times("job.cancelled").keys() & {*jobs}
    return Wave(counts["succeeded"], counts["cancelled"], len(late), _ask_memory(stack, memory_file))


def _is_over(stack: Stack, batch_id: str) -> bool:
    time.sleep(0.1)
    batches = stack.read("/v1/batches?limit=5")["data"]
    return any(one["id"] == batch_id and one["status"] == "finished" for one in batches)


def _ask_memory(stack: Stack, memory_file: Path) -> int:
    time.sleep(1)
    num_lines = len(memory_file.read_text().splitlines())
    os.kill(stack.worker.pid or 0, signal.SIGUSR1)
    stack.wait_for(lambda: len(memory_file.read_text().splitlines()) > num_lines)
    return int(memory_file.read_text().splitlines()[-1])


def describe(waves: Sequence[Wave], wave_jobs: int) -> Figure:
    """Compare the memory at the end with that after the first wave."""
    succeeded, cancelled, late = (
        sum(getattr(one, name) for one in waves) for name in ("num_succeeded", "num_cancelled", "num_cancelled_late")
    )
    sizes = ", ".join(f"{one.rss_bytes / 1e6:.0f}" for one in waves)
    return Figure(
        f"memory of the worker after {len(waves) * wave_jobs} jobs against that after {wave_jobs}",
        waves[-1].rss_bytes / waves[0].rss_bytes,
        "x",
        f"{succeeded} succeeded, {cancelled} were cancelled, {late} of them in the worker's hand; MB after each "
        f"{wave_jobs}: {sizes}",
        TARGET,
    )


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--jobs", type=count, default=2000, help="all of them (default: 2000)")
    add("--wave", type=count, default=200, help="jobs after each of which memory is looked at (default: 200)")
    add("--seed", type=count, default=7, help="of photos, sizes and cancels (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write the figure there as well")
    options = parser.parse_args()
    if options.jobs < 2 * options.wave:
        parser.error("--jobs needs at least two waves: one to compare with, and one that is compared")
    return options


if __name__ == "__main__":
    sys.exit(main())
