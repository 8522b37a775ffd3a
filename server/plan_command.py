"""`restage models plan`: what each model takes of a GPU, and which models fit beside which."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import click
from rich.table import Table
from rich.text import Text

from pipelines.architectures import Architecture, architecture_of_folder, published_architecture
from pipelines.counting import ModelSize, Quantization, size_model
from pipelines.errors import WeightsError
from pipelines.memory_plan import (
    MAX_MODELS_TOGETHER,
    RESERVE_BYTES,
    ModelMemory,
    fits,
    needed_bytes,
    plan,
)
from pipelines.weights import LoraSpec, ModelSpec
from server.client.progress import open_console
from server.config.files import read_config_file
from server.model_entry import ModelEntry
from server.registry import Registry, load_registry
from server.settings import Settings

EXIT_DONE, EXIT_SOME_NOT_COUNTED = 0, 1
GIB = 2**30
GB = 10**9


def print_plan(settings: Settings, model_ids: Sequence[str], vram_gib: float, quantization: Quantization | None) -> int:
    """Print what models take of a device, and which fit beside each other.

    Args:
        settings: for the registry and the folder of all weights.
        model_ids: entries of the registry, enabled or not; all that name a source when empty.
        vram_gib: of the whole device, in GiB.
        quantization: of the transformers' linear layers; None: as each entry says.

    Returns:
        Exit status.

    Raises:
        ConfigError: the registry cannot be used.
        ModelNotFound: it has no such model.
    """
    registry = every_entry(settings)
    wanted = dict.fromkeys(model_ids) or [entry.id for entry in registry if entry.source is not None]
    sizes: list[ModelSize] = []
    problems: list[str] = []
    for entry in [registry.get(model_id) for model_id in wanted]:
        try:
            sizes.append(_size_entry(settings, entry, quantization))
        except WeightsError as error:
            problems.append(f"{entry.id} is not counted: {error}")
    if sizes:
        _print_tables(sizes, round(vram_gib * GIB))
        _print_reading(settings, [registry.get(size.model) for size in sizes], quantization)
        _print_gaps(sizes)
        _print_together([size.memory for size in sizes], round(vram_gib * GIB))
    for problem in problems:
        click.echo(f"restage: {problem}", err=True)
    skipped = [] if model_ids else [entry.id for entry in registry if entry.source is None]
    if skipped:
        click.echo(f"\nleft out, since they name no source (name them to see them): {', '.join(skipped)}")
    return EXIT_SOME_NOT_COUNTED if problems else EXIT_DONE


def every_entry(settings: Settings) -> Registry:
    """Load all entries of the registry: whether to enable a model is what a plan is asked for."""
    load_registry(settings)  # tells every mistake, so that the ids can be relied on
    content = cast("list[dict[str, Any]]", read_config_file(settings.models.file).content)
    enabled = settings.models.model_copy(update={"enabled": [raw["id"] for raw in content]})
    return load_registry(settings.model_copy(update={"models": enabled}))


def _size_entry(settings: Settings, entry: ModelEntry, quantization: Quantization | None) -> ModelSize:
    spec = spec_of(settings, entry)
    architecture = architecture_of(spec, entry)
    return size_model(spec, architecture, num_photos=entry.max_input_images, quantization=quantization)


def spec_of(settings: Settings, entry: ModelEntry) -> ModelSpec:
    """Say what a count of an entry needs to know."""
    folder = settings.models.weights_dir
    return ModelSpec(
        id=entry.id,
        family=entry.family,
        pipeline=entry.pipeline,
        weights_dir=_weights_dir(settings, entry),
        dtype=entry.dtype,
        area=entry.area,
        loras=tuple(LoraSpec(lora.id, folder / lora.weights) for lora in entry.loras),
        optimizations=entry.optimizations,
    )


def _weights_dir(settings: Settings, entry: ModelEntry) -> Path:
    return settings.models.weights_dir / entry.weights


def architecture_of(spec: ModelSpec, entry: ModelEntry) -> Architecture:
    """Find what a model is built of: in its folder, or in what is shipped while there is none.

    Raises:
        WeightsError: neither is there, or the folder's configurations cannot be read.
    """
    if spec.weights_dir.is_dir():
        return architecture_of_folder(spec.weights_dir)
    repo = None if entry.source is None else entry.source.repo
    published = published_architecture(entry.id, repo)
    if published is None:
        raise WeightsError(f"there is no folder {spec.weights_dir}, and what it would hold is known of no such model")
    return published


def _print_tables(sizes: Sequence[ModelSize], vram_bytes: int) -> None:
    console = open_console()
    console.print(_components_table(sizes))
    console.print(_models_table(sizes, vram_bytes))


def _print_reading(settings: Settings, entries: Sequence[ModelEntry], quantization: Quantization | None) -> None:
    """Say how the tables are to be read, and how far they are to be trusted."""
    click.echo("1 GiB is 2^30 bytes, as nvidia-smi counts; 1 GB is 10^9, as files are counted.")
    click.echo(f"Quantization: {quantization or 'as each entry says'}. Weights are counted from configurations:")
    for words, is_here in (("in their own folders", True), ("as published, their folders are not here", False)):
        ids = [entry.id for entry in entries if _weights_dir(settings, entry).is_dir() == is_here]
        if ids:
            click.echo(f"  {words}: {', '.join(ids)}")
    click.echo("Activations (at a model's own area, with as many photos as a job may have) and the reserve of")
    click.echo(f"{_gib(RESERVE_BYTES)} GiB in every sum are estimates that no GPU has confirmed.")


def _print_gaps(sizes: Sequence[ModelSize]) -> None:
    for size in sizes:
        for missing in size.not_counted:
            click.echo(f"{size.model}: not counted is {missing}")


def _components_table(sizes: Iterable[ModelSize]) -> Table:
    table = Table("model", "component", "class", header_style="bold")
    table.add_column("parameters", justify="right")
    table.add_column("GiB", justify="right")
    table.add_column("GB", justify="right")
    for size in sizes:
        for index, component in enumerate(size.components):
            table.add_row(
                Text("" if index else size.model),
                Text(component.name),
                Text(component.class_name),
                f"{component.num_parameters / 1e9:.3f} B",
                _gib(component.weights_bytes),
                f"{component.weights_bytes / GB:.2f}",
            )
        table.add_section()
    return table


def _models_table(sizes: Sequence[ModelSize], vram_bytes: int) -> Table:
    table = Table("model", header_style="bold")
    for heading in ("weights, GB", "weights, GiB", "activations, GiB", "in all, GiB"):
        table.add_column(heading, justify="right")
    table.add_column("peak while")
    table.add_column(f"fits in {vram_bytes / GIB:g} GiB")
    for size in sizes:
        model = size.memory
        is_fitting = fits([model], vram_bytes)
        table.add_row(
            Text(model.model),
            f"{model.weights_bytes / GB:.2f}",
            _gib(model.weights_bytes),
            _gib(model.activation_bytes),
            _gib(needed_bytes([model])),
            max(size.phases, key=lambda phase: size.phases[phase] + size.moved.get(phase, 0), default="?"),
            Text("yes", style="green") if is_fitting else Text("no", style="yellow"),
        )
    return table


def _print_together(models: Sequence[ModelMemory], vram_bytes: int) -> None:
    found = plan(models, vram_bytes)
    by_id = {model.model: model for model in models}
    click.echo()
    if found.together is None:
        click.echo(f"more than {MAX_MODELS_TOGETHER} models fit alone: name up to {MAX_MODELS_TOGETHER} to see sets")
    elif not found.together:
        click.echo(f"no two of them fit beside each other in {vram_bytes / GIB:g} GiB")
    else:
        click.echo(f"beside each other in {vram_bytes / GIB:g} GiB, and no other of them besides:")
        for models_of_set in found.together:
            needed = needed_bytes([by_id[model] for model in models_of_set])
            click.echo(f"  {' + '.join(models_of_set)}: {_gib(needed)} GiB")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"
