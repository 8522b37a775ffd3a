"""The parameters of the original Qwen-Image-Edit, published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.qwen_params import QwenParams, pipeline_size


class Params(QwenParams):
    """What a request may set on the original Qwen-Image-Edit."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline",)

    # Of one step, the model's schedule would have to be both start and end: diffusers divides by zero and goes on.
    num_inference_steps: int = Field(default=50, ge=2, le=100, description="Denoising steps; time grows with them.")

    @classmethod
    def photo_sizes(cls, photo_height: int, photo_width: int, area: int) -> list[tuple[int, int]]:
        """Tell at which sizes a run reads a photo, as `SizeParams.photo_sizes` does."""
        return [pipeline_size(photo_height, photo_width, area)]
