import contextlib
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from pipelines.errors import BadInput
from pipelines.photos import CONTENT_TYPES, StagedPhoto, decode_photo, encode_photo, fit_area

MAX_PIXELS = 60_000_000
# Corners that differ, so that every flip and rotation shows.
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def draw_photo(height=48, width=80):
    photo = Image.new("RGB", (width, height), BLACK)
    photo.paste(RED, (0, 0, width // 2, height // 2))
    photo.paste(GREEN, (width // 2, 0, width, height // 2))
    photo.paste(BLUE, (0, height // 2, width // 2, height))
    return photo


def save(image, image_format, **options):
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def decode(data):
    return decode_photo(data, max_pixels=MAX_PIXELS)


def png(height, width, bit_depth, color_type, rows, *, extra=b""):
    """Write a PNG chunk by chunk, for kinds that Pillow reads but does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_same(image, expected):
    assert np.array_equal(pixels(image), pixels(expected.convert("RGB")))


def assert_alike(image, expected):
    """A lossy format blurs the edges between colours: the mean is small, the corners are as they were."""
    assert image.size == expected.size
    assert np.abs(pixels(image) - pixels(expected.convert("RGB"))).mean() < 4


@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_format_is_decoded_exactly(image_format, options):
    """PNG and lossless WEBP give back the very pixels that were saved."""
    assert_same(decode(save(draw_photo(), image_format, **options)), draw_photo())


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("WEBP", {}), ("JPEG", {}), ("JPEG", {"progressive": True})],
    ids=["webp", "jpeg", "progressive jpeg"],
)
def test_lossy_format_is_decoded(image_format, options):
    """WEBP and JPEG, progressive or not, give back the picture that was saved."""
    assert_alike(decode(save(draw_photo(), image_format, quality=95, **options)), draw_photo())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(image_format, orientation):
    """A photo stored in any of the eight EXIF orientations comes out upright."""
    stored_as = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = draw_photo()
    for step in stored_as[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}[image_format]
    assert_alike(decode(save(stored, image_format, exif=exif, **options)), draw_photo())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_refuse_a_photo(image_format):
    """EXIF data that cannot be read leaves the photo as it lies."""
    assert_alike(
        decode(save(draw_photo(), image_format, quality=95, exif=b"Exif\0\0no TIFF header here")), draw_photo()
    )


def test_unknown_orientation_does_not_refuse_a_photo():
    """An orientation outside 1 to 8 leaves the photo as it lies."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    assert_same(decode(save(draw_photo(), "PNG", exif=exif)), draw_photo())


def test_sixteen_bit_grey_is_scaled():
    """All 65536 levels are spread over 256; the ends stay the ends."""
    levels = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], np.uint16)
    decoded = decode(save(Image.fromarray(levels), "PNG"))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert_same(decoded, Image.merge("RGB", [decoded.getchannel(0)] * 3))


@pytest.mark.parametrize(
    ("color_type", "values", "expected"),
    [
        (2, [(65535, 32896, 0), (257, 65535, 771)], [(255, 128, 0), (1, 255, 3)]),
        (6, [(65535, 32896, 0, 65535), (0, 0, 0, 0)], [(255, 128, 0), (255, 255, 255)]),
        (4, [(32896, 65535), (0, 0)], [(128, 128, 128), (255, 255, 255)]),
    ],
    ids=["rgb", "rgba", "grey with alpha"],
)
def test_sixteen_bit_channels_are_scaled(color_type, values, expected):
    """16-bit PNGs with several channels keep their colours, and their alpha lies on white."""
    row = b"".join(struct.pack(f">{len(value)}H", *value) for value in values)
    decoded = decode(png(1, len(values), 16, color_type, [row]))
    assert [decoded.getpixel((x, 0)) for x in range(len(values))] == expected


def with_alpha(mode):
    photo = draw_photo().convert(mode.removesuffix("A"))
    alpha = Image.new("L", photo.size, 255)
    alpha.paste(0, (0, 0, photo.width // 2, photo.height // 2))
    alpha.paste(128, (photo.width // 2, 0, photo.width, photo.height // 2))
    photo.putalpha(alpha)
    return photo


@pytest.mark.parametrize(("mode", "image_format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_alpha_is_laid_on_white(mode, image_format):
    """What is transparent becomes white, half transparent half white, the rest stays."""
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    decoded = decode(save(with_alpha(mode), image_format, **options))
    opaque = decode(save(draw_photo().convert(mode.removesuffix("A")), "PNG"))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((0, 47)) == opaque.getpixel((0, 47))
    half = (255 + pixels(opaque)[0, 79]) / 2
    assert np.abs(pixels(decoded)[0, 79] - half).max() <= 1


def test_palette_is_resolved():
    """A palette PNG gives the colours of its palette."""
    assert_same(decode(save(draw_photo().convert("P", palette=Image.Palette.ADAPTIVE), "PNG")), draw_photo())


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\xff\xff"], ids=["one index", "alpha per index"])
def test_transparent_palette_entry_becomes_white(transparency):
    """A transparent colour of a palette is laid on white, in both ways PNG has to say it."""
    palette = Image.new("P", (4, 1))
    palette.putpalette([*RED, *GREEN, *BLUE, *BLACK])
    palette.putdata([0, 1, 2, 3])
    decoded = decode(save(palette, "PNG", transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [(255, 255, 255), GREEN, BLUE, BLACK]


def test_palette_with_alpha_mode_is_laid_on_white():
    """PA, which Pillow has though no file stores it, takes the same way as other pictures with alpha."""
    picture = draw_photo().convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    picture.putalpha(Image.new("L", picture.size, 0))
    assert decode(save(picture.convert("RGBA"), "PNG")).getextrema() == ((255, 255), (255, 255), (255, 255))


def test_transparent_colour_of_an_rgb_png_becomes_white():
    """A PNG without an alpha channel may name one colour as transparent."""
    decoded = decode(save(draw_photo(), "PNG", transparency=RED))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((79, 0)) == GREEN


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_grey_and_black_and_white_become_rgb(mode, image_format):
    """One channel becomes three alike; one bit becomes black and white."""
    source = draw_photo().getchannel("R").convert(mode)
    assert_alike(decode(save(source, image_format)), source)


def test_cmyk_jpeg_keeps_its_colours():
    """A CMYK JPEG as Adobe and Pillow write it, with inverted values and Adobe's mark, gives its colours."""
    assert_alike(decode(save(draw_photo().convert("CMYK"), "JPEG", quality=98)), draw_photo())


def test_cmyk_jpeg_without_adobes_mark_is_not_inverted():
    """Only Adobe's mark says that the values are stored inverted."""
    # Pillow writes the mark and inverts: inverting before, and cutting the mark out, leaves plain values.
    marked = save(ImageChops.invert(draw_photo().convert("CMYK")), "JPEG", quality=98)
    start = marked.index(b"\xff\xee")
    length = 2 + struct.unpack(">H", marked[start + 2 : start + 4])[0]
    assert b"Adobe" in marked[start : start + length]
    assert_alike(decode(marked[:start] + marked[start + length :]), draw_photo())


def test_phone_photo_with_further_pictures_is_a_still_image():
    """A JPEG that carries a preview behind the photo, as phones write it, gives the photo."""
    preview = draw_photo().rotate(180)
    decoded = decode(save(draw_photo(), "MPO", save_all=True, append_images=[preview], quality=95))
    assert_alike(decoded, draw_photo())


def test_decoded_photo_carries_nothing_else():
    """EXIF data and colour profiles of the upload do not reach an output."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    decoded = decode(save(draw_photo(), "JPEG", exif=exif, icc_profile=b"profile"))
    assert decoded.info == {}
    for image_format in CONTENT_TYPES:
        assert b"a camera" not in encode_photo(decoded, image_format)
        assert b"profile" not in encode_photo(decoded, image_format)


GPS = ("2024:05:17", "GPSMAP 66", "a phone", "Photographer", "N48", "a profile", "a comment")


def photo_that_says_where(image_format):
    """A photo as a phone writes it: place, date and owner in EXIF and in XMP, a colour profile, a comment."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a phone"
    exif[ExifTags.Base.Artist] = "Photographer"
    place = exif.get_ifd(ExifTags.IFD.GPSInfo)
    place[ExifTags.GPS.GPSLatitudeRef] = "N"
    place[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 13.5)
    place[ExifTags.GPS.GPSDateStamp] = "2024:05:17"
    place[ExifTags.GPS.GPSAreaInformation] = b"ASCII\0\0\0GPSMAP 66"
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/' GPSLatitude='N48'/>"
    options = {"xmp": xmp, "comment": b"a comment"}
    if image_format == "PNG":
        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp)
        chunks.add_text("Comment", "a comment")
        options = {"pnginfo": chunks}
    return save(draw_photo(), image_format, exif=exif, icc_profile=b"a profile", **options)


@pytest.mark.parametrize("record", [None, {"job_id": "7"}], ids=["without a record", "with a record"])
@pytest.mark.parametrize("uploaded_as", ["JPEG", "PNG", "WEBP"])
def test_where_a_photo_was_taken_does_not_reach_an_output(uploaded_as, record):
    """Nothing that the photo's file says of place, date, camera and owner stands in an output of any format."""
    data = photo_that_says_where(uploaded_as)
    with Image.open(io.BytesIO(data)) as uploaded:
        assert uploaded.getexif().get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 8.0, 13.5)
    words = [word.encode() for word in GPS]
    assert sum(word in data for word in words) >= 5  # a PNG compresses its profile, a WEBP has no comment
    decoded = decode(data)
    for image_format in CONTENT_TYPES:
        output = encode_photo(decoded, image_format, record=record)
        assert not [word for word in words if word in output]
        with Image.open(io.BytesIO(output)) as image:
            assert dict(image.getexif()) == {}
            assert "exif" not in image.info


def parts_of(data, image_format):
    """Name the parts of a file: segments of a JPEG up to its pixels, chunks of a PNG or WEBP."""
    names, at = set(), {"jpeg": 2, "png": 8, "webp": 12}[image_format]
    while at < len(data) and "ffda" not in names:
        if image_format == "jpeg":
            name, length = struct.unpack(">2sH", data[at : at + 4])
            name, size = name.hex(), length + 2
        elif image_format == "png":
            length, name = struct.unpack(">I4s", data[at : at + 8])
            name, size = name.decode(), length + 12
        else:
            name, length = struct.unpack("<4sI", data[at : at + 8])
            name, size = name.decode(), length + length % 2 + 8
        names.add(name)
        at += size
    return names


@pytest.mark.parametrize(
    ("image_format", "pixels_alone", "xmp"),
    [
        ("jpeg", {"ffe0", "ffdb", "ffc0", "ffc4", "ffda"}, {"ffe1"}),
        ("png", {"IHDR", "IDAT", "IEND"}, {"iTXt"}),
        ("webp", {"VP8 "}, {"VP8X", "XMP "}),
    ],
)
def test_file_without_a_record_holds_pixels_alone(image_format, pixels_alone, xmp):
    """Without a record a file has the parts that its pixels need, whatever the image carries; a record adds XMP."""
    image = draw_photo()
    image.info = {
        "exif": b"Exif",
        "icc_profile": b"p",
        "xmp": b"x",
        "comment": b"c",
        "transparency": RED,
        "dpi": (9, 9),
    }
    plain = encode_photo(image, image_format)
    assert parts_of(plain, image_format) == pixels_alone
    assert plain == encode_photo(draw_photo(), image_format)
    assert parts_of(encode_photo(image, image_format, record={}), image_format) == pixels_alone | xmp


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_animation_is_refused(image_format):
    """An animated PNG or WEBP is no photo."""
    animated = save(draw_photo(), image_format, save_all=True, append_images=[draw_photo().rotate(90)], duration=100)
    with pytest.raises(BadInput, match="animated; only still images are allowed"):
        decode(animated)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_file_cut_off_is_refused(image_format):
    """A file that ends in the middle is refused, wherever it was cut."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = save(noise, image_format)
    for length in range(0, len(whole) - 100, 97):
        with pytest.raises(BadInput, match=r"damaged|cut off"):
            decode(whole[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is no photo, whatever its name says",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        save(draw_photo(), "GIF"),
        save(draw_photo(), "TIFF"),
        save(draw_photo(), "BMP"),
    ],
    ids=["empty", "text", "svg", "gif", "tiff", "bmp"],
)
def test_other_formats_are_refused(data):
    """Only JPEG, PNG and WEBP are decoded, by what the bytes are."""
    with pytest.raises(BadInput, match="not a JPEG, PNG or WEBP image"):
        decode(data)


def test_too_many_pixels_are_refused_before_decoding():
    """The header's size is checked first: the pixels of this file, which are not there, are never asked for."""
    with pytest.raises(BadInput, match="8000 x 7501 = 60008000 pixels; at most 60000000 are allowed"):
        decode(png(7501, 8000, 8, 2, []))


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_decompression_bomb_is_refused(side):
    """Sizes over Pillow's own bounds are refused in the same way, as errors and not as warnings."""
    with pytest.raises(BadInput, match="60000000"):
        decode(png(side, side, 1, 0, []))


def test_a_palette_that_is_not_there_is_damage():
    """What Pillow takes for impossible is the file's fault, and is told without Pillow's words."""
    rows = [bytes(96)] * 80
    with pytest.raises(BadInput, match="makes no sense"):
        decode(png(80, 96, 8, 3, rows))


SAVED = [
    save(draw_photo(), "JPEG", quality=90),
    save(draw_photo().convert("CMYK"), "JPEG", progressive=True),
    save(with_alpha("RGBA"), "PNG"),
    save(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"),
    save(with_alpha("RGBA"), "WEBP"),
]


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_damaged_bytes_give_a_photo_or_bad_input(seed):
    """Whatever a file's bytes have become, decoding gives a picture or says that the input is bad."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(SAVED))
    for _ in range(chance.choice([1, 2, 8])):
        data[chance.randrange(min(len(data), chance.choice([200, 10**6])))] = chance.randrange(256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on damaged metadata
        with contextlib.suppress(BadInput):
            assert decode(bytes(data)).mode == "RGB"


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((4000, 3000), 128 * 128, (144, 112)),
        ((64, 64), 128 * 128, (128, 128)),
        ((2000, 65), 128 * 128, (704, 16)),
        ((2000, 40), 1024 * 1024, (7248, 144)),
    ],
)
def test_photo_is_fitted_to_an_area(size, area, expected):
    """A photo is scaled up or down to about the area, on multiples of 16."""
    assert fit_area(Image.new("RGB", size), area).size == expected


def test_photo_that_is_too_narrow_is_not_fitted():
    """Over 50 to 1 a photo is refused, with what is allowed."""
    with pytest.raises(BadInput, match="at most 50 times"):
        fit_area(Image.new("RGB", (2000, 39)), 128 * 128)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_encoded_output_can_be_decoded(image_format):
    """Every output format gives the picture back, PNG without any loss."""
    decoded = decode(encode_photo(draw_photo(), image_format))
    assert_alike(decoded, draw_photo())
    if image_format == "png":
        assert_same(decoded, draw_photo())


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_quality_changes_the_size(image_format):
    """A higher quality gives a larger file."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert len(encode_photo(noise, image_format, 30)) < len(encode_photo(noise, image_format, 90))


def test_png_has_no_quality():
    """PNG loses nothing, so the quality that an item inherits from the batch changes no byte."""
    assert encode_photo(draw_photo(), "png", 1) == encode_photo(draw_photo(), "png", 100)


@pytest.mark.parametrize(("image_format", "limit"), [("webp", 16383), ("jpeg", 65500)])
def test_side_that_a_format_cannot_hold_is_refused(image_format, limit):
    """A side at the format's limit is encoded; one pixel more is refused and PNG is named as the way out."""
    longest = encode_photo(Image.new("RGB", (limit, 1)), image_format, record={"job_id": "7"})
    assert decode(longest).size == (limit, 1)
    with pytest.raises(BadInput, match=f"at most {limit} pixels a side.*png"):
        encode_photo(Image.new("RGB", (limit + 1, 1)), image_format)
    assert encode_photo(Image.new("RGB", (limit + 1, 1)), "png")


def test_staged_photo_answers_as_the_whole_photo_or_not_at_all():
    """It has the photo's size and the pictures it was staged with; whatever else is asked fails."""
    whole = Image.radial_gradient("L").resize((90, 60)).convert("RGB")
    picture = whole.resize((32, 16), Image.Resampling.LANCZOS)
    photo = StagedPhoto(60, 90, {(16, 32): picture})

    assert (photo.size, photo.height, photo.width, photo.mode) == (whole.size, 60, 90, "RGB")
    assert photo.resize((32, 16), Image.Resampling.LANCZOS).tobytes() == picture.tobytes()
    asked = [((16, 32), Image.Resampling.LANCZOS), ((32, 16), Image.Resampling.BICUBIC), ((32, 16), None)]
    for size, resample in asked:
        with pytest.raises(ValueError, match="only here as LANCZOS makes it at 32 x 16"):
            photo.resize(size, resample)
    for use in (photo.tobytes, photo.copy, lambda: photo.convert("L"), lambda: np.asarray(photo)):
        with pytest.raises(ValueError, match="own pixels are not here"):
            use()
