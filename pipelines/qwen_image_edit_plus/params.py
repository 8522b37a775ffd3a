"""The parameters of Qwen-Image-Edit 2509 and 2511, published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.sizes import SizeParams


class Params(SizeParams):
    """What a request may set on a Qwen-Image-Edit-Plus model."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    MAX_INPUT_IMAGES: ClassVar[int] = 3
    HAS_NEGATIVE_PROMPT: ClassVar[bool] = True

    # Of one step, the model's schedule would have to be both start and end: diffusers divides by zero and goes on.
    num_inference_steps: int = Field(default=40, ge=2, le=100, description="Denoising steps; time grows with them.")
    true_cfg_scale: float = Field(
        default=4.0,
        ge=1.0,
        le=20.0,
        allow_inf_nan=False,
        description="How strongly the prompt steers; above 1 each step runs the model twice, at 1 once and without a "
        "negative prompt.",
    )

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether guidance is on: without it the model never sees the negative prompt."""
        return self.true_cfg_scale > 1
