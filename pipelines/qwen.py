"""What the calls of both Qwen-Image-Edit pipelines have in common: all but the photos."""

from typing import Any

import torch

from pipelines.errors import BadInput
from pipelines.running import RunRequest
from pipelines.tokens import check_control_tokens, check_prompt_tokens

# The pipelines cut nothing off: what is too long would be encoded whole, and take memory and time that no job was
# planned with. 1024 is the longest that they accept as `max_sequence_length` (512, their default for it, is given to
# nothing either); the presets have under 140 words. The photos' own tokens and the system prompt are not counted.
MAX_PROMPT_TOKENS = 1024


def build_kwargs(pipe: Any, request: RunRequest) -> dict[str, Any]:
    """Give the arguments that both pipelines take alike; the photos come on top.

    Args:
        pipe: one of the two pipelines; only asked for its tokenizer.
        request: the job, resolved.

    Raises:
        BadInput: a prompt that is too long or holds a control token, or a negative prompt that guidance would not use.
    """
    params = request.params
    kwargs = {
        "prompt": request.prompt,
        "true_cfg_scale": params["true_cfg_scale"],
        "height": params["height"],
        "width": params["width"],
        "num_inference_steps": params["num_inference_steps"],
        "max_sequence_length": MAX_PROMPT_TOKENS,
        # On the CPU, so that a seed means the same noise on every device.
        "generator": torch.Generator("cpu").manual_seed(params["seed"]),
        "output_type": "pil",
    }
    if params["true_cfg_scale"] > 1:
        # Without a negative prompt the pipeline would leave guidance out, with no more than a warning.
        kwargs["negative_prompt"] = request.negative_prompt or " "
    elif request.negative_prompt:  # refused at submission already
        raise BadInput("a negative prompt has no effect unless true_cfg_scale is above 1: raise it, or leave it out")
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
        check_control_tokens(pipe.tokenizer, text, name)
        check_prompt_tokens(pipe.tokenizer, text, name, MAX_PROMPT_TOKENS)
    return kwargs
