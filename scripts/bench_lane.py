"""Measure what the server adds to the time on the device: between jobs, before a job, and while there is none.

`python scripts/bench_lane.py` runs every part against a Valkey, a SeaweedFS, an API and one worker of its own, on
loopback and in a temporary folder, in about eleven minutes; no GPU is needed. Let nothing else run meanwhile. Each
figure is printed with its target. The exit status is 0 also where a target is missed, and 1 where something could not
be measured. A stand-in for the device, whose steps wait on a timer, lies in scripts/bench_families; only benchmarks
reach it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import psutil
from bench_busy import measure_busy, measure_high
from bench_idle import measure_idle
from bench_kontext import measure_kontext
from bench_options import count, list_of, one_of
from bench_photos import make_camera_photos
from bench_report import Figure
from bench_run import FAILURES, BenchRun
from bench_servers import Servers
from bench_stack import Stack, open_timer_stack
from bench_swaps import measure_swaps

PARTS = ("kontext", "idle", "high", "busy", "swaps")


def main() -> int:
    """Measure, print, and clean up whatever happens."""
    options = read_options()
    run, busy_before = BenchRun(options), busy_seconds()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
        try:
            with Servers(Path(folder)) as servers:
                for figure in measure(servers, options):
                    print(figure, flush=True)
                    figures.append(figure)
        except FAILURES as error:
            print(f"bench_lane: {error}", file=sys.stderr)
            return 1
    # All that we started has ended, and counts as ours.
    others = f"{(busy_seconds() - busy_before - sum(os.times()[:4])) / run.seconds:.2f} cores on average"
    run.machine["others meanwhile"] = others
    run.finish(figures, remark=f"; others used {others}")
    return 0


def busy_seconds() -> float:
    """Return for how long the cores of this machine have worked, all together; others at work spoil every figure."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def measure(servers: Servers, options: argparse.Namespace) -> Iterator[Figure]:
    """Measure the parts that are asked for, in order."""
    photos = make_camera_photos(servers.folder / "photos", [1] * 8, seed=options.seed)
    if "kontext" in options.parts:
        yield from measure_kontext(servers, photos, num_jobs=options.kontext_jobs, rounds=options.rounds)
    # One worker with the timer for all parts that need it, and none while others are measured.
    with ExitStack() as cleanup:

        @cache
        def timer() -> Stack:
            return cleanup.enter_context(open_timer_stack(servers))

        yield from (figure for part in timer_parts(servers, timer, options) for figure in part())
    if "swaps" in options.parts:
        yield from measure_swaps()


def timer_parts(
    servers: Servers, timer: Callable[[], Stack], options: argparse.Namespace
) -> Iterator[Callable[[], Iterator[Figure]]]:
    """Name what is measured with runs that wait on a timer."""
    seed: int = options.seed
    num_jobs: list[int] = options.jobs
    photos = make_camera_photos(servers.folder / "photos", [1, 2], seed=seed)
    measures: Mapping[str, Callable[[], Iterator[Figure]]] = {
        "idle": lambda: measure_idle(
            servers, timer(), photos, num_jobs=options.single_jobs, seconds=options.idle_seconds, seed=seed
        ),
        "high": lambda: measure_high(timer(), photos, num_jobs=options.high_jobs, seed=seed),
        "busy": lambda: measure_busy(timer(), servers.folder / "camera", num_jobs=num_jobs, seed=seed),
    }
    return (measure for name, measure in measures.items() if name in options.parts)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=list_of(one_of(PARTS)), default=[*PARTS], help=f"some of {','.join(PARTS)} (default: all)")
    add("--jobs", type=list_of(count), default=[200, 200], help="jobs of 250 ms and of 2 s (default: 200,200)")
    add("--kontext-jobs", type=count, default=100, help="jobs of each round with the real pipeline (default: 100)")
    add("--rounds", type=count, default=3, help="rounds of loop and stack in turn (default: 3)")
    add("--single-jobs", type=count, default=200, help="jobs for an idle worker (default: 200)")
    add("--high-jobs", type=count, default=60, help="high jobs under load (default: 60)")
    add("--idle-seconds", type=count, default=60, help="how long an idle worker is watched (default: 60)")
    add("--seed", type=count, default=7, help="of photos and moments (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    if len(options.jobs) != 2:
        parser.error("--jobs needs two numbers, such as 200,60")
    return options


if __name__ == "__main__":
    sys.exit(main())
