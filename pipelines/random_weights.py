"""Full-size models with random weights, made on the device itself: speed and memory without a download.

A real class of the real size computes as fast with any numbers, and holds as many bytes. Its pictures mean nothing.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from torch import nn

from pipelines.architectures import Architecture, Component
from pipelines.counting import build_component
from pipelines.errors import OutOfMemory, WeightsError
from pipelines.running import is_out_of_memory
from pipelines.tiny.flux import build_flux_kontext
from pipelines.tiny.flux2 import build_flux2_klein
from pipelines.tiny.qwen import build_qwen_image_edit, build_qwen_image_edit_plus
from pipelines.weights import ModelSpec

# Which twin has the tokenizers, the scheduler and what else has no weights, by the class of the pipeline.
TWIN_OF: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "FluxKontextPipeline": build_flux_kontext,
    "Flux2KleinPipeline": build_flux2_klein,
    "QwenImageEditPipeline": build_qwen_image_edit,
    "QwenImageEditPlusPipeline": build_qwen_image_edit_plus,
}
# As both libraries do it: small enough for sixty layers to stay finite in bfloat16.
STANDARD_DEVIATION = 0.02
# What a description leaves out, since it changes no size, and a run needs: of a VAE and of a text encoder.
_VAE_VALUES = ("scaling_factor", "shift_factor")
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Far below the logarithm of any word's probability.
_UNLIKELY = -1000.0


def build_with_random_weights(spec: ModelSpec, architecture: Architecture, device: str) -> DiffusionPipeline:
    """Make a pipeline whose models have the given sizes and random numbers; the same ones each time on one device.

    Every component is made where it stays and in the model's dtype: nothing is held twice, nothing in main memory
    unless that is the device.

    Args:
        spec: for the class of the pipeline and the dtype; the weights need not be there.
        architecture: what the models are built of.
        device: as torch names it.

    Returns:
        The real class, with the tokenizers of its tiny twin.

    Raises:
        WeightsError: no twin is of this class, or a component cannot be built.
        OutOfMemory: the device has too little memory.
    """
    check_has_twin(spec)
    twin: Any = TWIN_OF[spec.pipeline]()
    parts = dict(twin.components)
    try:
        with _default_dtype(getattr(torch, spec.dtype)):
            torch.manual_seed(0)
            for name, component in architecture.components.items():
                completed = _complete(component, getattr(twin, name, None))
                parts[name] = _fill(build_component(spec.id, name, completed, device), getattr(torch, spec.dtype))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{spec.id}: too little memory to make the model on {device}") from error
        raise
    return type(twin)(**parts, **_own_arguments(twin))


def check_has_twin(spec: ModelSpec) -> None:
    """Make sure that there are tokenizers for a model's pipeline.

    Raises:
        WeightsError: no twin is of this class.
    """
    if spec.pipeline not in TWIN_OF:
        known = ", ".join(TWIN_OF)
        raise WeightsError(f"{spec.id}: tokenizers are known for {known}; not for {spec.pipeline}")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new parameters have a dtype, as both libraries do while they load; tables of positions name their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _complete(component: Component, of_twin: Any) -> Component:
    """Add to a configuration what the twin's tokenizers and a run ask for."""
    config = getattr(of_twin, "config", None)
    if config is None:
        return component
    # The ids of the twin's own tokens: the text encoder looks for them to put the photos in their place.
    ids = {name: getattr(config, name) for name in _TOKEN_IDS if isinstance(getattr(config, name, None), int)}
    known = config if isinstance(config, Mapping) else {}
    scales = {name: known[name] for name in _VAE_VALUES if name in known and component.config.get(name) is None}
    return replace(component, config=component.config | (ids if component.library == "transformers" else scales))


@torch.no_grad()
def _fill(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Draw a module's weights: matrices at random, biases 0, and scales of norms 1."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        if parameter.ndim > 1:
            parameter.normal_(0.0, STANDARD_DEVIATION)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        parameter.requires_grad_(False)
    return module.eval()


def save_with_padded_tokenizers(pipeline: Any, folder: Path) -> None:
    """Write a pipeline that was made here so that it can be loaded: a tokenizer has a token for each row of its table.

    A twin's tokenizer has far fewer, and would be refused as another model's. The new tokens stand for no text, and
    reading them takes as long as reading a real vocabulary.

    Args:
        pipeline: with the tokenizers of its twin.
        folder: empty.
    """
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/tokenizer.json"):
        number = file.parent.name.partition("_")[2]  # as the check of a loaded model pairs them
        encoder = getattr(pipeline, f"text_encoder_{number}" if number.isdigit() else "text_encoder")
        content = json.loads(file.read_text())
        _pad(content, encoder.get_input_embeddings().num_embeddings)
        file.write_text(json.dumps(content))


def _pad(tokenizer: dict[str, Any], num_tokens: int) -> None:
    """Add words to the file of a tokenizer, behind those that it has, until it has so many."""
    words: Any = tokenizer["model"]["vocab"]
    # By number, or with how likely they are, in the order of their numbers.
    numbers = words.values() if isinstance(words, dict) else range(len(words))
    first = max([*numbers, *(one["id"] for one in tokenizer["added_tokens"])]) + 1
    added = {f"<|{number}|>": number for number in range(first, num_tokens)}
    if isinstance(words, dict):
        words.update(added)
    else:
        words.extend([word, _UNLIKELY] for word in added)


def _own_arguments(twin: Any) -> dict[str, Any]:
    """Give the arguments of a pipeline's constructor that are no components, such as whether it is distilled."""
    names = inspect.signature(type(twin).__init__).parameters
    return {name: twin.config[name] for name in names if name in twin.config and name not in twin.components}
