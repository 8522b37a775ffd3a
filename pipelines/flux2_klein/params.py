"""The parameters of FLUX.2 [klein], published as a JSON Schema and checked at submission."""

from typing import ClassVar

from pydantic import Field

from pipelines.sizes import MULTIPLE_OF, SizeParams, check_photo_size, size_of_area

# What the pipeline takes of a photo as it is. It fails on a narrower photo and on a shorter side; it scales a larger
# photo down, and cuts the edges off what is then no multiple of 16.
MAX_RATIO = 8
MIN_REFERENCE_SIDE = 64
MAX_REFERENCE_AREA = 1024 * 1024


def reference_size(photo_height: int, photo_width: int, area: int) -> tuple[int, int]:
    """Choose the size at which the model reads a photo.

    Args:
        photo_height: of the photo with its orientation applied, in pixels.
        photo_width: likewise; the longer side is at most `MAX_RATIO` times the shorter.
        area: height x width aimed at, in pixels.

    Returns:
        (height, width) in pixels: multiples of 16, of which the pipeline scales and cuts nothing.
    """
    ratio = max(photo_height, photo_width) / min(photo_height, photo_width)
    # A small area would make the shorter side of a narrow photo too short.
    wanted = max(min(area, MAX_REFERENCE_AREA), MIN_REFERENCE_SIDE**2 * ratio)
    shorter, longer = size_of_area(ratio, round(wanted))
    # Rounding to multiples may have passed two of the pipeline's bounds. At 1024 x 1024, 5:4 becomes 1152 x 912, which
    # is too large: it would be scaled a second time, and lose 14 columns and 15 rows.
    most = MAX_REFERENCE_AREA // shorter // MULTIPLE_OF * MULTIPLE_OF
    longer = min(longer, MAX_RATIO * shorter, most)
    return (shorter, longer) if photo_height <= photo_width else (longer, shorter)


class Params(SizeParams):
    """What a request may set on a FLUX.2 [klein] model, distilled or base."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    # The pipeline itself takes any number. Four are what the model's makers allow in their own service:
    # https://docs.bfl.ai/guides/prompting_editing_overview
    MAX_INPUT_IMAGES: ClassVar[int] = 4
    MAX_PHOTO_RATIO: ClassVar[int] = MAX_RATIO

    # The defaults are the base model's and the pipeline's own. An entry for a distilled model sets its own, and were
    # they left out, its jobs would be refused; the other way round, a base model would make poor pictures in silence.
    num_inference_steps: int = Field(default=50, ge=1, le=100, description="Denoising steps; time grows with them.")
    guidance_scale: float = Field(
        default=4.0,
        ge=1.0,
        le=20.0,
        allow_inf_nan=False,
        description="How strongly the prompt steers; above 1 each step runs the model twice. A distilled model has its "
        "guidance built in and takes only 1.",
    )

    def output_size(self, photo_height: int, photo_width: int, area: int) -> tuple[int, int]:
        """Decide the size of the output as `SizeParams.output_size` does, but the photo's ratio as the model reads it.

        Raises:
            BadInput: the photo is too narrow, whatever the size of the output.
        """
        check_photo_size(photo_height, photo_width, self.MAX_PHOTO_RATIO)
        if self.width is None and self.aspect_ratio == "match_input" and area <= MAX_REFERENCE_AREA:
            # The model counts rows and columns of photo and output alike: only at the same size, walls stay in place.
            return reference_size(photo_height, photo_width, area)
        return super().output_size(photo_height, photo_width, area)

    @classmethod
    def photo_sizes(cls, photo_height: int, photo_width: int, area: int) -> list[tuple[int, int]]:
        """Tell at which sizes a run reads a photo, as `SizeParams.photo_sizes` does."""
        return [reference_size(photo_height, photo_width, area)]
