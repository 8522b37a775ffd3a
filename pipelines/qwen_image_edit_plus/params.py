"""The parameters of Qwen-Image-Edit 2509 and 2511, published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.qwen_params import QwenParams, pipeline_size

# At which the text encoder sees a photo; the pipeline's own value, kept for every model trained at more than that.
CONDITION_AREA = 384 * 384


class Params(QwenParams):
    """What a request may set on a Qwen-Image-Edit-Plus model."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    MAX_INPUT_IMAGES: ClassVar[int] = 3

    # Of one step, the model's schedule would have to be both start and end: diffusers divides by zero and goes on.
    num_inference_steps: int = Field(default=40, ge=2, le=100, description="Denoising steps; time grows with them.")

    @classmethod
    def photo_sizes(cls, photo_height: int, photo_width: int, area: int) -> list[tuple[int, int]]:
        """Tell at which sizes a run reads a photo, as `SizeParams.photo_sizes` does."""
        areas = (area, min(area, CONDITION_AREA))
        return list(dict.fromkeys(pipeline_size(photo_height, photo_width, one) for one in areas))
