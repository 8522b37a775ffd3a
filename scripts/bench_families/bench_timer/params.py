"""The parameters of the family that waits: what a request may set, checked at submission as those of any family."""

from typing import ClassVar

from pydantic import Field

from pipelines.sizes import SizeParams


class Params(SizeParams):
    """How many steps a run has, and how long each of them keeps the device."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)

    num_inference_steps: int = Field(default=5, ge=1, le=1000, description="Steps of the run.")
    step_milliseconds: int = Field(default=50, ge=0, le=60_000, description="What each step waits.")
