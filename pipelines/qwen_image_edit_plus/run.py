"""How a resolved job becomes a call of QwenImageEditPlusPipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from pipelines.errors import BadInput
from pipelines.qwen_image_edit_plus.params import Params
from pipelines.running import PipelineCall, RunRequest
from pipelines.sizes import check_photo_size

# At which the text encoder sees a photo; the pipeline's own value, kept for every model trained at more than that.
CONDITION_AREA = 384 * 384


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a QwenImageEditPlusPipeline; only asked for its control tokens.
        photos: 1 to 3, RGB, 8 bit, orientation applied, of any sizes; the prompt calls them Picture 1, 2 and 3.
        request: the job, resolved.

    Raises:
        BadInput: too many photos, one of them too narrow, a control token in a prompt, or a negative prompt that
            guidance would not use.
    """
    if not 1 <= len(photos) <= Params.MAX_INPUT_IMAGES:
        raise BadInput(f"this model takes 1 to {Params.MAX_INPUT_IMAGES} photos, not {len(photos)}")
    for photo in photos:
        check_photo_size(photo.height, photo.width)
    params = request.params
    kwargs = {
        "image": list(photos),
        "prompt": request.prompt,
        "true_cfg_scale": params["true_cfg_scale"],
        "height": params["height"],
        "width": params["width"],
        "num_inference_steps": params["num_inference_steps"],
        # On the CPU, so that a seed means the same noise on every device.
        "generator": torch.Generator("cpu").manual_seed(params["seed"]),
        "output_type": "pil",
    }
    if params["true_cfg_scale"] > 1:
        # Without a negative prompt the pipeline would leave guidance out, with no more than a warning.
        kwargs["negative_prompt"] = request.negative_prompt or " "
    elif request.negative_prompt:  # refused at submission already
        raise BadInput("a negative prompt has no effect unless true_cfg_scale is above 1: raise it, or leave it out")
    _refuse_control_tokens(pipe, request)
    return PipelineCall(kwargs, partial(_reference_area, request.area))


def _refuse_control_tokens(pipe: Any, request: RunRequest) -> None:
    # They would end the user's turn or ask for a photo that is not there, on which the text encoder fails.
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
        found = [token for token in pipe.tokenizer.all_special_tokens if token in text]
        if found:
            raise BadInput(f"the {name} holds {found[0]}, which is one of the model's control tokens: leave it out")


@contextmanager
def _reference_area(area: int) -> Iterator[None]:
    # The pipeline has no argument for the sizes it scales photos to. It reads these two at the start of a call, which
    # is before the first step ends; only one thread runs pipelines, so no other call sees them changed.
    module = pipeline_qwenimage_edit_plus
    before = module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE
    module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = area, min(area, CONDITION_AREA)
    try:
        yield
    finally:
        module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = before
