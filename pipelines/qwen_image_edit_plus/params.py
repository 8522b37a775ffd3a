"""The parameters of Qwen-Image-Edit 2509 and 2511, published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.qwen_params import QwenParams


class Params(QwenParams):
    """What a request may set on a Qwen-Image-Edit-Plus model."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    MAX_INPUT_IMAGES: ClassVar[int] = 3

    # Of one step, the model's schedule would have to be both start and end: diffusers divides by zero and goes on.
    num_inference_steps: int = Field(default=40, ge=2, le=100, description="Denoising steps; time grows with them.")
