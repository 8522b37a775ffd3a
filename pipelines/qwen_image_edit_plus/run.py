"""How a resolved job becomes a call of QwenImageEditPlusPipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from pipelines.errors import BadInput
from pipelines.qwen import build_kwargs
from pipelines.qwen_image_edit_plus.params import CONDITION_AREA, Params
from pipelines.running import PipelineCall, RunRequest
from pipelines.sizes import check_photo_size


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a QwenImageEditPlusPipeline; only asked for its tokenizer.
        photos: 1 to 3, RGB, 8 bit, orientation applied, of any sizes; the prompt calls them Picture 1, 2 and 3.
        request: the job, resolved.

    Raises:
        BadInput: too many photos, one of them too narrow, a prompt that is too long or holds a control token, or a
            negative prompt that guidance would not use.
    """
    if not 1 <= len(photos) <= Params.MAX_INPUT_IMAGES:
        raise BadInput(f"this model takes 1 to {Params.MAX_INPUT_IMAGES} photos, not {len(photos)}")
    for photo in photos:
        check_photo_size(photo.height, photo.width)
    kwargs = build_kwargs(pipe, request) | {"image": list(photos)}
    return PipelineCall(kwargs, partial(_reference_area, request.area))


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
