"""Reads what a photo is, and how large, from its first bytes: the API decides on a photo without decoding it."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from server.errors import RequestError

CONTENT_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}

_ALLOWED = "send a JPEG, PNG or WEBP"
_EXPORT = f"export it as one: {_ALLOWED}"
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_MARKERS_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG: no length and no data follow these
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_FILL = re.compile(rb"\xff+")  # any number may stand before a marker, of which the last belongs to it
# Photos have dozens, the largest colour profile 255. A header made of nothing but small ones would take long to read.
_MAX_SEGMENTS = 1000
_NEXT_BYTES = 64_000  # asked for where a header is cut but does not tell its own length
_TURNED_ORIENTATIONS = frozenset({5, 6, 7, 8})  # EXIF: shown with height and width exchanged
# First bytes of what people send by mistake, and what to tell them. The name and the content type are never asked.
_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"GIF87a", f"a GIF; {_EXPORT}"),
    (b"GIF89a", f"a GIF; {_EXPORT}"),
    (b"II*\0", f"a TIFF or a camera's raw file; {_EXPORT}"),
    (b"MM\0*", f"a TIFF or a camera's raw file; {_EXPORT}"),
    (b"BM", f"a BMP; {_EXPORT}"),
    (b"8BPS", f"a Photoshop file; {_EXPORT}"),
    (b"\0\0\0\x0cJXL ", f"a JPEG XL; {_EXPORT}"),
    (b"\xff\x0a", f"a JPEG XL; {_EXPORT}"),
    (b"\0\0\0\x0cjP  ", f"a JPEG 2000; {_EXPORT}"),
    (b"%PDF", "a PDF; send each of its photos as a JPEG, PNG or WEBP of its own"),
    (b"PK\x03\x04", f"a ZIP archive or an office document; {_ALLOWED} of each photo"),
)
# The brand after `ftyp` in files of the ISO base media family.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})


class UnsupportedFormat(RequestError):
    """Raised when bytes are no JPEG, PNG or WEBP photo; the message says what they are and what to do."""

    code: ClassVar[str] = "unsupported_format"
    title: ClassVar[str] = "Not a photo that can be used"
    http_status: ClassVar[int] = 422


class DamagedHeader(RequestError):
    """Raised when a file begins as a JPEG, PNG or WEBP but its header makes no sense."""

    code: ClassVar[str] = "damaged_image"
    title: ClassVar[str] = "The photo is damaged"
    http_status: ClassVar[int] = 422


class HeaderIncomplete(RequestError):
    """Raised when the bytes end before the size is told.

    `needed_bytes` is how many first bytes to try next. If there are no more, the file is truncated.
    """

    code: ClassVar[str] = "truncated_image"
    title: ClassVar[str] = "The photo is truncated"
    http_status: ClassVar[int] = 422

    def __init__(self, image_format: str, needed_bytes: int) -> None:
        super().__init__(f"the file begins as a {image_format.upper()} but ends before its size is told; send it again")
        self.needed_bytes = needed_bytes


@dataclass(frozen=True)
class PhotoHeader:
    """What the first bytes of a photo say; decoding may still find it damaged.

    `height` and `width` are in pixels, as the photo is shown: orientation by EXIF is applied where its tag is among
    the bytes (a WEBP carries it behind the pixels).
    """

    format: Literal["jpeg", "png", "webp"]
    content_type: str
    height: int
    width: int


def read_header(data: bytes) -> PhotoHeader:
    """Tell format and size of a photo from its first bytes; nothing is decoded, whatever size is claimed.

    Args:
        data: the file from its start, whole or cut anywhere. 64 kB are enough for most photos.

    Raises:
        UnsupportedFormat: it is something else, or animated.
        HeaderIncomplete: more bytes are needed.
        DamagedHeader: the header makes no sense.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    raise UnsupportedFormat(f"the file is {_describe(data)}")


def _read_jpeg(data: bytes) -> PhotoHeader:
    orientation = 1
    for marker, position, length in _jpeg_segments(data):
        segment = data[position : position + length]
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            if len(segment) < length:
                raise HeaderIncomplete("jpeg", position + length)
            orientation = _orientation(segment[6:])
        elif marker in _START_OF_FRAME:
            if length < 5:
                raise DamagedHeader("the JPEG's frame header is too short; export the photo again")
            if len(segment) < 5:
                raise HeaderIncomplete("jpeg", position + length)
            height, width = struct.unpack_from(">HH", segment, 1)
            return _make_header("jpeg", height, width, orientation)
    raise DamagedHeader("the JPEG has no frame header before its pixels; export the photo again")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, position and length (without the length field) of each segment up to the first scan."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        if fill := _FILL.match(data, position):
            position = fill.end() - 1
        head = data[position : position + 4]
        if head and head[0] != 0xFF:
            raise DamagedHeader("the JPEG's header is broken between two segments; export the photo again")
        if len(head) < 4:
            raise HeaderIncomplete("jpeg", position + _NEXT_BYTES)
        marker, length = head[1], int.from_bytes(head[2:4]) - 2
        if marker in _MARKERS_ALONE:
            position += 2
            continue
        if marker in {0xD9, 0xDA}:  # the end, or a scan: pixels follow
            return
        if length < 0:
            raise DamagedHeader("the JPEG has a segment of impossible length; export the photo again")
        yield marker, position + 4, length
        position += 4 + length
    raise DamagedHeader(f"the JPEG has more than {_MAX_SEGMENTS} segments before its pixels; export the photo again")


def _read_png(data: bytes) -> PhotoHeader:
    if len(data) < 33:
        raise HeaderIncomplete("png", _NEXT_BYTES)
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise DamagedHeader("the PNG does not begin with its header; export the photo again")
    width, height = struct.unpack_from(">II", data, 16)
    orientation = 1
    position = 33
    while len(data) >= position + 8:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            break
        if kind in {b"acTL", b"eXIf"} and len(data) < position + 8 + length:
            raise HeaderIncomplete("png", position + 8 + length)
        if kind == b"acTL" and data[position + 8 : position + 12] > b"\0\0\0\x01":
            raise UnsupportedFormat("the file is an animated PNG; export one picture of it")
        if kind == b"eXIf":
            orientation = _orientation(data[position + 8 : position + 8 + length])
        position += 12 + length
    return _make_header("png", height, width, orientation)


def _read_webp(data: bytes) -> PhotoHeader:
    if len(data) < 30:
        raise HeaderIncomplete("webp", _NEXT_BYTES)
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & 0x02:
            raise UnsupportedFormat("the file is an animated WEBP; export one picture of it")
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return _make_header("webp", height, width, _webp_orientation(data))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return _make_header("webp", height & 0x3FFF, width & 0x3FFF, 1)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return _make_header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 1)
    raise DamagedHeader("the WEBP's first chunk is none that WEBP knows; export the photo again")


def _webp_orientation(data: bytes) -> int:
    position = 12
    while len(data) >= position + 8:
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            if len(data) < position + 8 + length:
                raise HeaderIncomplete("webp", position + 8 + length)
            return _orientation(data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    return 1


def _orientation(exif: bytes) -> int:
    """Orientation 1 to 8 from an EXIF block; 1 where there is none or it makes no sense, as decoders take it."""
    byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if byte_order is None or len(exif) < 10:
        return 1
    (directory,) = struct.unpack_from(f"{byte_order}I", exif, 4)
    (num_entries,) = struct.unpack(f"{byte_order}H", exif[directory : directory + 2].ljust(2, b"\0"))
    for position in range(directory + 2, directory + 2 + 12 * num_entries, 12):
        if len(exif) < position + 12:
            break
        tag, kind, count, value = struct.unpack_from(f"{byte_order}HHIH", exif, position)
        if tag == _ORIENTATION_TAG and kind == _SHORT and count == 1:
            return value
    return 1


def _make_header(
    image_format: Literal["jpeg", "png", "webp"], height: int, width: int, orientation: int
) -> PhotoHeader:
    if height == 0 or width == 0:
        raise DamagedHeader(f"the {image_format.upper()} says that it has no pixels; export the photo again")
    if orientation in _TURNED_ORIENTATIONS:
        height, width = width, height
    return PhotoHeader(image_format, CONTENT_TYPES[image_format], height, width)


def _describe(data: bytes) -> str:
    """What bytes are that are no photo, and what to do about it."""
    if not data:
        return f"empty; {_ALLOWED}"
    for start, description in _OTHER_FORMATS:
        if data.startswith(start):
            return description
    if data[4:8] == b"ftyp":
        return _describe_media(data[8:12])
    return _describe_text(data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower())


def _describe_media(brand: bytes) -> str:
    if brand in _HEIC_BRANDS:
        return "a HEIC, as iPhones take; export it as JPEG, or choose 'Most Compatible' in the camera's settings"
    if brand in _AVIF_BRANDS:
        return f"an AVIF; {_EXPORT}"
    return f"a film; {_ALLOWED} of a single picture"


def _describe_text(text: bytes) -> str:
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return f"an SVG drawing; {_EXPORT}"
    if text.startswith((b"<!doctype", b"<html")):
        return f"a web page, perhaps an error page saved under a photo's name; {_ALLOWED}"
    if text.isascii() and min(text, default=0) > 8:
        return f"text, not a photo; {_ALLOWED}"
    return f"of an unknown format; {_ALLOWED}"
