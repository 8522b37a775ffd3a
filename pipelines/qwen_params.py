"""The parameters that both Qwen-Image-Edit families take, known without torch."""

from typing import ClassVar

from pydantic import Field

from pipelines.sizes import SizeParams


class QwenParams(SizeParams):
    """What a request may set on any Qwen-Image-Edit model; the number of steps has each family's own default."""

    HAS_NEGATIVE_PROMPT: ClassVar[bool] = True

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
