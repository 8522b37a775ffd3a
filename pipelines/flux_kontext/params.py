"""The parameters of FLUX.1 Kontext, published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.sizes import SizeParams


class Params(SizeParams):
    """What a request may set on a FLUX.1 Kontext model."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)

    num_inference_steps: int = Field(default=28, ge=1, le=100, description="Denoising steps; time grows with them.")
    guidance_scale: float = Field(
        default=2.5,
        ge=0.0,
        le=20.0,
        allow_inf_nan=False,
        description="How strongly the prompt steers; the model takes it as an input, so it costs no time.",
    )
