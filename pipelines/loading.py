"""Load a model from local safetensors files, and make sure that what was loaded is all of it."""

import gc
import importlib
import json
from collections.abc import Iterable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import Qwen2_5_VLForConditionalGeneration

from pipelines.errors import OutOfMemory, WeightsError
from pipelines.running import Run, RunRequest, is_out_of_memory, one_line
from pipelines.weights import ModelSpec, check_weights, components, has_weights

__all__ = ["LoadedModel", "ModelSpec", "check_weights", "load_model"]

# What the libraries raise for files that do not fit together; they have no class of their own for it.
LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


class LoadedModel:
    """A pipeline in the memory of its device, and the family that knows how to call it.

    Attributes:
        spec: what it was loaded from.
        pipeline: the diffusers pipeline; never called itself, each run calls a copy.
    """

    def __init__(self, spec: ModelSpec, pipeline: DiffusionPipeline) -> None:
        self.spec = spec
        self.pipeline: Any = pipeline
        self._family = importlib.import_module(f"pipelines.{spec.family}.run")

    def start(self, photos: list[Image.Image], request: RunRequest, *, num_threads: int | None = None) -> Run:
        """Prepare a run; nothing is computed before its first `advance()`.

        Args:
            photos: RGB, 8 bit, orientation applied; as many as the family takes.
            request: the job, resolved.
            num_threads: CPU threads that torch may use for this run; torch's own choice when left out.

        Returns:
            A run, to be closed by the caller before the model is.

        Raises:
            BadInput: the family cannot run this request.
        """
        call = self._family.build_call(self.pipeline, photos, request)
        return Run(self.pipeline, call, num_threads=num_threads)

    def close(self) -> None:
        """Free the memory of the model; its runs must have been closed."""
        self.pipeline = None
        # Modules and their hooks point at each other: only the collector frees them, and only then CUDA's own cache.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load a model onto a device; takes seconds to minutes.

    Args:
        spec: which model, from where, in which precision.
        device: as torch names it, such as `cpu` or `cuda:0`.

    Returns:
        The model, owned by the caller until its `close()`.

    Raises:
        WeightsError: something is missing, damaged, incomplete or of another class.
        OutOfMemory: the device has too little memory.
    """
    check_weights(spec)
    _quieten_libraries()
    try:
        pipeline = _read_pipeline(spec)
        pipeline.to(device)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{spec.id}: too little memory to load the model on {device}") from error
        raise
    pipeline.set_progress_bar_config(disable=True)
    _pass_image_positions(pipeline)
    return LoadedModel(spec, pipeline)


def _quieten_libraries() -> None:
    # A log has lines, not bars, and a prompt that is too long for CLIP would be quoted in it.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _read_pipeline(spec: ModelSpec) -> DiffusionPipeline:
    dtype = getattr(torch, spec.dtype)
    try:
        pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
            spec.weights_dir,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            **_read_text_encoders(spec, dtype),
        )
    except LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise WeightsError(f"{spec.id}: {spec.weights_dir} cannot be loaded: {one_line(error)}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            # diffusers leaves a parameter that no file has without a value, and the first run would fail on it.
            _check_complete(spec, name, [key for key, value in part.named_parameters() if value.is_meta])
    return pipeline


def _check_complete(spec: ModelSpec, component: str, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise WeightsError(
            f"{spec.id}: the weights of {component} lack {len(names)} parameters that its config.json asks for, "
            f"such as {names[0]}"
        )


def _read_text_encoders(spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    # transformers fills what no file has with random numbers, and says so only to who asks it, not to diffusers.
    text_encoders: dict[str, torch.nn.Module] = {}
    index = json.loads((spec.weights_dir / "model_index.json").read_bytes())
    for name, (library, class_name) in components(index).items():
        if library != "transformers" or not has_weights(class_name):
            continue
        model, report = getattr(transformers, class_name).from_pretrained(
            spec.weights_dir / name, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        _check_complete(spec, name, report["missing_keys"])
        text_encoders[name] = model
    return text_encoders


def _pass_image_positions(pipeline: Any) -> None:
    """Tell Qwen2.5-VL which tokens are image patches, so that they get positions in rows and columns.

    diffusers does not pass `mm_token_type_ids`, and without them transformers 5 numbers the patches like words: no
    error, but other hidden states than the model was trained with (huggingface/diffusers#14194).
    """

    def add_token_types(
        module: Qwen2_5_VLForConditionalGeneration, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("image_grid_thw") is not None and kwargs.get("mm_token_type_ids") is None:
            is_patch = kwargs["input_ids"] == module.config.image_token_id
            kwargs = kwargs | {"mm_token_type_ids": is_patch.int()}
        return args, kwargs

    text_encoder = getattr(pipeline, "text_encoder", None)
    if isinstance(text_encoder, Qwen2_5_VLForConditionalGeneration):
        text_encoder.register_forward_pre_hook(add_token_types, with_kwargs=True)
