"""Photos are told by their bytes alone, and never decoded to do so."""

import io
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.images import DamagedHeader, HeaderIncomplete, PhotoHeader, UnsupportedFormat, read_header

ORIENTATION = 0x0112


def encode(image_format, size=(40, 20), mode="RGB", orientation=None, **options):
    """Encode a grey picture; `size` is width, height, as Pillow has it."""
    image = Image.new(mode, size)
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def read_or_needed_bytes(data):
    try:
        return read_header(data)
    except HeaderIncomplete as error:
        return error.needed_bytes


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode("JPEG"), PhotoHeader("jpeg", "image/jpeg", 20, 40)),
        (encode("JPEG", progressive=True), PhotoHeader("jpeg", "image/jpeg", 20, 40)),
        (encode("JPEG", mode="CMYK"), PhotoHeader("jpeg", "image/jpeg", 20, 40)),
        (encode("JPEG", mode="L"), PhotoHeader("jpeg", "image/jpeg", 20, 40)),
        (encode("PNG"), PhotoHeader("png", "image/png", 20, 40)),
        (encode("PNG", mode="P"), PhotoHeader("png", "image/png", 20, 40)),
        (encode("PNG", mode="I;16"), PhotoHeader("png", "image/png", 20, 40)),
        (encode("WEBP"), PhotoHeader("webp", "image/webp", 20, 40)),
        (encode("WEBP", lossless=True), PhotoHeader("webp", "image/webp", 20, 40)),
        (encode("WEBP", mode="RGBA"), PhotoHeader("webp", "image/webp", 20, 40)),
        (encode("WEBP", size=(16383, 2)), PhotoHeader("webp", "image/webp", 2, 16383)),
        (encode("WEBP", size=(2, 16383), lossless=True), PhotoHeader("webp", "image/webp", 16383, 2)),
    ],
)
def test_format_and_size_are_told_by_content(data, expected):
    """Each format in each of its flavours gives its format, content type, height and width."""
    assert read_header(data) == expected


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_shown_one(image_format, orientation):
    """Height and width are those after the EXIF orientation is applied."""
    header = read_header(encode(image_format, orientation=orientation))
    expected = (40, 20) if orientation >= 5 else (20, 40)
    assert (header.height, header.width) == expected


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "count", "value", "turned"),
    [(3, 1, 6, True), (3, 1, 9, False), (3, 2, 6, False), (2, 1, 6, False), (3, 1, 0, False)],
)
def test_orientation_that_makes_no_sense_is_ignored(byte_order, kind, count, value, turned):
    """An orientation of a wrong type, count or value leaves the photo as it lies."""
    start = b"II*\0" if byte_order == "<" else b"MM\0*"
    exif = start + struct.pack(f"{byte_order}IHHHIHHI", 8, 1, ORIENTATION, kind, count, value, 0, 0)
    header = read_header(encode("JPEG", exif=b"Exif\0\0" + exif))
    assert (header.height, header.width) == ((40, 20) if turned else (20, 40))


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff\0\0", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9])
def test_broken_exif_does_not_spoil_a_photo(exif):
    """EXIF that is cut, points nowhere or is none at all is taken as no EXIF."""
    jpeg = encode("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    assert read_header(jpeg[:2] + segment + jpeg[2:]) == read_header(jpeg)


def test_jpeg_header_behind_large_segments_needs_more_bytes():
    """A prefix that ends in a JPEG's profiles or previews asks for more bytes, and enough of them suffice."""
    jpeg = encode("JPEG", icc_profile=random.Random(1).randbytes(300_000), orientation=6)
    lengths = [65_536]
    while isinstance(answer := read_or_needed_bytes(jpeg[: lengths[-1]]), int):
        lengths.append(answer)
    assert (answer.height, answer.width) == (40, 20)
    assert lengths == sorted(set(lengths))
    assert 2 <= len(lengths) <= 6


@pytest.mark.parametrize("segment", [b"\xff\xe0\0\2", b"\xff\xd0", b"\xff\xfe\0\3a"])
def test_a_header_of_nothing_but_small_segments_is_given_up(segment):
    """A megabyte of them, which would take long to read, is refused after as many as no photo has."""
    start = encode("JPEG")[:2]
    assert read_header(start + segment * 900 + encode("JPEG")[2:]).format == "jpeg"
    with pytest.raises(DamagedHeader, match="1000 segments"):
        read_header(start + segment * 300_000)


def test_embedded_preview_is_not_taken_for_the_photo():
    """The size of a JPEG is its own, not that of a preview inside one of its segments."""
    preview = encode("JPEG", size=(8, 8))
    jpeg = encode("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
    assert read_header(jpeg[:2] + segment + jpeg[2:]) == read_header(jpeg)


def test_padding_and_lone_markers_before_a_segment_are_skipped():
    """Fill bytes and markers without data, which the JPEG standard allows, do not hide the frame."""
    jpeg = encode("JPEG")
    assert read_header(jpeg[:2] + b"\xff\x01" + b"\xff" * 7 + jpeg[2:]) == read_header(jpeg)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_every_prefix_is_incomplete_or_right(image_format):
    """However a photo is cut, the answer is its header or a request for more bytes, once its format is told."""
    data = encode(image_format, orientation=6)
    whole = read_header(data)
    for length in range(12, len(data)):
        answer = read_or_needed_bytes(data[:length])
        if isinstance(answer, int):
            assert answer > length
        else:
            assert answer.format == whole.format
            assert {answer.height, answer.width} == {40, 20}


def test_huge_png_is_measured_without_being_decoded():
    """A PNG that claims 20,000 x 20,000 pixels is told at once and in little memory, without a warning."""
    data = png_header(20_000, 20_000) + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    tracemalloc.start()
    header = read_header(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (header.height, header.width) == (20_000, 20_000)
    assert peak_bytes < 100_000


def test_the_largest_claims_are_passed_on():
    """A header that lies about its size is told as it is; the caller's limits decide."""
    header = read_header(png_header(2**31 - 1, 2**31 - 1))
    assert header.height * header.width > 10**18


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty", "JPEG, PNG or WEBP"]),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ["HEIC", "export it as JPEG"]),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", ["HEIC"]),
        (b"\0\0\0\x1cftypavif\0\0\0\0", ["AVIF", "export"]),
        (b"\0\0\0\x20ftypqt  \0\0\0\0", ["film"]),
        (encode("GIF", mode="P"), ["GIF", "export"]),
        (encode("TIFF"), ["TIFF", "export"]),
        (encode("BMP"), ["BMP"]),
        (b"8BPS\0\x01", ["Photoshop"]),
        (b"%PDF-1.7\n", ["PDF"]),
        (b"PK\x03\x04\x14\0", ["ZIP"]),
        (b"\0\0\0\x0cJXL \r\n\x87\n", ["JPEG XL"]),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["SVG", "export"]),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x --><svg/>", ["SVG"]),
        (b"<!DOCTYPE html><title>404</title>", ["web page"]),
        (b"this was never a photo\n", ["text"]),
        (b"\x7fELF\x02\x01\x01\0", ["unknown format"]),
        (b"RIFF\x24\0\0\0WAVEfmt ", ["unknown format"]),
        (png_header(9, 9) + png_chunk(b"acTL", struct.pack(">II", 2, 0)), ["animated PNG"]),
        (
            encode("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 20), "red")]),
            ["animated WEBP", "export one picture"],
        ),
    ],
)
def test_anything_else_is_named_with_what_to_do(data, words):
    """What is no photo is refused with its name and a way out."""
    with pytest.raises(UnsupportedFormat) as refused:
        read_header(data)
    for word in words:
        assert word in refused.value.detail


@pytest.mark.parametrize(
    "data",
    [
        png_header(0, 9),
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IDAT", b"\0" * 20),
        b"\xff\xd8\xff\xe0\0\0" + b"\0" * 40,
        b"\xff\xd8\xff\xe0\0\x04ab" + b"not a marker",
        b"\xff\xd8\xff\xda\0\x04ab" + b"\0" * 40,
        b"\xff\xd8\xff\xc0\0\x04\x08\0" + b"\0" * 40,
        b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x10\x01" + b"\0" * 40,
        b"RIFF\x30\0\0\0WEBPJUNK" + b"\0" * 40,
        b"RIFF\x30\0\0\0WEBPVP8 " + b"\0" * 40,
    ],
)
def test_headers_without_sense_are_damaged(data):
    """A file that only begins like a photo is refused as damaged."""
    with pytest.raises(DamagedHeader):
        read_header(data)


@given(
    start=st.sampled_from([b"", *(encode(name, orientation=6)[:64] for name in ("JPEG", "PNG", "WEBP"))]),
    cut=st.integers(0, 64),
    rest=st.binary(max_size=200),
)
def test_no_bytes_break_the_reader(start, cut, rest):
    """Whatever the bytes, the answer is a header or one of the three refusals."""
    try:
        header = read_header(start[:cut] + rest)
    except (UnsupportedFormat, HeaderIncomplete, DamagedHeader):
        return
    assert header.height > 0
    assert header.width > 0
