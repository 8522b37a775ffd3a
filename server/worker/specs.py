"""From the registry's entries to what is needed to load them."""

from dataclasses import replace

from pipelines.weights import LoraSpec, ModelSpec
from server.registry import Registry
from server.settings import Settings


def model_specs(settings: Settings, registry: Registry) -> dict[str, ModelSpec]:
    """Return what is needed to load each enabled model, the default one first; replaced versions are `id@version`."""
    folder = settings.models.weights_dir
    specs: dict[str, ModelSpec] = {}
    for entry in sorted(registry, key=lambda entry: entry.id != settings.models.default):
        specs[entry.id] = ModelSpec(
            id=entry.id,
            family=entry.family,
            pipeline=entry.pipeline,
            weights_dir=folder / entry.weights,
            dtype=entry.dtype,
            area=entry.area,
            loras=tuple(LoraSpec(lora.id, folder / lora.weights, lora.scheduler) for lora in entry.loras),
            version=entry.version,
            num_photos=entry.max_input_images,
            optimizations=entry.optimizations,
        )
        for old in entry.previous:
            name = f"{entry.id}@{old.version}"
            specs[name] = replace(specs[entry.id], weights_dir=folder / old.weights, version=old.version)
    return specs
