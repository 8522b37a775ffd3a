"""What was measured, as JSON and as a page in Markdown, with the machine and the command that it came from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pipelines.memory_plan import ModelMemory, needed_bytes
from server.gpu_check.task import PLAIN, Device, Result

GIB = 2**30
EXPLANATION = (
    "Random weights: speed and memory are those of the real architectures, the pictures mean nothing. One edit is one "
    "photo at the model's own area; the peak is that of the largest job, with as many photos as it may have and a long "
    "prompt. *Bare* is a plain call of the pipeline, all else are runs that stop after each step, as the lane does."
)


@dataclass(frozen=True)
class Report:
    """One run of the check.

    Attributes:
        device: what it ran on.
        date: day and time it began, in UTC, ISO 8601.
        command: that was called.
        plans: model → what the memory plan says of it.
        results: in the order in which they were found; of each model the plain one first.
    """

    device: Device
    date: str
    command: str
    plans: Mapping[str, ModelMemory]
    results: Sequence[Result]

    def of(self, model: str, variant: str = PLAIN) -> Result | None:
        """Find one result."""
        return next((one for one in self.results if (one.model, one.variant) == (model, variant)), None)


def as_json(report: Report) -> str:
    """Write all of it."""
    return json.dumps(asdict(report), indent=2)


def as_markdown(report: Report) -> str:
    """Write it for people."""
    device = report.device
    memory = f", {device.total_bytes / GIB:.1f} GiB" if device.total_bytes else ""
    capability = f", compute capability {device.capability}" if device.capability else ""
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    models = list(dict.fromkeys(one.model for one in report.results))
    parts = [
        f"**{device.name}** (`{device.device}`{memory}{capability}); {versions}. {report.date}, `{report.command}`.",
        EXPLANATION,
        _table(SPEED_COLUMNS, [_speed_row(report, model) for model in models]),
        _table(MEMORY_COLUMNS, [_memory_row(report, model) for model in models]),
        _table(REACTION_COLUMNS, [_reaction_row(report, model) for model in models]),
    ]
    loaded = [_load_row(report, model) for model in models if "load_seconds" in _figures(report, model)]
    if loaded:
        parts.append(_table(LOAD_COLUMNS, loaded))
    variants = [_variant_row(report, one) for one in report.results if one.variant != PLAIN]
    if variants:
        parts.append(_table(VARIANT_COLUMNS, variants))
    return "\n\n".join(parts) + "\n"


SPEED_COLUMNS = (
    "model",
    "bare, steps/s",
    "in steps, steps/s",
    "bare edit, s",
    "edit in steps, s",
    "lane adds",
    "same picture",
    "encoding and first step, s",
    "last step and decoding, s",
)
MEMORY_COLUMNS = (
    "model",
    "weights counted, GiB",
    "weights held, GiB",
    "peak planned, GiB",
    "peak measured, GiB",
    "within the plan",
    "planned with the reserve, GiB",
    "taken of the device, GiB",
)
REACTION_COLUMNS = (
    "model",
    "cancel → device free, median s",
    "longest s",
    "longest, in steps",
    "high job → its run begins, longest s",
    "→ its first step done, longest s",
    "resumed picture the same",
)
LOAD_COLUMNS = ("model", "made on the device, s", "first load from safetensors, s", "load again, s", "GiB")
VARIANT_COLUMNS = ("model", "variant", "steps/s", "speed-up", "first edit, s", "peak, GiB", "remark")


def _speed_row(report: Report, model: str) -> list[str]:
    result, figures = report.of(model), _figures(report, model)
    if result is None or "edit_seconds" not in figures:
        return [model, _remark(result)]
    return [
        model if result.outcome == "measured" else f"{model} ({_remark(result)})",
        _number(figures, "bare_steps_per_second", 3),
        _number(figures, "steps_per_second", 3),
        _number(figures, "bare_edit_seconds", 3),
        _number(figures, "edit_seconds", 3),
        _number(figures, "lane_adds_percent", 2, " %"),
        _yes_no(figures, "same_picture"),
        _number(figures, "first_advance_seconds", 3),
        _number(figures, "last_advance_seconds", 3),
    ]


def _memory_row(report: Report, model: str) -> list[str]:
    figures, plan = _figures(report, model), report.plans.get(model)
    if plan is None:
        return [model]
    planned_bytes = plan.weights_bytes + plan.activation_bytes
    peak_bytes = figures.get("peak_bytes")
    return [
        model,
        _gib(plan.weights_bytes),
        _gib(figures.get("weights_bytes")),
        _gib(planned_bytes),
        _gib(peak_bytes),
        "" if peak_bytes is None else ("yes" if peak_bytes <= planned_bytes else "NO"),
        _gib(needed_bytes([plan])),
        _gib(figures.get("device_used_bytes")),
    ]


def _reaction_row(report: Report, model: str) -> list[str]:
    figures = _figures(report, model)
    return [
        model,
        _number(figures, "cancel_median_seconds", 3),
        _number(figures, "cancel_max_seconds", 3),
        _number(figures, "cancel_max_steps", 2),
        _number(figures, "preemption_max_seconds", 3),
        _number(figures, "preemption_to_first_step_max_seconds", 3),
        _yes_no(figures, "resumed_same_picture"),
    ]


def _load_row(report: Report, model: str) -> list[str]:
    figures, plan = _figures(report, model), report.plans.get(model)
    return [
        model,
        _number(figures, "build_seconds", 2),
        _number(figures, "load_seconds", 2),
        _number(figures, "load_again_seconds", 2),
        "" if plan is None else _gib(plan.weights_bytes),
    ]


def _variant_row(report: Report, result: Result) -> list[str]:
    figures, plain = result.figures, _figures(report, result.model)
    seconds, plain_seconds = figures.get("edit_seconds"), plain.get("edit_seconds")
    return [
        result.model,
        result.variant,
        _number(figures, "steps_per_second", 3),
        f"{plain_seconds / seconds:.2f} x" if seconds and plain_seconds else "",
        _number(figures, "first_edit_seconds", 3),
        _gib(figures.get("peak_bytes")),
        _remark(result),
    ]


def _figures(report: Report, model: str) -> Mapping[str, float | bool]:
    result = report.of(model)
    return {} if result is None else result.figures


def _remark(result: Result | None) -> str:
    if result is None:
        return "not tried"
    return "" if result.outcome == "measured" else f"{result.outcome}: {result.reason}"


def _number(figures: Mapping[str, float | bool], name: str, digits: int, unit: str = "") -> str:
    return f"{figures[name]:.{digits}f}{unit}" if name in figures else ""


def _yes_no(figures: Mapping[str, float | bool], name: str) -> str:
    return ("yes" if figures[name] else "NO") if name in figures else ""


def _gib(size_bytes: float | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / GIB:.2f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns)]
    # A row that ends early has no more to say; what was said by others may hold what ends a cell.
    lines += [
        [cell.replace("|", "/").replace("\n", " ") for cell in row] + [""] * (len(columns) - len(row)) for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
