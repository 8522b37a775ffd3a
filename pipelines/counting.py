"""Count what a model's components take: the real classes on torch's meta device, which has shapes and no numbers.

So a model of 20 billion parameters is counted in about a second, in no memory, on any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from pipelines.activations import RunSize, TextEncoderShape, denoising_bytes, encoding_bytes, vae_bytes
from pipelines.architectures import Architecture, Component
from pipelines.errors import WeightsError
from pipelines.memory_plan import ModelMemory, highest_bytes
from pipelines.optimization_params import Optimizations
from pipelines.optimizations import DENOISER, is_quantized, is_stored_small
from pipelines.running import is_out_of_memory, one_line
from pipelines.weights import ModelSpec

Quantization = Literal["none", "int8", "fp8"]

PLAIN = Optimizations()

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# As torchao does it, weights only: one byte a number, and for each row a scale, of integers also their zero. All else
# keeps the model's dtype.
QUANTIZED_BYTES = 1
ROW_BYTES = {"int8": 5, "fp8": 4}
# This pipeline shows its text encoder small photos, whatever the model's area; the others show what the VAE sees.
ENCODER_AREAS = {"QwenImageEditPlusPipeline": 384 * 384}
# What the classes raise for a configuration that is not theirs.
CLASS_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class ComponentSize:
    """What one component, or a LoRA, takes.

    Attributes:
        name: in the pipeline; of a LoRA `lora` and its id.
        class_name: empty for a LoRA.
        num_parameters: those that are shared counted once.
        weights_bytes: parameters, and buffers that a file of weights holds; what is only computed when the model is
            made, such as tables of positions, is a few megabytes at most and left out.
    """

    name: str
    class_name: str
    num_parameters: int
    weights_bytes: int


@dataclass(frozen=True)
class ModelSize:
    """What a model takes, in parts.

    Attributes:
        components: in the order of the pipeline; LoRAs last.
        phases: name → estimated activations in bytes; only one phase runs at a time.
        not_counted: what is missing here, in words.
        moved: phase → bytes of the weights that are on the device only for it; where there are any, no others stay.
    """

    model: str
    components: tuple[ComponentSize, ...]
    phases: dict[str, int]
    not_counted: tuple[str, ...]
    moved: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def memory(self) -> ModelMemory:
        """The sums that a plan is made of."""
        weights_bytes = 0 if self.moved else sum(component.weights_bytes for component in self.components)
        return ModelMemory(self.model, weights_bytes, highest_bytes(self.phases, self.moved))


def size_model(
    spec: ModelSpec, architecture: Architecture, *, num_photos: int, quantization: Quantization | None = None
) -> ModelSize:
    """Count a model.

    Args:
        spec: for its dtype, its area and its LoRAs; the weights need not be there.
        architecture: what it is built of.
        num_photos: as many as one job may have.
        quantization: of the transformer's linear layers; as its entry says when left out.

    Raises:
        WeightsError: a component cannot be built, or a LoRA's file is damaged.
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    wanted = _in_place_of(spec.optimizations, quantization)
    encoder_area = min(spec.area, ENCODER_AREAS.get(spec.pipeline, spec.area))
    run = RunSize(spec.area, encoder_area, num_photos, dtype.itemsize)
    sizes: list[ComponentSize] = []
    phases: dict[str, int] = {}
    moved: dict[str, int] = {}
    not_counted: list[str] = []
    for name, component in architecture.components.items():
        module = build_empty(spec.id, name, component)
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        weights_bytes = count_bytes(module, dtype, wanted if name == DENOISER else PLAIN)
        sizes.append(ComponentSize(name, component.class_name, num_parameters, weights_bytes))
        phase = _phase(component.library, module, run)
        if phase is None:
            not_counted.append(f"what {name} ({component.class_name}) takes while it runs")
        else:
            phases[phase[0]] = max(phases.get(phase[0], 0), phase[1])
        if wanted.offload != "none":
            at_once_bytes = weights_bytes if wanted.offload == "model" else _largest_layer_bytes(module, dtype)
            used_in = phase[0] if phase else name
            moved[used_in] = max(moved.get(used_in, 0), at_once_bytes)
    for lora in spec.loras:
        if lora.file.is_file():
            sizes.append(_size_lora(spec, lora.id, lora.file, dtype))
        else:
            not_counted.append(f"the LoRA {lora.id}, whose file is not there")
    return ModelSize(spec.id, tuple(sizes), phases, tuple(not_counted), moved)


def _in_place_of(optimizations: Optimizations, quantization: Quantization | None) -> Optimizations:
    return optimizations if quantization is None else optimizations.model_copy(update={"quantization": quantization})


def build_empty(model_id: str, name: str, component: Component) -> nn.Module:
    """Make a component without numbers.

    Args:
        model_id: for messages.
        name: of the component, likewise.
        component: class and configuration.

    Raises:
        WeightsError: the class is unknown here, or cannot be made from this configuration.
    """
    return build_component(model_id, name, component, "meta")


def build_component(model_id: str, name: str, component: Component, device: str) -> nn.Module:
    """Make a component on a device, in torch's default dtype, with the numbers that its class starts with.

    Args:
        model_id: for messages.
        name: of the component, likewise.
        component: class and configuration.
        device: as torch names it; on `meta` there are no numbers.

    Raises:
        WeightsError: the class is unknown here, or cannot be made from this configuration.
        RuntimeError: the device has too little memory, or the machine.
    """
    found = getattr(LIBRARIES[component.library], component.class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise WeightsError(f"{model_id}: {component.library} has no model {component.class_name} ({name})")
    model_class: Any = found
    try:
        with torch.device(device):
            if component.library == "diffusers":
                return model_class.from_config(component.config)
            return model_class(model_class.config_class.from_dict(component.config))
    except CLASS_ERRORS as error:
        if is_out_of_memory(error):  # no fault of the configuration
            raise
        raise WeightsError(
            f"{model_id}: {component.class_name} cannot be made from the configuration of {name}: {one_line(error)}"
        ) from error


def count_bytes(module: nn.Module, dtype: torch.dtype, optimizations: Optimizations = PLAIN) -> int:
    """Count what a module's weights take once they are loaded.

    Args:
        module: on any device.
        dtype: to which floating-point numbers are loaded; others keep theirs.
        optimizations: what is done to them.
    """
    # By identity, so that an embedding that is also the last layer counts once.
    tensors = {id(value): value for value in module.state_dict(keep_vars=True).values()}
    total_bytes = sum(
        value.numel() * (dtype.itemsize if value.is_floating_point() else value.element_size())
        for value in tensors.values()
    )
    small_itemsize = dtype.itemsize - QUANTIZED_BYTES
    for name, layer in module.named_modules():
        if optimizations.quantization != "none" and is_quantized(layer, name):
            rows, columns = layer.out_features, layer.in_features
            total_bytes += rows * ROW_BYTES[optimizations.quantization] - rows * columns * small_itemsize
        elif optimizations.layerwise_casting != "none" and is_stored_small(module, layer, name):
            total_bytes -= sum(value.numel() for value in layer.parameters()) * small_itemsize
    return total_bytes


def _largest_layer_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    sizes = (sum(value.numel() for value in layer.parameters(recurse=False)) for layer in module.modules())
    return max(sizes, default=0) * dtype.itemsize


def _phase(library: str, module: nn.Module, run: RunSize) -> tuple[str, int] | None:
    """Estimate a component's activations; None where no formula is known for its class."""
    config: Any = module.config
    if library == "transformers":
        return _encoding_phase(module, run)
    heads, head_size = _number(config, "num_attention_heads"), _number(config, "attention_head_dim")
    if heads and head_size and "Transformer" in type(module).__name__:
        return "denoising", denoising_bytes(heads * head_size, run)
    channels = _number(config, "base_dim") or _first(config.get("block_out_channels"))
    if channels and type(module).__name__.startswith("Autoencoder"):
        return "decoding", vae_bytes(channels, run)
    return None


def _encoding_phase(module: Any, run: RunSize) -> tuple[str, int] | None:
    text = module.config.get_text_config()
    hidden_size, num_layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    inner_size = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None)
    vocabulary_size = getattr(text, "vocab_size", None)
    if not (hidden_size and num_layers and inner_size and vocabulary_size):
        return None
    shape = TextEncoderShape(
        hidden_size=hidden_size,
        inner_size=inner_size,
        num_layers=num_layers,
        vocabulary_size=vocabulary_size if module.get_output_embeddings() is not None else 0,
        sees_photos=getattr(module.config, "vision_config", None) is not None,
    )
    return "encoding", encoding_bytes(shape, run)


def _number(config: Any, name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) else None


def _first(values: Any) -> int | None:
    return values[0] if isinstance(values, Sequence) and values and isinstance(values[0], int) else None


def _size_lora(spec: ModelSpec, lora_id: str, file: Path, dtype: torch.dtype) -> ComponentSize:
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{spec.id}: the LoRA {file} cannot be read: {one_line(error)}") from error
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return ComponentSize(f"lora {lora_id}", "", num_parameters, num_parameters * dtype.itemsize)
