"""The tables that `simulate_fleet.py` prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WAIT_COLUMNS = ("wait p50", "p95", "p99", "max", "p99 of high", "p99 of low")


def row(figures: Mapping[str, Any]) -> Iterator[str]:
    """Show the figures of one simulation."""
    yield f"{figures['jobs_per_hour']:.0f}"
    yield f"{figures['busy_share']:.1%}"
    yield f"{figures['loading_share']:.1%}"
    yield f"{figures['num_loads']}"
    yield f"{figures['mean_in_system_seconds']:.1f} s"
    waits = figures["waits"]
    for name in ("p50_seconds", "p95_seconds", "p99_seconds", "max_seconds"):
        yield f"{waits['all'][name]:.1f} s"
    for priority in ("high", "low"):
        yield f"{waits[priority]['p99_seconds']:.1f} s" if priority in waits else "-"


def spread(ratios: Sequence[float]) -> str:
    """Show mean, least and most."""
    if not ratios:
        return "a job waited too long"
    return f"{sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
