"""Which models fit into the memory of a device, alone and beside each other; plain arithmetic, without torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# What a device loses before the first tensor: CUDA's context, the libraries' workspaces, gaps between tensors. Not
# measured; a plan that needs the last of it is no plan.
RESERVE_BYTES = 2**30
# There can be hundreds of sets of twelve models, and their number nearly doubles with every further one.
MAX_MODELS_TOGETHER = 12


@dataclass(frozen=True)
class ModelMemory:
    """What a model takes of a device.

    Attributes:
        model: its id in the registry.
        weights_bytes: of all components and LoRAs; they stay for as long as the model is resident.
        activation_bytes: highest of one run beyond the weights, free again after it; an estimate.
    """

    model: str
    weights_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class PlannedRun:
    """The largest run of a model that is planned for, from which others are estimated.

    Attributes:
        area: of the output and of each photo, as the model reads it, in pixels.
        num_photos: of the run.
        phases: name → bytes beyond the weights; only one phase runs at a time.
        moved: phase → bytes of the weights that are on the device only for it.
    """

    area: int
    num_photos: int
    phases: Mapping[str, int]
    moved: Mapping[str, int] = field(default_factory=dict[str, int])

    def bytes_for(self, height: int, width: int, num_photos: int) -> int:
        """Estimate what another run takes: the denoising follows all pixels, the decoding those of the output.

        Args:
            height: of the output in pixels.
            width: likewise.
            num_photos: of the run; each is read at the model's own area.
        """
        output_pixels = height * width
        planned_pixels = (1 + self.num_photos) * self.area
        shares = {
            "denoising": (output_pixels + num_photos * self.area) / planned_pixels,
            "decoding": output_pixels / self.area,
        }
        sizes = {phase: round(size * shares.get(phase, 1.0)) for phase, size in self.phases.items()}
        return highest_bytes(sizes, self.moved)


def highest_bytes(phases: Mapping[str, int], moved: Mapping[str, int]) -> int:
    """Say what a run takes beyond the weights that stay.

    Args:
        phases: name → bytes of its activations; only one phase runs at a time.
        moved: name → bytes of the weights that are on the device only for it.
    """
    return max((phases.get(phase, 0) + moved.get(phase, 0) for phase in phases.keys() | moved.keys()), default=0)


@dataclass(frozen=True)
class MemoryPlan:
    """What fits into a device.

    Attributes:
        alone: models that fit when nothing else is resident, in the order given.
        together: sets of two or more that fit beside each other and to which no other model could be added; the models
            in the order given. None where more than `MAX_MODELS_TOGETHER` fit alone.
    """

    alone: tuple[str, ...]
    together: tuple[tuple[str, ...], ...] | None


def needed_bytes(models: Iterable[ModelMemory]) -> int:
    """Say how much a device must have for these models to be resident, one of them running.

    All weights are there at once, but only one thread runs torch, so only one run has its activations.
    """
    weights_bytes = activation_bytes = 0
    for model in models:
        weights_bytes += model.weights_bytes
        activation_bytes = max(activation_bytes, model.activation_bytes)
    return weights_bytes + activation_bytes + RESERVE_BYTES


def fits(models: Iterable[ModelMemory], vram_bytes: int) -> bool:
    """Tell whether these models can be resident beside each other, and each of them run.

    Args:
        models: no model twice.
        vram_bytes: of the whole device.
    """
    return needed_bytes(models) <= vram_bytes


def plan(models: Sequence[ModelMemory], vram_bytes: int) -> MemoryPlan:
    """Find what fits into a device.

    Args:
        models: no model twice.
        vram_bytes: of the whole device.
    """
    alone = [model for model in models if fits([model], vram_bytes)]
    together = None
    if len(alone) <= MAX_MODELS_TOGETHER:
        together = tuple(
            tuple(model.model for model in alone if model in found)
            for found in _largest_sets(alone, vram_bytes)
            if len(found) > 1
        )
    return MemoryPlan(tuple(model.model for model in alone), together)


def _largest_sets(models: Sequence[ModelMemory], vram_bytes: int) -> Iterator[list[ModelMemory]]:
    """Yield the sets that fit and lie in no larger one that fits; each model with and without those before it."""

    def extend(taken: list[ModelMemory], left: Sequence[ModelMemory]) -> Iterator[list[ModelMemory]]:
        others = [model for model in models if model not in taken and model not in left]
        # A model that was left out and fits beside all that may still come could be added to every set from here on.
        if any(fits([*taken, *left, other], vram_bytes) for other in others):
            return
        if not left:
            yield taken
            return
        first, rest = left[0], left[1:]
        if fits([*taken, first], vram_bytes):
            yield from extend([*taken, first], rest)
        yield from extend(taken, rest)

    yield from extend([], models)
