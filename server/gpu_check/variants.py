"""Which ways to run a model are compared with the plain one."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.memory_plan import ModelMemory
from pipelines.optimization_params import Optimizations, conflicts
from server.gpu_check.report import GIB

# Name → `optimizations` as an entry of the registry would have them.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "compile: regional": {"compile": "regional"},
    "attention: _native_cudnn": {"attention": "_native_cudnn"},
    "attention: _native_flash": {"attention": "_native_flash"},
    "attention: flash": {"attention": "flash"},
    "attention: _flash_3": {"attention": "_flash_3"},
    "attention: sage": {"attention": "sage"},
    "quantization: int8": {"quantization": "int8"},
    "quantization: int8, compiled": {"quantization": "int8", "compile": "regional"},
    "quantization: fp8": {"quantization": "fp8"},
    "quantization: fp8, compiled": {"quantization": "fp8", "compile": "regional"},
    "layerwise_casting: fp8": {"layerwise_casting": "fp8"},
    "cache: magcache": {"cache": {"kind": "magcache"}},
    "cache: first_block": {"cache": {"kind": "first_block"}},
    "cache: taylorseer": {"cache": {"kind": "taylorseer"}},
    "vae_tiling": {"vae_tiling": True},
    "offload: model": {"offload": "model"},
    "offload: group": {"offload": "group"},
}
# What the entry itself asks for.
OF_ENTRY = "as its entry says"
# Of the machine's memory, beside a model that is made there.
_HOST_RESERVE = 1.2


def refusal(optimizations: Mapping[str, Any], pipeline: str) -> str | None:
    """Say why no entry could ask for this, whatever the machine; None where one could."""
    wanted = Optimizations.model_validate(optimizations)
    for place, problem in conflicts(wanted, pipeline, has_loras=False):
        return f"{'.'.join(place)} {problem}"
    return None


def variants_of(of_entry: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    """Choose what to compare.

    Args:
        of_entry: the entry's own optimizations that are not the default.
        names: of `VARIANTS`; all of them, and the entry's own, when left out.
    """
    if names is not None:
        return {name: VARIANTS[name] for name in names}
    return ({OF_ENTRY: of_entry} if of_entry else {}) | dict(VARIANTS)


def too_large_for_host(plan: ModelMemory) -> str | None:
    """Say why the machine's own memory cannot hold a model's weights; None where it can."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed_bytes = plan.weights_bytes * _HOST_RESERVE
    if needed_bytes <= host_bytes:
        return None
    return f"its weights need {needed_bytes / GIB:.1f} GiB of the machine's memory, which has {host_bytes / GIB:.1f}"
