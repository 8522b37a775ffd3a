"""Draws what `soak.py` found: jobs, faults, and how soon jobs of killed workers were claimed again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.chaos.figures import find_recoveries
from tests.chaos.stack import LEASE_SECONDS, SWEEP_SECONDS
from tests.chaos.story import tell_story

# Without a screen.
mpl.use("agg")
SIZE_INCHES = (12, 8)
DPI = 100
BIN_SECONDS = 10

Entries = Sequence[Mapping[str, Any]]


def draw(entries: Entries, path: Path) -> None:
    """Draw one PNG with three panels over the same time."""
    begun_at = next(one["at"] for one in entries if one["kind"] == "faults.begun")
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    for axes, paint in zip(panels, (_paint_jobs, _paint_faults, _paint_recoveries), strict=True):
        paint(axes, entries, begun_at)
    panels[-1].set(xlabel="seconds since the first fault might come")
    figure.savefig(path, dpi=DPI)


def _paint_jobs(axes: Axes, entries: Entries, begun_at: float) -> None:
    accepted = [one["at"] - begun_at for one in entries if one["kind"] == "submit.accepted" for _ in one["roles"]]
    committed = [
        one["at"] - begun_at for one in entries if one["kind"] == "worker.log" and one["event"] == "job.succeeded"
    ]
    end = max([*accepted, *committed, BIN_SECONDS])
    bins = [BIN_SECONDS * number for number in range(int(end / BIN_SECONDS) + 2)]
    for label, moments in (("accepted", accepted), ("committed", committed)):
        axes.hist(moments, bins=bins, histtype="step", label=label)
    axes.set(title="Jobs", ylabel=f"in {BIN_SECONDS} s")
    axes.legend()


def _paint_faults(axes: Axes, entries: Entries, begun_at: float) -> None:
    story = tell_story(entries)
    faults = [*story.faults, *((end["at"], end["at"], "poison") for end in story.ends if end["cause"] == "poison")]
    kinds = sorted({kind for _, _, kind in faults}, reverse=True)
    for begin, end, kind in faults:
        axes.plot([begin - begun_at, end - begun_at], [kinds.index(kind)] * 2, color="firebrick", marker="|")
    axes.set(title="Faults", yticks=range(len(kinds)), yticklabels=kinds)


def _paint_recoveries(axes: Axes, entries: Entries, begun_at: float) -> None:
    found = find_recoveries(entries)
    moments = [one.at - begun_at for one in found]
    axes.plot(moments, [one.seconds for one in found], "o", mfc="none", label="claimed again")
    axes.plot(moments, [one.queued_seconds for one in found], "o", label="queued again")
    axes.axhline(LEASE_SECONDS + SWEEP_SECONDS, linestyle="--", color="grey", label="lease + sweep")
    axes.set(title="Jobs of workers that were killed", ylabel="seconds", ylim=(0, None))
    axes.legend()
