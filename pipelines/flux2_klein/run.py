"""How a resolved job becomes a call of Flux2KleinPipeline."""

from typing import Any

import torch
from PIL import Image

from pipelines.errors import BadInput
from pipelines.flux2_klein.params import Params, reference_size
from pipelines.running import PipelineCall, RunRequest
from pipelines.sizes import check_photo_size
from pipelines.tokens import check_control_tokens, check_prompt_tokens

# Of the prompt within the tokenizer's chat template; the pipeline cuts off what is beyond, the template's end first.
MAX_TOKENS = 512


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a Flux2KleinPipeline; asked for its tokenizer, and whether it is distilled.
        photos: 1 to 4, RGB, 8 bit, orientation applied, of any sizes; their order counts.
        request: the job, resolved.

    Raises:
        BadInput: too many photos, or one that is too narrow; a prompt that is too long or holds a control token; a
            negative prompt, which the model has not; guidance that a distilled model would not use.
    """
    if not 1 <= len(photos) <= Params.MAX_INPUT_IMAGES:
        raise BadInput(f"this model takes 1 to {Params.MAX_INPUT_IMAGES} photos, not {len(photos)}")
    for photo in photos:
        check_photo_size(photo.height, photo.width, Params.MAX_PHOTO_RATIO)
    if request.negative_prompt:
        raise BadInput("this model takes no negative prompt: leave it out")
    params = request.params
    if pipe.config.is_distilled and params["guidance_scale"] > 1:
        # The pipeline would ignore it, with no more than a warning.
        raise BadInput(
            f"guidance_scale {params['guidance_scale']} has no effect on this distilled model, which takes only 1"
        )
    _check_prompt(pipe.tokenizer, request.prompt)
    return PipelineCall(
        {
            "image": [fit_reference(photo, request.area) for photo in photos],
            "prompt": request.prompt,
            "guidance_scale": params["guidance_scale"],
            # Without them the output has the size of the first photo as the pipeline has scaled and cut it.
            "height": params["height"],
            "width": params["width"],
            "num_inference_steps": params["num_inference_steps"],
            "max_sequence_length": MAX_TOKENS,
            # On the CPU, so that a seed means the same noise on every device.
            "generator": torch.Generator("cpu").manual_seed(params["seed"]),
            "output_type": "pil",
        }
    )


def check_pipeline(pipe: Any) -> str | None:
    """Say what the pipeline lacks that every call needs; None where it lacks nothing."""
    if getattr(pipe.tokenizer, "chat_template", None) is None:
        return "the tokenizer has no chat template (tokenizer/chat_template.jinja); fetch it again"
    return None


def fit_reference(photo: Image.Image, area: int) -> Image.Image:
    """Scale a photo, up or down, to a size that the pipeline takes as it is.

    Args:
        photo: RGB, 8 bit, at most `Params.MAX_PHOTO_RATIO` to 1.
        area: height x width aimed at, in pixels.

    Returns:
        RGB, 8 bit, of the size that `reference_size` says.
    """
    height, width = reference_size(photo.height, photo.width, area)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def _check_prompt(tokenizer: Any, prompt: str) -> None:
    check_control_tokens(tokenizer, prompt, "prompt")
    # As the pipeline makes it.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    check_prompt_tokens(tokenizer, text, "prompt", MAX_TOKENS)
