"""What became of a simulated fleet's jobs, in figures."""

from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.jobs import Priority


@dataclass(frozen=True)
class Quantiles:
    """How long jobs waited, in seconds."""

    num_jobs: int
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    max_seconds: float


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Summarise; of nothing everything is 0. A quantile is the smallest value that so many do not exceed."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    return Quantiles(len(ordered), at(0.5), at(0.95), at(0.99), ordered[-1] if ordered else 0.0)


@dataclass
class Outcome:
    """Counts, while the simulation runs and after it.

    Attributes:
        num_workers: of the fleet.
        waits_seconds: by priority, from submission until the run began that ended well.
        owner_waits_seconds: likewise, by owner.
        in_system_seconds: over all jobs, from submission to the end.
        worked_seconds: on devices, by runs that ended well.
        lost_seconds: likewise, by runs that were cut off.
        loading_seconds: on devices, by loads.
        num_loads: of models.
        num_evictions: of models, to make room for another.
        num_deaths: of workers.
        end_seconds: when the last job ended.
        loads: when which worker loaded which model; only kept when asked for.
    """

    num_workers: int
    waits_seconds: dict[Priority, "array[float]"] = field(
        default_factory=lambda: {priority: array("d") for priority in Priority}
    )
    owner_waits_seconds: dict[str, "array[float]"] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    in_system_seconds: float = 0.0
    worked_seconds: float = 0.0
    lost_seconds: float = 0.0
    loading_seconds: float = 0.0
    num_loads: int = 0
    num_evictions: int = 0
    num_deaths: int = 0
    end_seconds: float = 0.0
    loads: list[tuple[float, int, str]] = field(default_factory=list[tuple[float, int, str]])

    @property
    def num_jobs(self) -> int:
        """That ended well."""
        return sum(map(len, self.waits_seconds.values()))

    def figures(self) -> dict[str, Any]:
        """Return what is printed, and written as JSON."""
        device_seconds = max(self.num_workers * self.end_seconds, 1e-9)
        num_jobs = max(self.num_jobs, 1)
        every = [seconds for waits in self.waits_seconds.values() for seconds in waits]
        return {
            "num_jobs": self.num_jobs,
            "jobs_per_hour": 3600 * self.num_jobs / max(self.end_seconds, 1e-9),
            "hours": self.end_seconds / 3600,
            "busy_share": self.worked_seconds / device_seconds,
            "loading_share": self.loading_seconds / device_seconds,
            "lost_share": self.lost_seconds / device_seconds,
            "num_loads": self.num_loads,
            "num_evictions": self.num_evictions,
            "jobs_per_load": num_jobs / max(self.num_loads, 1),
            "num_deaths": self.num_deaths,
            "mean_in_system_seconds": self.in_system_seconds / num_jobs,
            "waits": {
                name: vars(quantiles(seconds))
                for name, seconds in [
                    ("all", every),
                    *((priority.value, self.waits_seconds[priority]) for priority in Priority),
                ]
                if len(seconds) > 0
            },
        }
