"""How a resolved job becomes a call of QwenImageEditPipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

from pipelines.errors import BadInput
from pipelines.qwen import build_kwargs
from pipelines.running import PipelineCall, RunRequest
from pipelines.sizes import check_photo_size


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Say everything to the pipeline that it would otherwise decide by itself.

    Args:
        pipe: a QwenImageEditPipeline; only asked for its tokenizer.
        photos: one, RGB, 8 bit, orientation applied, of any size.
        request: the job, resolved.

    Raises:
        BadInput: not exactly one photo, or one that is too narrow; a prompt that is too long or holds a control token;
            or a negative prompt that guidance would not use.
    """
    if len(photos) != 1:
        raise BadInput(f"this model takes exactly one photo, not {len(photos)}")
    check_photo_size(photos[0].height, photos[0].width)
    # Not as a list: the pipeline scales what is in a list for its VAE only, and the text encoder would see the photo
    # as it came.
    kwargs = build_kwargs(pipe, request) | {"image": photos[0]}
    return PipelineCall(kwargs, partial(_reference_area, request.area))


@contextmanager
def _reference_area(area: int) -> Iterator[None]:
    # The pipeline has no argument for the size it scales a photo to: it asks this function for a million pixels, at the
    # start of a call, which is before the first step ends. Only one thread runs pipelines, so no other call sees it
    # changed. The text encoder is shown what the VAE is.
    module = pipeline_qwenimage_edit
    before = module.calculate_dimensions

    def dimensions_of_area(target_area: int, ratio: float) -> tuple[int, int, None]:  # noqa: ARG001 - a million
        return before(area, ratio)

    module.calculate_dimensions = dimensions_of_area
    try:
        yield
    finally:
        module.calculate_dimensions = before
