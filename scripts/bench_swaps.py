"""Compares placement with the best that could have been done, on the published trace, in virtual time."""

from collections.abc import Iterator

from bench_report import Figure, Target
from bench_servers import BenchFailed

from server.simulation.comparing import against_optimum

TARGET = Target("at most", 1.2)


def measure_swaps() -> Iterator[Figure]:
    """Run 1,000 jobs of two models on one simulated device."""
    found = against_optimum()
    if found is None:
        raise BenchFailed("a job of the published trace waited longer than its bound: nothing could be compared")
    yield Figure(
        "two models on one device, published trace: mean time of a job against the offline optimum",
        found.ratio,
        "x",
        f"{found.mean_seconds:.1f} s against {found.optimum_seconds:.1f} s over 1,000 jobs, "
        f"{found.num_loads} loads against {found.optimum_num_loads}; {found.ratio_without_foresight:.3f} x an optimum "
        "that loads nothing ahead of its jobs",
        TARGET,
    )
