"""Load a model from local safetensors files, once it is sure that they are whole and fit together."""

import functools
import gc
import importlib
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from pipelines.checking import Telling, check_loadable
from pipelines.errors import OutOfMemory
from pipelines.loras import LoraSwitch, load_loras
from pipelines.optimizations import cached_steps, place_pipeline
from pipelines.running import Run, RunRequest, execution_device, is_out_of_memory
from pipelines.weights import ModelSpec

__all__ = ["LoadedModel", "ModelSpec", "check_loadable", "load_model"]

_CACHE = type(functools.lru_cache(lambda: None))


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
        self._device = execution_device(pipeline)
        self._loras = LoraSwitch(spec.loras)
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

    def start(self, photos: list[Image.Image], request: RunRequest, *, num_threads: int | None = None) -> Run:
        """Prepare a run; nothing is computed before its first `advance()`.

        Args:
            photos: RGB, 8 bit, orientation applied; as many as the family takes.
            request: the job, resolved.
            num_threads: CPU threads that torch may use for this run; torch's own choice when left out.

        Returns:
            A run, to be closed by the caller before the model is.

        Raises:
            BadInput: the family cannot run this request, or the model has not its LoRAs.
            RuntimeError: another run is open that uses other LoRAs, or others of its scales; or the model is
                `exclusive` and any other run is open.
        """
        loras = self._loras.resolve(request.loras)
        if self.spec.exclusive and any(run.is_open for run in self._runs):
            raise RuntimeError(f"{self.spec.id}: a run is open; its model can have only one at a time")
        if loras != self._loras.chosen and any(run.is_open for run in self._runs):
            raise RuntimeError(f"{self.spec.id}: a run with other LoRAs is open; LoRAs change the model of all runs")
        call = self._family.build_call(self.pipeline, photos, request)
        self._loras.switch(self.pipeline, loras)
        scheduler = self._loras.make_scheduler(self.pipeline, loras)
        around = partial(cached_steps, self.pipeline, self.spec.optimizations, call.kwargs["num_inference_steps"])
        run = Run(
            self.pipeline,
            call,
            scheduler=scheduler,
            device=self._device,
            num_threads=num_threads,
            around=around,
            has_hooks=self.spec.exclusive,
        )
        self._runs.add(run)
        return run

    def close(self) -> None:
        """Free the memory of the model; its runs must have been closed."""
        self.pipeline.remove_all_hooks()
        _empty_caches(self.pipeline)
        self.pipeline = None
        # Modules and their hooks point at each other: only the collector frees them, and only then CUDA's own cache. It
        # passes over what its caller has set aside with `gc.freeze`.
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _empty_caches(pipeline: Any) -> None:
    """Empty the caches of the classes of a pipeline's layers.

    diffusers caches some methods of its layers, such as those that make Qwen's tables of positions. Such a cache is the
    class's, and holds every layer that ever filled it, with its tables on the device, for as long as the process lives.
    Other loaded models make theirs again.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    kinds = {kind for part in parts for layer in part.modules() for kind in type(layer).__mro__}
    for kind in kinds - set(torch.nn.Module.__mro__):
        for method in vars(kind).values():
            for found in (method, *_called_by(method)):
                if isinstance(found, _CACHE):
                    found.cache_clear()


def _called_by(method: Any) -> Iterator[Any]:
    """Give what a decorator wrapped into a method."""
    for cell in getattr(method, "__closure__", None) or ():
        with suppress(ValueError):  # nothing was ever put there
            yield cell.cell_contents


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load a model onto a device; takes seconds to minutes.

    Args:
        spec: which model, from where, in which precision.
        device: as torch names it, such as `cpu` or `cuda:0`.

    Returns:
        The model, owned by the caller until its `close()`.

    Raises:
        WeightsError: something is missing, damaged, incomplete or of another class.
        OptimizationUnavailable: it cannot be run here as its entry asks.
        OutOfMemory: the device has too little memory.
    """
    check_loadable(spec, device)
    try:
        with Telling(spec, str(spec.weights_dir)):
            pipeline = _read_pipeline(spec)
        load_loras(spec, pipeline)
        place_pipeline(spec, pipeline, device)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{spec.id}: too little memory to load the model on {device}") from error
        raise
    prepare_pipeline(pipeline)
    return LoadedModel(spec, pipeline)


def prepare_pipeline(pipeline: Any) -> None:
    """Give a pipeline whose weights are there what every run relies on; not to be done twice."""
    pipeline.set_progress_bar_config(disable=True)
    _pass_image_positions(pipeline)


def _read_pipeline(spec: ModelSpec) -> DiffusionPipeline:
    # Both libraries would make numbers up, or leave them out, where a file has none: the check has excluded that.
    return getattr(diffusers, spec.pipeline).from_pretrained(
        spec.weights_dir, dtype=getattr(torch, spec.dtype), local_files_only=True, use_safetensors=True
    )


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
