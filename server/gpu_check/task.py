"""What one process measures, and what it found: plain values that travel between processes as JSON files."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

PLAIN = "plain"
# The reason of a result that its process had no time to finish.
UNFINISHED = "it ended before all was measured"

Outcome = Literal["measured", "skipped", "failed"]


def write_json(file: Path, content: Any) -> None:
    """Write a file that is whole at every moment, since its writer may be killed."""
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(json.dumps(content))
    os.replace(unfinished, file)  # noqa: PTH105 - as the rest of the project does it


@dataclass(frozen=True)
class Device:
    """On what the figures were measured, and with what.

    Attributes:
        problem: why nothing can be measured on it; None where it works.
        total_bytes: of the whole device; 0 where that says nothing, as on a CPU.
        capability: of its kernels, such as 9.0; empty on a CPU.
        versions: of driver, torch and other things that change figures.
    """

    device: str
    problem: str | None = None
    name: str = ""
    total_bytes: int = 0
    capability: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what another process wrote."""
        return cls(**json.loads(file.read_text()))


@dataclass(frozen=True)
class Task:
    """One model in one variant, to be measured in a process of its own.

    Attributes:
        model: id of its entry.
        family: folder of `pipelines`.
        pipeline: class in diffusers.
        dtype: of its weights.
        area: at which it reads and makes pictures, in pixels.
        components: name → library, class and configuration of each part that has weights.
        params: of an ordinary job, resolved.
        num_photos: as many as one job may have.
        variant: `plain`, or the name of what is changed.
        optimizations: as an entry would have them.
        device: as torch names it.
        num_steps: of a measured edit.
        repeats: of each measurement.
        build_device: where it is made, if it would not fit into the device as it is made.
        load_dir: an empty folder with room for the model, to measure loading; None not to.
    """

    model: str
    family: str
    pipeline: str
    dtype: str
    area: int
    components: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any]
    num_photos: int
    device: str
    num_steps: int
    repeats: int
    variant: str = PLAIN
    optimizations: Mapping[str, Any] = field(default_factory=dict[str, Any])
    build_device: str | None = None
    load_dir: str | None = None

    def write(self, file: Path) -> None:
        """Write it for another process."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what another process wrote."""
        return cls(**json.loads(file.read_text()))


@dataclass(frozen=True)
class Result:
    """What became of a task.

    Attributes:
        reason: why it was skipped or failed; empty where it was measured.
        figures: name, with its unit → value; also of a task that failed, what it had found by then.
    """

    model: str
    variant: str
    outcome: Outcome
    reason: str = ""
    figures: Mapping[str, float | bool] = field(default_factory=dict[str, float | bool])

    def write(self, file: Path) -> None:
        """Write it for another process."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what another process wrote."""
        return cls(**json.loads(file.read_text()))
