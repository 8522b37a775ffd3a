"""Run a model otherwise than its pipeline does by itself: what `optimizations` of an entry mean to diffusers and torch.

Everything that can be known without running the model is checked beforehand, so that a model is either served as its
entry says or refused with the reason.
"""

import importlib.util
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS  # what layerwise casting looks for
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.models import attention_dispatch
from torch import nn

from pipelines.errors import OptimizationUnavailable
from pipelines.optimization_params import FirstBlockCache, MagCache, Optimizations, StepCache
from pipelines.weights import ModelSpec

DENOISER = "transformer"
COMPILE_BACKEND = "inductor"
# How often the blocks of one class may be compiled anew, such as with a mask and without, or for another dtype; all
# models of a process count together. torch allows 8 and fails the run that asks for one more; more only take time.
RECOMPILE_LIMIT = 64
_OF_DENOISER = ("compile", "attention", "quantization", "layerwise_casting", "cache")
_CPU_ATTENTION = ("native", "_native_flash", "_native_math", "flex")
# What a backend's kernels are made for; as their own packages say, since none of them has run here.
_ATTENTION_CAPABILITY = {
    "_native_cudnn": (8, 0),
    "_native_flash": (8, 0),
    "flash": (8, 0),
    "flash_varlen": (8, 0),
    "_flash_3": (9, 0),
    "_flash_varlen_3": (9, 0),
    "sage": (8, 0),
    "sage_varlen": (8, 0),
    "_sage_qk_int8_pv_fp16_cuda": (8, 0),
    "_sage_qk_int8_pv_fp16_triton": (8, 0),
    "_sage_qk_int8_pv_fp8_cuda": (8, 9),
    "_sage_qk_int8_pv_fp8_cuda_sm90": (9, 0),
}
# The same backends' kernels take numbers of two bytes only; on a CPU `_native_flash` has others.
_HALF_DTYPES = ("bfloat16", "float16")
# These write down the score of every token against every other: gigabytes at a million pixels. Compiled, flex does not.
_ATTENTION_WITH_SCORES = ("_native_math", "flex")
_COMPILE_CAPABILITY = (7, 0)  # of Triton, which writes the kernels
_COMPILED_FP8_CAPABILITY = (8, 9)  # likewise, for this type of number
# In the order in which torch looks for one.
_CPP_COMPILERS = ("g++", "clang++")


def check_optimizations(spec: ModelSpec, pipeline: Any, device: str) -> None:
    """Make sure that a model can be run as its entry asks.

    Args:
        spec: the model.
        pipeline: its own, whose parts may be without values (on the device `meta`).
        device: on which it is to run, as torch names it.

    Raises:
        OptimizationUnavailable: its class, this machine or what is installed does not allow it.
    """
    for name, problem in _problems(spec, pipeline, device):
        wanted = getattr(spec.optimizations, name)
        value = wanted if isinstance(wanted, str) else "true" if wanted is True else wanted.kind
        raise OptimizationUnavailable(f"{spec.id}: optimizations.{name}: {value} {problem}")


def _problems(spec: ModelSpec, pipeline: Any, device: str) -> Iterator[tuple[str, str]]:
    wanted, class_name = spec.optimizations, type(pipeline).__name__
    applied = wanted.applied
    denoiser = getattr(pipeline, DENOISER, None)
    for name in [one for one in _OF_DENOISER if one in applied]:
        if denoiser is None:
            yield name, f"is done to a {DENOISER}, and {class_name} has none"
        elif not _allows(denoiser, name):
            yield name, f"is not possible with {type(denoiser).__name__}, which diffusers gives no such call"
    if wanted.offload == "model" and getattr(pipeline, "model_cpu_offload_seq", None) is None:
        yield "offload", f"is not possible with {class_name}, of which diffusers knows no order of its parts"
    for name, switch in (("vae_tiling", "use_tiling"), ("vae_slicing", "use_slicing")):
        if name in applied and not hasattr(getattr(pipeline, "vae", None), switch):
            yield name, f"is not possible with the VAE of {class_name}"
    yield from _problems_of_machine(wanted, spec.dtype, torch.device(device))


def _allows(denoiser: nn.Module, name: str) -> bool:
    if name == "attention":
        return hasattr(denoiser, "set_attention_backend") and any(_takes_backend(part) for part in denoiser.modules())
    if name == "compile":
        return bool(getattr(denoiser, "_repeated_blocks", None))
    if name == "cache":
        return hasattr(denoiser, "enable_cache")
    return name != "layerwise_casting" or hasattr(denoiser, "enable_layerwise_casting")


def _takes_backend(module: nn.Module) -> bool:
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def _problems_of_machine(wanted: Optimizations, dtype: str, device: torch.device) -> Iterator[tuple[str, str]]:
    if wanted.quantization != "none" and not _is_installed("torchao"):
        yield "quantization", "needs the package torchao, which the extra `quantization` installs"
    if wanted.attention != "native":
        yield from (("attention", problem) for problem in _problems_of_attention(wanted, dtype, device))
    if wanted.compile != "none":
        yield from (("compile", problem) for problem in _problems_of_compiling(wanted, device))


def _problems_of_attention(wanted: Optimizations, dtype: str, device: torch.device) -> Iterator[str]:
    backend = wanted.attention
    if device.type != "cuda" and backend not in _CPU_ATTENTION:
        yield f"needs CUDA; on {device.type} there are {', '.join(_CPU_ATTENTION)}"
        return
    try:
        attention_dispatch._check_attention_backend_requirements(  # noqa: SLF001 - what is missing is said nowhere else
            attention_dispatch.AttentionBackendName(backend)
        )
    except RuntimeError as error:
        yield f"cannot be used: {' '.join(str(error).split())}"
    if device.type != "cuda":
        return
    if backend in _ATTENTION_WITH_SCORES and not (backend == "flex" and wanted.compile == "regional"):
        other = "is for CUDA only with compile: regional" if backend == "flex" else "is not for CUDA"
        yield f"{other}: it holds every token's score against every other, gigabytes for a large picture"
    if backend in _ATTENTION_CAPABILITY and dtype not in _HALF_DTYPES:
        yield f"computes in {' or '.join(_HALF_DTYPES)} on CUDA, and the model's dtype is {dtype}"
    yield from _lacking(device, _ATTENTION_CAPABILITY.get(backend, (0, 0)))


def _problems_of_compiling(wanted: Optimizations, device: torch.device) -> Iterator[str]:
    # On CUDA too: Triton compiles a launcher for each kernel. Both kinds of compiled code are Python modules.
    if not any(shutil.which(compiler) for compiler in _CPP_COMPILERS):
        yield f"needs a C++ compiler: {' or '.join(_CPP_COMPILERS)} in PATH"
    if not (headers := Path(sysconfig.get_path("include"))).joinpath("Python.h").exists():
        yield f"needs the headers of Python: {headers} has no Python.h"
    if device.type == "cuda" and not _is_installed("triton"):
        yield "needs the package triton"
    yield from _lacking(device, _COMPILED_FP8_CAPABILITY if wanted.quantization == "fp8" else _COMPILE_CAPABILITY)


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _lacking(device: torch.device, needed: tuple[int, int]) -> Iterator[str]:
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < needed:
        yield f"needs compute capability {needed[0]}.{needed[1]}, and {device} has {found[0]}.{found[1]}"


def place_pipeline(spec: ModelSpec, pipeline: Any, device: str) -> None:
    """Bring a pipeline onto its device in the form that its entry asks for; not to be done twice.

    Args:
        spec: the model; its optimizations have been checked.
        pipeline: its own, with its LoRAs. Its weights may be on any device.
        device: as torch names it.
    """
    wanted = spec.optimizations
    denoiser: Any = getattr(pipeline, DENOISER, None)
    _set_attention(denoiser, wanted.attention)
    # Before the move, so that the device never holds the weights as they were.
    if wanted.quantization != "none":
        _quantize(denoiser, wanted.quantization, device)
    if wanted.layerwise_casting != "none":
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=getattr(torch, spec.dtype))
    if wanted.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif wanted.offload == "group":
        pipeline.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    else:
        pipeline.to(device)
    if wanted.vae_tiling:
        pipeline.vae.enable_tiling()
    if wanted.vae_slicing:
        pipeline.vae.enable_slicing()
    if wanted.compile == "regional":
        denoiser.compile_repeated_blocks(
            # Not in torch's settings: those are a thread's, and runs have their own.
            fullgraph=True,
            dynamic=True,
            backend=COMPILE_BACKEND,
            recompile_limit=RECOMPILE_LIMIT,
        )


def _set_attention(denoiser: Any, backend: str) -> None:
    """Set what computes a model's attention, also where that is the default: and for this model alone.

    diffusers makes the last backend that was set for any model that of all which name none, for as long as the process
    lives. Here each model names its own, and the process's stays as it was.
    """
    if not hasattr(denoiser, "set_attention_backend"):
        return
    registry = attention_dispatch._AttentionBackendRegistry  # noqa: SLF001 - it has no public name
    before, _ = registry.get_active_backend()
    denoiser.set_attention_backend(backend)
    registry.set_active_backend(before)


def _quantize(denoiser: nn.Module, quantization: str, device: str) -> None:
    # Imported here: an extra that most workers do without.
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

    kind = Int8WeightOnlyConfig if quantization == "int8" else Float8WeightOnlyConfig
    # It would change the settings of torch's compiler in this thread, for models that are loaded later as well.
    config = kind(set_inductor_config=False)
    quantize_(denoiser, config, filter_fn=is_quantized, device=device)


def is_quantized(layer: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Tell whether a layer of the denoiser is one of those whose weights quantization changes.

    Args:
        layer: any.
        name: its own within the denoiser; a LoRA's layers are in few numbers already, and stay.
    """
    return isinstance(layer, nn.Linear) and ".lora_" not in name


def is_stored_small(denoiser: Any, layer: nn.Module, name: str) -> bool:
    """Tell whether layerwise casting changes how a layer of the denoiser is stored.

    Args:
        denoiser: a model of diffusers.
        layer: any of its layers.
        name: its own within the denoiser.
    """
    kept = (*DEFAULT_SKIP_MODULES_PATTERN, *(denoiser._skip_layerwise_casting_patterns or ()))  # noqa: SLF001 - as there
    kept += tuple(denoiser._keep_in_fp32_modules or ())  # noqa: SLF001 - likewise
    return isinstance(layer, _GO_LC_SUPPORTED_PYTORCH_LAYERS) and not any(re.search(one, name) for one in kept)


@contextmanager
def cached_steps(pipeline: Any, optimizations: Optimizations, num_steps: int) -> Iterator[None]:
    """Open the model's step cache for one run.

    A cache that is made for each run, and taken off at whichever end it has, can pass nothing on to the next; and
    MagCache must know how many steps the run has.

    Args:
        pipeline: a loaded one.
        optimizations: of its entry.
        num_steps: of the run.
    """
    if optimizations.cache == "none":
        yield
        return
    denoiser = pipeline.transformer
    denoiser.enable_cache(_cache_config(optimizations.cache, num_steps, denoiser.dtype))
    try:
        yield
    finally:
        denoiser.disable_cache()


def _cache_config(cache: StepCache, num_steps: int, dtype: torch.dtype) -> Any:
    if isinstance(cache, MagCache):
        return MagCacheConfig(
            threshold=cache.threshold,
            max_skip_steps=cache.max_skip_steps,
            retention_ratio=cache.retention_ratio,
            num_inference_steps=num_steps,
            mag_ratios=FLUX_MAG_RATIOS if cache.ratios is None else cache.ratios,
        )
    if isinstance(cache, FirstBlockCache):
        return FirstBlockCacheConfig(threshold=cache.threshold)
    return TaylorSeerCacheConfig(
        cache_interval=cache.cache_interval,
        disable_cache_before_step=cache.warmup_steps,
        max_order=cache.max_order,
        taylor_factors_dtype=dtype,
    )
