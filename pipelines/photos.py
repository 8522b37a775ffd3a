"""From a file's bytes to the pixels a model takes, and from a model's pixels to a file's bytes."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Literal, Never

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pipelines.errors import BadInput
from pipelines.provenance import write_packet
from pipelines.sizes import MAX_OUTPUT_SIDES, check_photo_size, size_of_area

OutputFormat = Literal["webp", "png", "jpeg"]

CONTENT_TYPES: dict[OutputFormat, str] = {"webp": "image/webp", "png": "image/png", "jpeg": "image/jpeg"}
# XMP must fit into one segment of a JPEG, behind the segment's name; the other formats hold more than there ever is.
MAX_XMP_BYTES: dict[OutputFormat, int] = {"jpeg": 65502}

# What Pillow's readers raise for damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, AssertionError, struct.error, zlib.error)

# How to turn the stored pixels upright, by the value of EXIF's orientation; 1, and what is not listed, is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_photo(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a photo of any kind that cameras and editors write.

    Args:
        data: a whole JPEG, PNG or WEBP file; a name or a declared type plays no part.
        max_pixels: upper bound of height x width, checked on the header, before anything is decoded.

    Returns:
        RGB, 8 bit, upright; 16 bits are scaled, what is transparent is laid on white. It carries nothing else of the
        file, such as EXIF data or a colour profile.

    Raises:
        BadInput: the file is of another format, damaged, cut off, animated, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_header(image, max_pixels)
            image.load()
            upright = _turn_upright(image)
            return _to_rgb(upright)
    except UnidentifiedImageError:
        raise BadInput("the file is not a JPEG, PNG or WEBP image, or its beginning is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own bound is checked as the header is read; it lies above every sensible `max_pixels`.
        raise BadInput(f"the image has more than the {max_pixels} pixels that are allowed") from None
    except OSError as error:
        raise BadInput(f"the image is damaged or cut off: {error}") from error
    except DECODE_ERRORS as error:
        # Their texts are for whoever knows Pillow from inside.
        raise BadInput("the image is damaged: what it says of itself makes no sense") from error


def _check_header(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BadInput(
            f"the image has {image.width} x {image.height} = {image.width * image.height} pixels; "
            f"at most {max_pixels} are allowed"
        )
    # MPO is a JPEG with further pictures behind the photo, as many phones write it: a preview, a depth map.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadInput("the image is animated; only still images are allowed")


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODE_ERRORS:
        # The pixels are fine, and viewers show such a photo as it lies.
        return image
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        # Pillow's own conversion clips: all but the darkest values would become white.
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "CMYK" and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG, as Adobe stores them; one without Adobe's mark is stored as it is.
        image = ImageChops.invert(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


class StagedPhoto(Image.Image):
    """A photo of which only those pictures are here that its run will read, scaled beforehand; not its own pixels.

    It has the photo's size, and answers `resize` as the whole photo would. That is all that families and pipelines ask
    of a photo; whatever else is asked fails, rather than to be answered otherwise.

    Args:
        height: of the whole photo, upright, in pixels.
        width: likewise.
        pictures: the photo as `resize` with LANCZOS makes it, by (height, width); RGB, 8 bit.
    """

    def __init__(self, height: int, width: int, pictures: Mapping[tuple[int, int], Image.Image]) -> None:
        super().__init__()
        self._mode = "RGB"
        self._size = (width, height)
        self._pictures = pictures

    def resize(
        self,
        size: Any,
        resample: int | None = None,
        box: Any = None,
        reducing_gap: float | None = None,
    ) -> Image.Image:
        """Give the photo at one of the sizes it was staged for; arguments as Pillow has them.

        Raises:
            ValueError: it was not staged for that.
        """
        width, height = size
        picture = self._pictures.get((height, width))
        if picture is None or resample != Image.Resampling.LANCZOS or box is not None or reducing_gap is not None:
            here = ", ".join(f"{width} x {height}" for height, width in self._pictures)
            raise ValueError(
                f"the photo was asked for at {width} x {height}, but is only here as LANCZOS makes it at {here}"
            )
        return picture.copy()

    def load(self) -> Never:
        """Refuse to give the photo's own pixels, which are not here.

        Raises:
            ValueError: always.
        """
        raise ValueError("the photo's own pixels are not here: `reading_sizes` tells at which sizes it is read")


def fit_area(image: Image.Image, area: int) -> Image.Image:
    """Scale a photo, up or down, to about `area` pixels, both sides a multiple of 16.

    Args:
        image: RGB, 8 bit, any size; orientation already applied.
        area: height x width aimed at, in pixels, at least `pipelines.sizes.MIN_AREA`.

    Returns:
        RGB, 8 bit; the aspect ratio is kept within half a multiple on each side.

    Raises:
        BadInput: the photo is too narrow.
    """
    check_photo_size(image.height, image.width)
    height, width = size_of_area(image.width / image.height, area)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def encode_photo(
    image: Image.Image, image_format: OutputFormat, quality: int = 80, record: Mapping[str, Any] | None = None
) -> bytes:
    """Encode an output.

    Args:
        image: RGB, 8 bit; what else it carries, such as EXIF data or a colour profile, is not written.
        image_format: a key of `CONTENT_TYPES`.
        quality: 1 to 100; PNG loses nothing and has none.
        record: written into the file as `pipelines.provenance.write_packet` says; None: the file holds pixels alone.

    Raises:
        BadInput: the format cannot hold a side that long.
    """
    limit = MAX_OUTPUT_SIDES[image_format]
    if max(image.size) > limit:
        raise BadInput(f"{image_format} holds at most {limit} pixels a side, not {max(image.size)}: ask for png")
    # Named one by one, since for what is not named Pillow takes what the image carries.
    options: dict[str, Any] = {"icc_profile": None, "exif": b"", "comment": b"", "transparency": None}
    if image_format != "png":
        options["quality"] = quality
    if record is not None:
        options |= _xmp_options(write_packet(record, MAX_XMP_BYTES.get(image_format)), image_format)
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def _xmp_options(packet: bytes, image_format: OutputFormat) -> dict[str, Any]:
    if image_format != "png":
        return {"xmp": packet}
    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet)
    return {"pnginfo": chunks}
