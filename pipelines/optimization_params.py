"""What an entry of the registry may ask for beyond running its pipeline as it is; without torch."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# diffusers' names. Those that end in `_hub` are left out: they fetch their code from the network.
Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "flex",
    "flash",
    "flash_varlen",
    "_flash_3",
    "_flash_varlen_3",
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "xformers",
]
# As many as any schedule has.
MAX_RATIOS = 1000
MAX_SKIPPED_STEPS = 20

# Which step caches work with which class; what nobody has tried is in no row. FluxKontextPipeline does not tell its
# transformer which of its calls follow each other, which two of them ask for; and diffusers' first_block takes what the
# blocks of FLUX.2 return for something else.
_STEP_CACHES = ("magcache", "first_block", "taylorseer")
CACHES_OF: Mapping[str, tuple[str, ...]] = {
    "FluxKontextPipeline": ("magcache",),
    "QwenImageEditPipeline": _STEP_CACHES,
    "QwenImageEditPlusPipeline": _STEP_CACHES,
    "Flux2KleinPipeline": ("magcache", "taylorseer"),
}
# Its ratios were measured by others, and diffusers brings them.
_WITH_OWN_RATIOS = "FluxKontextPipeline"

# Pairs that are refused, and why.
_NOT_TOGETHER: tuple[tuple[str, str, str], ...] = (
    ("compile", "cache", "a step cache decides anew in each step, which compiled code cannot"),
    ("compile", "layerwise_casting", "what casts the weights runs between the layers, which are compiled as one"),
    ("compile", "offload", "what moves the weights runs between the layers, which are compiled as one"),
    ("quantization", "layerwise_casting", "both store the same weights in one byte"),
    ("quantization", "offload", "quantized weights are not moved"),
    ("layerwise_casting", "offload", "the hooks of both are on the same layers"),
    ("cache", "offload", "the hooks of both are on the same layers"),
)


class MagCache(BaseModel):
    """Skips steps whose change is small, by ratios that were measured of the model once.

    Attributes:
        threshold: of the error that skipping may add up to.
        max_skip_steps: in a row.
        retention_ratio: of a run's first steps, which are never skipped.
        ratios: how much each step changes against the one before; by default those of FLUX.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["magcache"]
    threshold: float = Field(default=0.06, ge=0, le=1)
    max_skip_steps: int = Field(default=3, ge=1, le=MAX_SKIPPED_STEPS)
    retention_ratio: float = Field(default=0.2, ge=0, le=1)
    ratios: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(default=None, min_length=2, max_length=MAX_RATIOS)


class FirstBlockCache(BaseModel):
    """Skips all blocks but the first in steps in which the first one changes little.

    Attributes:
        threshold: of the first block's relative change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["first_block"]
    threshold: float = Field(default=0.05, ge=0, le=1)


class TaylorSeer(BaseModel):
    """Predicts what the blocks would give from the steps before.

    Attributes:
        cache_interval: of so many steps, one is computed.
        warmup_steps: first steps, which are all computed.
        max_order: of the prediction; more takes more memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["taylorseer"]
    cache_interval: int = Field(default=5, ge=2, le=MAX_SKIPPED_STEPS)
    warmup_steps: int = Field(default=3, ge=2, le=MAX_RATIOS)
    max_order: int = Field(default=1, ge=0, le=3)


StepCache = MagCache | FirstBlockCache | TaylorSeer
CACHE_KINDS: Mapping[str, type[StepCache]] = {
    "magcache": MagCache,
    "first_block": FirstBlockCache,
    "taylorseer": TaylorSeer,
}


class Optimizations(BaseModel):
    """How a model is run otherwise than its pipeline does by itself.

    Attributes:
        compile: `regional`: the blocks that the transformer repeats are compiled.
        attention: diffusers' name of what computes attention.
        quantization: of the transformer's linear layers, weights only.
        layerwise_casting: `fp8`: the transformer's weights are stored so, and computed with in the model's dtype.
        cache: what skips steps.
        offload: what waits in the machine's memory while it is not used: whole `model`s or their layers (`group`).
        vae_tiling: pictures are encoded and decoded in tiles that overlap.
        vae_slicing: of several pictures, one at a time is encoded and decoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compile: Literal["none", "regional"] = "none"
    attention: Attention = "native"
    quantization: Literal["none", "int8", "fp8"] = "none"
    layerwise_casting: Literal["none", "fp8"] = "none"
    cache: Literal["none"] | Annotated[StepCache, Field(discriminator="kind")] = "none"
    offload: Literal["none", "model", "group"] = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False

    @property
    def exclusive(self) -> bool:
        """Whether only one run of the model may be open at a time: the hooks on its layers are that run's."""
        return self.cache != "none" or self.offload != "none"

    @property
    def applied(self) -> dict[str, Any]:
        """What is done, as plain JSON values; what is left as the pipeline does it is left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in values.items() if value not in ("none", "native", False)}


def conflicts(optimizations: Optimizations, pipeline: str, *, has_loras: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """Say what does not go together.

    Args:
        optimizations: of an entry.
        pipeline: its class.
        has_loras: whether it has any.

    Yields:
        Where within the optimizations, and what is wrong.
    """
    applied = optimizations.applied
    for one, other, why in _NOT_TOGETHER:
        if one in applied and other in applied:
            yield (one,), f"does not go with {other}: {why}"
    if has_loras and "compile" in applied:
        yield ("compile",), "does not go with loras: each other choice of them would be compiled again"
    cache = optimizations.cache
    if cache == "none":
        return
    kinds = CACHES_OF.get(pipeline, ())
    if cache.kind not in kinds:
        allowed = f"it takes {' or '.join(kinds)}" if kinds else "no step cache is known to work with it"
        yield ("cache", "kind"), f"does not work with {pipeline}; {allowed}"
    elif isinstance(cache, MagCache) and cache.ratios is None and pipeline != _WITH_OWN_RATIOS:
        yield ("cache", "ratios"), f"is missing; magcache needs what was measured of the model, for {pipeline} by you"
