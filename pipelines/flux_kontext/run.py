"""How a resolved job becomes a call of FluxKontextPipeline."""

from typing import Any

import torch
from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import fit_area
from pipelines.running import PipelineCall, RunRequest


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:  # noqa: ARG001
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a FluxKontextPipeline; not needed here, but every family is called alike.
        photos: one, RGB, 8 bit, orientation applied, of any size.
        request: the job, resolved.

    Raises:
        BadInput: not exactly one photo, or one that is too narrow; or a negative prompt, which the model has not.
    """
    if len(photos) != 1:
        raise BadInput(f"this model takes exactly one photo, not {len(photos)}")
    if request.negative_prompt:
        raise BadInput("this model takes no negative prompt: leave it out")
    params = request.params
    return PipelineCall(
        {
            # The pipeline would squeeze it into one of 17 sizes of a million pixels, or, told not to, encode a photo
            # of any size as it is.
            "image": fit_area(photos[0], request.area),
            "_auto_resize": False,
            "prompt": request.prompt,
            "guidance_scale": params["guidance_scale"],
            "height": params["height"],
            "width": params["width"],
            # Else height and width are only a ratio, scaled to a million pixels.
            "max_area": params["height"] * params["width"],
            "num_inference_steps": params["num_inference_steps"],
            # On the CPU, so that a seed means the same noise on every device.
            "generator": torch.Generator("cpu").manual_seed(params["seed"]),
            "output_type": "pil",
        }
    )
