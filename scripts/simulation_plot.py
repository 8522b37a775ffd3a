"""Draws what `simulate_fleet.py` found: one panel for each part that was simulated."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Without a screen.
mpl.use("agg")
PANEL_INCHES = 4.2
DPI = 100


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the parts that are there into one PNG."""
    panels = [(part, paint) for part, paint in _PANELS.items() if part in found]
    figure = Figure(figsize=(PANEL_INCHES * max(1, len(panels)), PANEL_INCHES), layout="constrained")
    for number, (part, paint) in enumerate(panels, start=1):
        paint(figure.add_subplot(1, len(panels), number), found[part])
    figure.savefig(path, dpi=DPI)


def _paint_fleet(axes: Axes, found: Mapping[str, Any]) -> None:
    names = ("p50_seconds", "p95_seconds", "p99_seconds", "max_seconds")
    for policy, figures in found.items():
        waits = [max(0.1, figures["waits"]["all"][name]) for name in names]
        axes.plot([name.removesuffix("_seconds") for name in names], waits, marker="o", label=policy)
    axes.set(title="Waits of one fleet", ylabel="seconds", yscale="log")
    axes.legend()


def _paint_sizes(axes: Axes, found: list[dict[str, Any]]) -> None:
    for name, label in (("load", "placement"), ("load_if_all_fit", "if all models fitted")):
        axes.plot([one["num_workers"] for one in found], [100 * one[name] for one in found], marker="o", label=label)
    axes.legend()
    axes.set(title="How busy GPUs may be kept", xlabel="GPUs", ylabel="% busy with jobs", xscale="log", ylim=(0, 100))


def _paint_waits(axes: Axes, found: list[dict[str, Any]]) -> None:
    axes.plot([one["max_wait_seconds"] for one in found], [one["mean_in_system_seconds"] for one in found], marker="o")
    axes.set(
        title="One busy GPU, two models", xlabel="max_wait_seconds", ylabel="mean seconds in system", ylim=(0, None)
    )


def _paint_optimum(axes: Axes, found: Mapping[str, Any]) -> None:
    for load_seconds in sorted({one["load_seconds"] for one in found["tables"]}):
        lines = [one for one in found["tables"] if one["load_seconds"] == load_seconds and one["found"]]
        means = [sum(each["ratio"] for each in one["found"]) / len(one["found"]) for one in lines]
        axes.plot([100 * one["load"] for one in lines], means, marker="o", label=f"loads of {load_seconds:g} s")
    axes.set(title="Time in system over the optimum", xlabel="% busy with jobs", ylim=(1, None))
    axes.legend()


_PANELS: Mapping[str, Callable[[Axes, Any], None]] = {
    "fleet": _paint_fleet,
    "sizes": _paint_sizes,
    "waits": _paint_waits,
    "optimum": _paint_optimum,
}
