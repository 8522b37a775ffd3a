"""How a resolved job becomes a call of FluxKontextPipeline."""

from typing import Any

import torch
from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import fit_area
from pipelines.running import PipelineCall, RunRequest
from pipelines.tokens import check_prompt_tokens

# As many as the pipeline lets T5 read, the end of the text among them; it would cut off the rest. That CLIP reads only
# the first 77 is the model's own way, and refuses nothing.
MAX_PROMPT_TOKENS = 512


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a FluxKontextPipeline; only asked for T5's tokenizer.
        photos: one, RGB, 8 bit, orientation applied, of any size.
        request: the job, resolved.

    Raises:
        BadInput: not exactly one photo, or one that is too narrow; a prompt that is too long; or a negative prompt,
            which the model has not.
    """
    if len(photos) != 1:
        raise BadInput(f"this model takes exactly one photo, not {len(photos)}")
    if request.negative_prompt:
        raise BadInput("this model takes no negative prompt: leave it out")
    check_prompt_tokens(pipe.tokenizer_2, request.prompt, "prompt", MAX_PROMPT_TOKENS)
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
            "max_sequence_length": MAX_PROMPT_TOKENS,
            # On the CPU, so that a seed means the same noise on every device.
            "generator": torch.Generator("cpu").manual_seed(params["seed"]),
            "output_type": "pil",
        }
    )
