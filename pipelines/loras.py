"""LoRAs: small weights that are laid over a model for some of its runs, and taken off again without a trace.

diffusers loads of a file what fits, and is silent about the rest, which may be all of it; it would even change the
model itself to make a file fit. So each file is compared with the model before it is loaded, and once more afterwards.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError

from pipelines.errors import BadInput, WeightsError
from pipelines.running import LoraChoice, is_out_of_memory, one_line
from pipelines.weights import LoraSpec, ModelSpec

DENOISER = "transformer"

# What diffusers, its converters and peft raise for files of other models; they have no class of their own for it.
_LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
)
# Of a file's own configuration, what says how its weights are scaled and where they go, or nothing that matters here.
# Everything else could change the model itself (`init_lora_weights: pissa`), or import a module.
_FREE_SETTINGS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"),
    *("lora_dropout", "inference_mode", "task_type", "base_model_name_or_path", "revision", "peft_version"),
}


def load_loras(spec: ModelSpec, pipeline: Any) -> None:
    """Load all LoRAs of a model into its pipeline, and leave them inactive.

    Args:
        spec: the model; its LoRAs' files have been looked over by `check_weights`.
        pipeline: the model's, without any LoRA, on whatever device.

    Raises:
        WeightsError: a LoRA is of another model, is damaged, or asks the scheduler for what it has not.
    """
    for number, lora in enumerate(spec.loras):
        names = check_lora_fits(spec, lora, pipeline)
        try:
            with warnings.catch_warnings():
                # That there are several is meant, and what peft did otherwise than asked is seen below.
                warnings.simplefilter("ignore")
                pipeline.load_lora_weights(
                    str(lora.file), adapter_name=_adapter(number), use_safetensors=True, local_files_only=True
                )
        except _LIBRARY_ERRORS as error:
            raise _wrong(spec, lora, error) from error
        _check_loaded(spec, lora, names, pipeline.transformer, _adapter(number))
    if spec.loras:
        pipeline.disable_lora()


def check_lora_fits(spec: ModelSpec, lora: LoraSpec, pipeline: Any) -> set[str]:
    """Compare a LoRA with the model that it is for, without loading it.

    Args:
        spec: the model.
        lora: one of its LoRAs.
        pipeline: the model's; its transformer may be without values (on the device `meta`).

    Returns:
        The names of the file's weights within the transformer, such as `blocks.0.attn.to_q.lora_A.weight`.

    Raises:
        WeightsError: not all of the file fits, or it or its entry asks for what must not or cannot be done.
    """
    denoiser = getattr(pipeline, DENOISER, None)
    if denoiser is None or not hasattr(pipeline, "load_lora_weights"):
        raise WeightsError(f"{spec.id}: {spec.pipeline} takes no LoRAs; leave {lora.id} out of the model's entry")
    weights, settings = _read_lora(spec, lora, pipeline)
    _check_settings(spec, lora, settings)
    misfits = list(_find_misfits(denoiser, {name: tuple(value.shape) for name, value in weights.items()}))
    if misfits or not weights:
        example = f", such as {misfits[0]}" if misfits else ""
        raise WeightsError(
            f"{spec.id}: LoRA {lora.id}: {len(misfits)} of {len(weights)} weights of {lora.file} do not fit "
            f"the model's transformer{example}"
        )
    _check_scheduler(spec, lora, pipeline.scheduler)
    return {name.removeprefix(f"{DENOISER}.") for name in weights}


class LoraSwitch:
    """Which LoRAs a loaded pipeline uses just now: one choice for all of its runs, since they share the model."""

    def __init__(self, specs: Sequence[LoraSpec]) -> None:
        self._specs = {lora.id: lora for lora in specs}
        self._adapters = {lora.id: _adapter(number) for number, lora in enumerate(specs)}
        self.chosen: tuple[LoraChoice, ...] | None = ()  # None: unknown, since a change was cut short

    def resolve(self, asked: tuple[LoraChoice, ...]) -> tuple[LoraChoice, ...]:
        """Check what a run asks for, and leave out what changes nothing.

        Raises:
            BadInput: a LoRA is unknown, is asked for twice or at no number; or two want different schedulers.
        """
        ids = [choice.id for choice in asked]
        for choice in asked:
            if choice.id not in self._specs:
                known = ", ".join(self._specs) or "none"
                raise BadInput(f"this model has no LoRA {choice.id}; it has {known}")
            if ids.count(choice.id) > 1:
                raise BadInput(f"the LoRA {choice.id} is asked for twice")
            if not math.isfinite(choice.scale):
                raise BadInput(f"the LoRA {choice.id} needs a number as its scale, not {choice.scale}")
        # Left out rather than multiplied by 0: in few bits, what is multiplied may have become infinite.
        chosen = tuple(choice for choice in asked if choice.scale != 0)
        wanting = [choice.id for choice in chosen if self._specs[choice.id].scheduler]
        if len(wanting) > 1:
            raise BadInput(f"the LoRAs {' and '.join(wanting)} each want a scheduler of their own: take one of them")
        return chosen

    def switch(self, pipeline: Any, chosen: tuple[LoraChoice, ...]) -> None:
        """Lay LoRAs over the pipeline's model in place of those that are there; `chosen` comes from `resolve`."""
        if chosen == self.chosen:
            return
        self.chosen = None
        if chosen:
            pipeline.enable_lora()
            adapters = [self._adapters[choice.id] for choice in chosen]
            pipeline.set_adapters(adapters, [choice.scale for choice in chosen])
        elif self._specs:
            pipeline.disable_lora()
        self.chosen = chosen

    def make_scheduler(self, pipeline: Any, chosen: tuple[LoraChoice, ...]) -> Any | None:
        """Make the scheduler that a LoRA was trained with; None where the pipeline's own is right."""
        for choice in chosen:
            changes = self._specs[choice.id].scheduler
            if changes:
                return type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
        return None


def _adapter(number: int) -> str:
    # An id may hold dots, which names of modules must not, or be the name of one of a module's methods.
    return f"lora_adapter_{number:03}"


def _wrong(spec: ModelSpec, lora: LoraSpec, error: BaseException) -> BaseException:
    """Say of which LoRA an error is, unless it is about memory."""
    if is_out_of_memory(error):
        return error
    return WeightsError(f"{spec.id}: LoRA {lora.id}: {lora.file} cannot be loaded: {one_line(error)[:200]}")


def _read_lora(spec: ModelSpec, lora: LoraSpec, pipeline: Any) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Read a file as diffusers does: `transformer.<layer>.lora_A.weight` → tensor, and its own configuration."""
    try:
        weights, settings = pipeline.lora_state_dict(
            str(lora.file), use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
    except _LIBRARY_ERRORS as error:
        raise _wrong(spec, lora, error) from error
    if not isinstance(settings, dict | None):
        raise WeightsError(f"{spec.id}: LoRA {lora.id}: {lora.file} has a configuration that is not a JSON object")
    return weights, settings or {}


def _check_settings(spec: ModelSpec, lora: LoraSpec, settings: Mapping[str, Any]) -> None:
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        setting = name.removeprefix(f"{DENOISER}.")
        harmless = (True, False, "gaussian") if setting == "init_lora_weights" else ()
        if setting in _FREE_SETTINGS or value == defaults.get(setting, ...) or value in harmless:
            continue
        raise WeightsError(
            f"{spec.id}: LoRA {lora.id}: {lora.file} is no plain LoRA: it sets {setting[:100]} to {str(value)[:100]}"
        )


def _find_misfits(denoiser: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Name the weights that have no place in the model, with what is wrong about them."""
    layers = {_plain(name): module for name, module in denoiser.named_modules()}
    for name, shape in shapes.items():
        layer, _, part = name.removeprefix(f"{DENOISER}.").rpartition(".lora_")
        weight = getattr(layers.get(layer), "weight", None)
        if not name.startswith(f"{DENOISER}.") or part not in {"A.weight", "B.weight"} or weight is None:
            yield name[:200]
            continue
        side = 0 if part == "B.weight" else 1
        partner = shapes.get(f"{DENOISER}.{layer}.lora_{'A' if side == 0 else 'B'}.weight", ())
        if len(shape) != weight.dim() or shape[side] != weight.shape[side]:
            yield f"{name} of shape {list(shape)}, where the layer has {list(weight.shape)}"
        elif len(partner) != len(shape) or partner[side] != shape[1 - side]:
            yield f"{name} of shape {list(shape)}, whose other half has {list(partner)}"


def _plain(name: str) -> str:
    """Name a module as it is called in a model without LoRAs."""
    return name.replace(".base_layer", "")


def _check_loaded(spec: ModelSpec, lora: LoraSpec, expected: set[str], denoiser: torch.nn.Module, adapter: str) -> None:
    loaded = {
        name.replace(f".{adapter}.", "."): value
        for name, value in denoiser.named_parameters()
        if f".{adapter}." in name
    }
    wrong = sorted(expected ^ loaded.keys() | {name for name, value in loaded.items() if value.is_meta})
    if wrong:
        raise WeightsError(
            f"{spec.id}: LoRA {lora.id}: of {lora.file}, {len(wrong)} of {len(expected)} weights were not loaded "
            f"as they are, such as {wrong[0]}"
        )


def _check_scheduler(spec: ModelSpec, lora: LoraSpec, scheduler: Any) -> None:
    if not lora.scheduler:
        return
    settings = inspect.signature(type(scheduler).__init__).parameters
    known = [name for name in settings if name != "self"]
    hints = get_type_hints(type(scheduler).__init__)
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    for name, value in lora.scheduler.items():
        place = f"{spec.id}: LoRA {lora.id}: scheduler.{name}"
        if name not in known:
            # diffusers takes any name, and does nothing about it.
            raise WeightsError(f"{place} is unknown to {type(scheduler).__name__}; it has {', '.join(known)}")
        if value == settings[name].default:
            continue  # some are declared narrower than they are
        try:
            TypeAdapter(hints.get(name, Any), config=strict).validate_python(value)
        except ValidationError as error:
            raise WeightsError(f"{place} = {value!r}: {error.errors()[0]['msg']}") from error
    try:
        type(scheduler).from_config(scheduler.config, **lora.scheduler)
    except _LIBRARY_ERRORS as error:
        raise WeightsError(f"{spec.id}: LoRA {lora.id}: no such scheduler: {one_line(error)[:200]}") from error
