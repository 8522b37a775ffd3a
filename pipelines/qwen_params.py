"""The parameters that both Qwen-Image-Edit families take, known without torch."""

import math
from typing import ClassVar

from pydantic import Field

from pipelines.sizes import SizeParams


def pipeline_size(photo_height: int, photo_width: int, area: int) -> tuple[int, int]:
    """Say to which (height, width) both pipelines scale a photo, multiples of 32.

    Source: `calculate_dimensions` of diffusers 0.42, to the bit, since it decides on rounded halves.
    """
    ratio = photo_width / photo_height
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(height / 32) * 32, round(width / 32) * 32


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
