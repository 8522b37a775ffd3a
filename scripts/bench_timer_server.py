"""Run `restage api` or `restage worker` with one family more, whose steps wait on a timer; for benchmarks alone.

Nothing in the product reaches that family: it lies in a folder that only this command adds to those of `pipelines`.
"""

from pathlib import Path

import pipelines

FAMILIES = Path(__file__).resolve().parent / "bench_families"

if __name__ == "__main__":
    pipelines.__path__.append(str(FAMILIES))
    from server.cli import restage

    restage()
