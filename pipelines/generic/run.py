"""How a resolved job becomes a call of a class that has no family of its own."""

import inspect
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from pipelines.errors import BadInput
from pipelines.generic.params import NEGATIVE_PROMPT, GenericParams, check_shape
from pipelines.photos import fit_area
from pipelines.running import PipelineCall, RunRequest
from pipelines.sizes import SizeParams
from pipelines.tokens import check_control_tokens, check_prompt_tokens


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Give a class what every class of its kind takes, and what its entry allows; all else is left to its defaults.

    Args:
        pipe: a pipeline of diffusers; asked for the arguments of its call, and for its tokenizers.
        photos: RGB, 8 bit, orientation applied, of any sizes; as many as the class takes, which only its entry knows.
        request: the job, resolved.

    Raises:
        BadInput: too many photos, or one that is too narrow; a size of another shape than the photo's, where the class
            cannot be told a size; a prompt that holds a control token or is longer than the class says that it reads;
            a negative prompt, where the class has none.
    """
    if not 1 <= len(photos) <= GenericParams.MAX_INPUT_IMAGES:
        raise BadInput(f"a model takes 1 to {GenericParams.MAX_INPUT_IMAGES} photos, not {len(photos)}")
    arguments = inspect.signature(pipe.__call__).parameters
    if request.negative_prompt and NEGATIVE_PROMPT not in arguments:
        raise BadInput("this model takes no negative prompt: leave it out")
    _check_prompts(pipe, request)
    takes_size = {"height", "width"} <= arguments.keys()
    pictures = _fit(photos, request, takes_size=takes_size)
    params = request.params
    kwargs = {name: value for name, value in params.items() if name not in SizeParams.model_fields}
    kwargs |= {
        # A class that takes one photo may take several for a batch, one of a list among them.
        "image": pictures if len(pictures) > 1 else pictures[0],
        "prompt": request.prompt,
        # On the CPU, so that a seed means the same noise on every device.
        "generator": torch.Generator("cpu").manual_seed(params["seed"]),
        "output_type": "pil",
    }
    if takes_size:
        kwargs |= {"height": params["height"], "width": params["width"]}
    if request.negative_prompt:
        kwargs[NEGATIVE_PROMPT] = request.negative_prompt
    return PipelineCall({name: value for name, value in kwargs.items() if name in arguments})


def _fit(photos: list[Image.Image], request: RunRequest, *, takes_size: bool) -> list[Image.Image]:
    if takes_size:
        return [fit_area(photo, request.area) for photo in photos]
    # The output has the size of the first photo, so that is brought to the size of the output.
    first, height, width = photos[0], request.params["height"], request.params["width"]
    check_shape(height, width, first.height, first.width)
    scaled = first.resize((width, height), Image.Resampling.LANCZOS)
    return [scaled, *(fit_area(photo, request.area) for photo in photos[1:])]


def _check_prompts(pipe: Any, request: RunRequest) -> None:
    tokenizers = [part for part in pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)]
    limit = getattr(pipe, "tokenizer_max_length", None)
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
        for tokenizer in tokenizers:
            check_control_tokens(tokenizer, text, name)
        # Of several tokenizers only the class itself knows which one the limit is for.
        if len(tokenizers) == 1 and isinstance(limit, int):
            check_prompt_tokens(tokenizers[0], text, name, limit)
