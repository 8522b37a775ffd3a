"""Measure how fast photos are accepted, forms and status are answered, and what memory a large form takes.

`python scripts/bench_submit.py` runs every part against a Valkey, a SeaweedFS and API processes of its own, on loopback
and in a temporary folder; no worker and no GPU is needed. Each figure is printed with its target. The exit status is 0
also where a target is missed, and 1 where something could not be measured.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from bench_answers import measure_forms, measure_status
from bench_ledger import measure_submit
from bench_memory import measure_memory
from bench_options import count, list_of, one_of
from bench_photos import Photo, make_photos
from bench_report import Figure
from bench_run import FAILURES, BenchRun
from bench_servers import Servers
from bench_uploads import measure_uploads

PARTS = ("upload", "submit", "forms", "status", "memory")
NUM_PHOTOS = 50
_MEMORY_KB = 10_000
_STATUS_KB = 300


def main() -> int:
    """Measure, print, and clean up whatever happens."""
    options = read_options()
    run = BenchRun(options)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
        try:
            with Servers(Path(folder)) as servers:
                for part in parts(servers, options):
                    for figure in part():
                        print(figure, flush=True)
                        figures.append(figure)
        except FAILURES as error:
            print(f"bench_submit: {error}", file=sys.stderr)
            return 1
    run.finish(figures)
    return 0


def parts(servers: Servers, options: argparse.Namespace) -> Iterator[Callable[[], Iterator[Figure]]]:
    """Name what is to be measured, in order. Photos are made when they are first needed."""

    @cache
    def photos(size_kb: int) -> list[Photo]:
        folder = servers.folder / "photos" / f"{size_kb}-kB"
        return make_photos(folder, NUM_PHOTOS, size_kb * 1000, seed=options.seed)

    repetitions: int = options.repetitions
    many: int = options.calls
    measures: Mapping[str, Callable[[], Iterator[Figure]]] = {
        "upload": lambda: measure_uploads(
            servers,
            {size_kb: photos(size_kb) for size_kb in options.photos_kb},
            rtts_ms=options.rtt,
            repetitions=repetitions,
        ),
        "submit": lambda: measure_submit(servers, num_jobs=NUM_PHOTOS, repetitions=many),
        "forms": lambda: measure_forms(servers, num_files=NUM_PHOTOS, repetitions=many),
        "status": lambda: measure_status(servers, photos(_STATUS_KB), repetitions=many),
        "memory": lambda: measure_memory(servers, photos(_MEMORY_KB)),
    }
    return (measure for name, measure in measures.items() if name in options.only)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=list_of(one_of(PARTS)), default=[*PARTS], help=f"some of {','.join(PARTS)} (default: all)")
    add("--rtt", type=list_of(_milliseconds), default=[0, 30, 60], help="round trips in ms (default: 0,30,60)")
    add("--photos-kb", type=list_of(count), default=[300, 5000], help="sizes of photos (default: 300,5000)")
    add("--repetitions", type=count, default=3, help="runs with photos under 1 MB (default: 3); larger ones get one")
    add("--calls", type=count, default=40, help="calls of which a median is taken (default: 40)")
    add("--seed", type=count, default=7, help="of the photos (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


def _milliseconds(text: str) -> float:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of milliseconds")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
