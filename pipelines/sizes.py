"""Which sizes a model can run, known without torch so that the server can refuse a photo before a GPU sees it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.errors import BadInput

AspectRatio = Literal["match_input", "16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16"]

# Both families: a latent stands for 8 x 8 pixels, and latents are packed two by two.
MULTIPLE_OF = 16
# The longest photo, scaled to the smallest area, still has a shorter side over 16 pixels. Qwen's pipeline rounds the
# sides of a reference to multiples of 32, so at 16 pixels it would round to nothing and fail.
MAX_PHOTO_RATIO = 50
MIN_AREA = 128 * 128
# Of an explicit width or height.
MIN_SIDE = 64
MAX_SIDE = 2048
# What the encoders of the output formats can hold, in pixels.
MAX_OUTPUT_SIDES = {"webp": 16383, "png": 2**31 - 1, "jpeg": 65500}
# The largest integer that every JSON reader keeps exactly.
MAX_SEED = 2**53 - 1


def check_photo_size(height: int, width: int, max_ratio: int = MAX_PHOTO_RATIO) -> None:
    """Refuse a photo that is too narrow for the pipelines to scale.

    Args:
        height: of the photo with its orientation applied, in pixels.
        width: likewise.
        max_ratio: the family's own, `SizeParams.MAX_PHOTO_RATIO`.

    Raises:
        BadInput: the longer side is more than `max_ratio` times the shorter.
    """
    if max(height, width) > max_ratio * min(height, width):
        raise BadInput(
            f"the photo has {width} x {height} pixels; its longer side may be at most {max_ratio} times the shorter one"
        )


def size_of_area(ratio: float, area: int) -> tuple[int, int]:
    """Choose the size of about `area` pixels with the given ratio, both sides a multiple of `MULTIPLE_OF`.

    Args:
        ratio: width / height, between 1 / `MAX_PHOTO_RATIO` and `MAX_PHOTO_RATIO`.
        area: height x width aimed at, in pixels, at least `MIN_AREA`.

    Returns:
        (height, width) in pixels; each side is within `MULTIPLE_OF` / 2 of the exact one.
    """
    height = math.sqrt(area / ratio)
    return _round_side(height), _round_side(height * ratio)


def _round_side(side: float) -> int:
    return max(MULTIPLE_OF, round(side / MULTIPLE_OF) * MULTIPLE_OF)


class SizeParams(BaseModel):
    """What every family takes: the seed, and the size of the output in one of three ways.

    The size follows the photo (`match_input`), a named ratio, or an explicit width and height.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # The classes of diffusers that the family can call.
    PIPELINES: ClassVar[tuple[str, ...]] = ()
    MAX_INPUT_IMAGES: ClassVar[int] = 1
    # How many times as long as the shorter side of a photo its longer side may be.
    MAX_PHOTO_RATIO: ClassVar[int] = MAX_PHOTO_RATIO
    HAS_NEGATIVE_PROMPT: ClassVar[bool] = False
    # Whether the class tells of each step; else a run is one step, which cannot be stopped.
    REPORTS_STEPS: ClassVar[bool] = True

    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Start of the noise; drawn when left out.")
    aspect_ratio: AspectRatio = Field(
        default="match_input", description="Width to height of the output, at the area the model was trained on."
    )
    width: int | None = Field(
        default=None,
        ge=MIN_SIDE,
        le=MAX_SIDE,
        multiple_of=MULTIPLE_OF,
        description="Width of the output in pixels; goes with height.",
    )
    height: int | None = Field(
        default=None,
        ge=MIN_SIDE,
        le=MAX_SIDE,
        multiple_of=MULTIPLE_OF,
        description="Height of the output in pixels; goes with width.",
    )

    @model_validator(mode="after")
    def _check_one_size(self) -> Self:
        if self.width is None and self.height is None:
            return self
        if self.width is None or self.height is None:
            raise ValueError("width and height go together: give both or neither")
        # A job's resolved parameters hold a ratio and the size made from it; they may be sent again as they are.
        ratio = self._named_ratio()
        if ratio is not None and abs(self.width - self.height * ratio) > MULTIPLE_OF / 2 * (1 + ratio):
            raise ValueError(
                f"width {self.width} and height {self.height} are not {self.aspect_ratio}: give one of the two"
            )
        return self

    def _named_ratio(self) -> float | None:
        if self.aspect_ratio == "match_input":
            return None
        width, height = self.aspect_ratio.split(":")
        return int(width) / int(height)

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether a negative prompt changes anything with these parameters."""
        return self.HAS_NEGATIVE_PROMPT

    def output_size(self, photo_height: int, photo_width: int, area: int) -> tuple[int, int]:
        """Decide the size of the output.

        Args:
            photo_height: of the first photo with its orientation applied, in pixels.
            photo_width: likewise.
            area: the area that the model was trained on, in pixels, at least `MIN_AREA`.

        Returns:
            (height, width) in pixels, multiples of `MULTIPLE_OF`.

        Raises:
            BadInput: the photo is too narrow, whatever the size of the output (the model also reads it at `area`).
        """
        check_photo_size(photo_height, photo_width, self.MAX_PHOTO_RATIO)
        if self.width is not None and self.height is not None:
            return self.height, self.width
        return size_of_area(self._named_ratio() or photo_width / photo_height, area)

    @classmethod
    def reading_sizes(
        cls,
        photo_height: int,
        photo_width: int,
        area: int,
        params: Mapping[str, Any],  # noqa: ARG003 (of use to families that read the first photo as large as the output)
        *,
        is_first: bool,  # noqa: ARG003
    ) -> list[tuple[int, int]]:
        """Tell at which sizes a run reads a photo, so that it can be scaled before the device is free for the run.

        Args:
            photo_height: of a photo that is not too narrow, with its orientation applied, in pixels.
            photo_width: likewise.
            area: the area that the model was trained on, in pixels.
            params: the run's, resolved.
            is_first: whether the photo is the first of its job.

        Returns:
            Each (height, width), in pixels, that the family or its pipeline scales the photo to; no others.
        """
        return cls.photo_sizes(photo_height, photo_width, area)

    @classmethod
    def photo_sizes(cls, photo_height: int, photo_width: int, area: int) -> list[tuple[int, int]]:
        """Tell what `reading_sizes` does, where neither the parameters nor the photo's place matter."""
        return [size_of_area(photo_width / photo_height, area)]

    def resolved(self, photo_height: int, photo_width: int, area: int, seed: int) -> dict[str, Any]:
        """Give every parameter its final value, so that the record alone makes the same picture again.

        Args:
            photo_height: of the first photo with its orientation applied, in pixels.
            photo_width: likewise.
            area: the area that the model was trained on, in pixels.
            seed: taken where the request names none.

        Returns:
            All fields as plain JSON values; height, width and seed are never None.

        Raises:
            BadInput: the photo is too narrow.
        """
        height, width = self.output_size(photo_height, photo_width, area)
        chosen_seed = seed if self.seed is None else self.seed
        return self.model_dump(mode="json") | {"height": height, "width": width, "seed": chosen_seed}
