"""Photos as an attacker would make them: from a seed, small where they can be, and each with the name of its trick."""

import io
import random
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, PngImagePlugin

from pipelines.errors import BadInput
from pipelines.photos import decode_photo
from pipelines.sizes import check_photo_size as check_shape
from server.errors import RequestError
from server.settings import LimitsSettings
from server.submit.look import MORE_BYTES, check_photo_size, read_last_header

LIMITS = LimitsSettings()
ORIENTATION = 0x0112
Fate = Literal["refused", "damaged", "staged"]


@dataclass(frozen=True)
class HostilePhoto:
    """A file, and what becomes of it: refused by its header, found damaged by the decoder, or staged all the same."""

    trick: str
    data: bytes
    fate: Fate


def make_hostile_photos(seed: int, count: int, *, most_damaged: int, most_staged: int) -> list[HostilePhoto]:
    """Make every trick that is known by name, and then mutations until there are `count`.

    Args:
        seed: of the mutations.
        count: how many files in all.
        most_damaged: mutations that pass the header are taken until there are so many in all that the decoder refuses.
        most_staged: likewise of those that are photos all the same, which cost time on the device.
    """
    made = [HostilePhoto(trick, data, fate_of(data)) for trick, data in named_tricks()]
    so_far = Counter(one.fate for one in made)
    most = {"refused": count, "damaged": most_damaged, "staged": most_staged}
    for trick, data in mutations(random.Random(seed)):
        if len(made) >= count:
            return made
        if is_refused(data):
            fate = "refused"
        elif so_far["damaged"] >= most_damaged and so_far["staged"] >= most_staged:
            continue
        else:
            fate = fate_of(data)
        if so_far[fate] < most[fate]:
            so_far[fate] += 1
            made.append(HostilePhoto(trick, data, fate))
    return made


def is_refused(data: bytes) -> bool:
    """Tell whether a file's header is enough to refuse it."""
    try:
        header = read_last_header(data[:MORE_BYTES], len(data))
        check_photo_size(header, LIMITS)
        check_shape(header.height, header.width)
    except (RequestError, BadInput):
        return True
    return False


def fate_of(data: bytes) -> Fate:
    """Tell what becomes of a file."""
    if is_refused(data):
        return "refused"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            photo = decode_photo(data, max_pixels=LIMITS.max_image_pixels)
            check_shape(photo.height, photo.width)
        except BadInput:
            return "damaged"
    return "staged"


def encode(image_format: str, mode: str = "RGB", size: tuple[int, int] = (96, 80), **options: Any) -> bytes:
    """Encode a gradient; `size` is width, height, as Pillow has it."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Write one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, color_type: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """Write a PNG whose header need not be true; `pixels` are compressed already."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    body = b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def black(width: int, height: int, bits_per_pixel: int) -> bytes:
    """Compress black pixels of a PNG, row by row."""
    row = bytes(1 + (width * bits_per_pixel + 7) // 8)
    compressor = zlib.compressobj(1)
    return b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()


def segment(marker: int, data: bytes) -> bytes:
    """Write one segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Put segments behind a JPEG's start."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif(*entries: tuple[int, int, int, int], next_directory: int = 0, directory: int = 8) -> bytes:
    """Write an EXIF block of one directory: (tag, type, count, value) of each entry."""
    written = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    block = b"II*\0" + struct.pack("<I", directory) + struct.pack("<H", len(entries)) + written
    return b"Exif\0\0" + block + struct.pack("<I", next_directory)


def with_frame(jpeg: bytes, height: int, width: int) -> bytes:
    """Have a JPEG's frame header tell another size."""
    place = next(place for marker in (b"\xff\xc0", b"\xff\xc2") if (place := jpeg.find(marker)) >= 0)
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


def named_tricks() -> Iterator[tuple[str, bytes]]:
    """Every trick that has a name."""
    yield from other_formats()
    yield from polyglots()
    yield from bombs()
    yield from lying_headers()
    yield from animations()
    yield from nonsense_in_metadata()
    yield from extremes()


def other_formats() -> Iterator[tuple[str, bytes]]:
    """Files that are no photos we take, under a photo's name."""
    for image_format in ("GIF", "TIFF", "BMP", "PPM", "ICO", "PCX", "TGA", "EPS", "PDF", "JPEG2000", "DDS", "SGI"):
        yield f"{image_format} named .jpg", encode(image_format)
    for brand in (b"heic", b"heix", b"mif1", b"avif", b"avis", b"isom", b"\0\0\0\0"):
        yield f"ftyp {brand!r}", b"\0\0\0\x18ftyp" + brand + bytes(500)
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    entity = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>'
    yield "SVG with entities", entity
    yield "EPS that runs a command", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(%pipe%id) (r) file\n"
    for start in (b"8BPS", b"\x7fELF", b"MZ", b"#!/bin/sh\n", b"PK\x03\x04", b"\x1f\x8b\x08", b"\xff\x0a", b"RIFF"):
        yield f"begins with {start!r}", start + bytes(range(256))
    yield "zeros", bytes(2000)
    yield "ones", b"\xff" * 2000
    for size_bytes in (1, 2, 3, 11):
        yield f"{size_bytes} bytes of a JPEG", encode("JPEG")[:size_bytes]
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBP"):
        yield f"only {start!r}", start
        yield f"{start!r} and zeros", start + bytes(5000)
        yield f"{start!r} and ones", start + b"\xff" * 70_000


def polyglots() -> Iterator[tuple[str, bytes]]:
    """Files that are a photo and something else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/MANIFEST.MF", "Main-Class: Evil\n")
        archive.writestr("../../evil.sh", "#!/bin/sh\n")
    page, php = b"<html><script>alert(1)</script></html>", b"<?php system($_GET['c']); ?>"
    jpeg, pixels = encode("JPEG"), encode("PNG")
    yield "JPEG and HTML behind it", jpeg + page
    yield "JPEG and HTML in a comment", with_segments(jpeg, segment(0xFE, b"*/" + page + b"/*"))
    yield "JPEG and zip", jpeg + buffer.getvalue()
    yield "JPEG and PDF", with_segments(jpeg, segment(0xFE, b"%PDF-1.4\n1 0 obj\n"))
    yield "PNG and PHP in a text", pixels[:33] + chunk(b"tEXt", b"Comment\0" + php) + pixels[33:]
    yield "PNG and HTML behind its end", pixels + page
    yield "GIF and jar", encode("GIF") + buffer.getvalue()
    yield "WEBP and zip", encode("WEBP") + buffer.getvalue()
    yield "HTML and JPEG", page + jpeg
    yield "zip and JPEG", buffer.getvalue() + jpeg


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would become large, or take long."""
    # Too many pixels: these never reach the decoder.
    yield "PNG of 13300 x 13300", png(13_300, 13_300, 1, 0, pixels=black(13_300, 13_300, 1))
    yield "PNG of 2^31 x 2^31", png(2**31 - 1, 2**31 - 1, 16, 6)
    yield "JPEG of 65535 x 65535", with_frame(encode("JPEG"), 65_535, 65_535)
    # As many as are allowed.
    yield "PNG of 7700 x 7700", png(7700, 7700, 1, 0, pixels=black(7700, 7700, 1))
    flood = zlib.compress(bytes(20_000_000), 9)
    yield "zTXt of 20 MB", png(96, 80, 8, 0, chunk(b"zTXt", b"a\0\0" + flood), pixels=black(96, 80, 8))
    yield "iTXt of 20 MB", png(96, 80, 8, 0, chunk(b"iTXt", b"a\0\1\0\0\0" + flood), pixels=black(96, 80, 8))
    yield "iCCP of 20 MB", png(96, 80, 8, 0, chunk(b"iCCP", b"a\0\0" + flood), pixels=black(96, 80, 8))
    yield "IDAT of 20 MB for 96 x 80", png(96, 80, 8, 0, pixels=flood)
    jpeg = encode("JPEG", progressive=True)
    first = jpeg.find(b"\xff\xda")
    yield "JPEG of 3000 scans", jpeg[:-2] + jpeg[first:-2] * 300 + b"\xff\xd9"
    large = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + bytes(65_000)
    yield "1 MB of EXIF", with_segments(encode("JPEG"), *[segment(0xE1, large)] * 17)
    yield "JPEG of 20,000 empty segments", with_segments(encode("JPEG"), *[segment(0xE0, b"")] * 20_000)
    pixels = encode("PNG")
    yield "PNG of 10,000 empty chunks", pixels[:33] + chunk(b"teXt", b"") * 10_000 + pixels[33:]
    yield "PNG of 3000 texts", pixels[:33] + chunk(b"tEXt", b"a\0" + b"b" * 100) * 3000 + pixels[33:]


def lying_headers() -> Iterator[tuple[str, bytes]]:
    """Headers that tell another size than the pixels have."""
    sizes = [(0, 80), (96, 0), (1, 1), (63, 96), (64, 64), (97, 81), (192, 160), (4000, 3000), (65_535, 64)]
    for width, height in sizes:
        yield f"IHDR says {width} x {height}", png(width, height, 8, 0, pixels=black(96, 80, 8))
        if 0 not in (width, height):
            yield f"SOF says {width} x {height}", with_frame(encode("JPEG"), height, width)
            yield f"VP8X says {width} x {height}", with_canvas(extended_webp(), height, width)
    yield "a PNG of 3 bits", png(96, 80, 3, 0, pixels=black(96, 80, 8))
    yield "a PNG of colour type 5", png(96, 80, 8, 5, pixels=black(96, 80, 8))
    yield "a palette that is not there", png(96, 80, 8, 3, pixels=black(96, 80, 8))
    yield "a palette of one colour", png(96, 80, 8, 3, chunk(b"PLTE", b"abc"), pixels=b"x" + black(96, 80, 8))
    pixels = encode("PNG")
    yield "two IHDR", pixels[:33] + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)) + pixels[33:]
    yield "IHDR of 5 bytes", pixels[:8] + chunk(b"IHDR", b"\0\0\0\x60\0") + pixels[33:]
    jpeg = encode("JPEG")
    frame = segment(0xC0, struct.pack(">BHHB", 8, 80, 96, 3) + bytes(9))
    yield "two SOF", with_segments(jpeg, frame)
    yield "SOF without components", with_segments(jpeg, segment(0xC0, struct.pack(">BHHB", 8, 80, 96, 0)))
    yield "arithmetic coding", jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1)
    yield "lossless JPEG", jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1)
    yield "12 bits a channel", jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1)
    yield "no tables", jpeg.replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe")


def extended_webp() -> bytes:
    """Encode a WEBP with a canvas, and EXIF."""
    return encode("WEBP", exif=exif((ORIENTATION, 3, 1, 6)))


def with_canvas(webp: bytes, height: int, width: int) -> bytes:
    """Have a WEBP's canvas tell another size."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp[:24] + sizes + webp[30:]


def animations() -> Iterator[tuple[str, bytes]]:
    """Films."""
    frames = [Image.new("RGB", (96, 80), color) for color in ("red", "green", "blue")]
    for image_format in ("GIF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:])
        yield f"animated {image_format}", buffer.getvalue()
    still = extended_webp()
    yield "WEBP that says it is animated", still[:20] + bytes((still[20] | 2,)) + still[21:]
    for count in (0, 1, 2, 2**32 - 1):
        control = chunk(b"acTL", struct.pack(">II", count, 0))
        yield f"PNG of {count} frames", png(96, 80, 8, 0, control, pixels=black(96, 80, 8))
    yield "acTL of 1 byte", png(96, 80, 8, 0, chunk(b"acTL", b"\0"), pixels=black(96, 80, 8))


def nonsense_in_metadata() -> Iterator[tuple[str, bytes]]:
    """EXIF, ICC and the like that make no sense around good pixels."""
    jpeg = encode("JPEG")
    blocks = {
        "orientation 0": exif((ORIENTATION, 3, 1, 0)),
        "orientation 9": exif((ORIENTATION, 3, 1, 9)),
        "orientation 65535": exif((ORIENTATION, 3, 1, 65_535)),
        "orientation as LONG": exif((ORIENTATION, 4, 1, 6)),
        "orientation as text": exif((ORIENTATION, 2, 4, 0x00363636)),
        "orientation as fraction": exif((ORIENTATION, 5, 1, 8)),
        "orientation 2^31 times": exif((ORIENTATION, 3, 2**31, 6)),
        "a directory that leads to itself": exif((ORIENTATION, 3, 1, 6), next_directory=8),
        "EXIF that leads to itself": exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)),
        "a directory behind the end": exif((ORIENTATION, 3, 1, 6), directory=2**32 - 1),
        "a directory within the header": exif((ORIENTATION, 3, 1, 6), directory=0),
        "an unknown type": exif((ORIENTATION, 99, 1, 6)),
        "ten thousand entries": b"Exif\0\0II*\0\x08\0\0\0\x10\x27" + bytes(40),
        "EXIF of 4 bytes": b"Exif\0\0II*\0",
        "EXIF of no order": b"Exif\0\0XX*\0\x08\0\0\0",
    }
    for trick, block in blocks.items():
        yield f"JPEG, {trick}", with_segments(jpeg, segment(0xE1, block))
        yield f"PNG, {trick}", png(96, 80, 8, 0, chunk(b"eXIf", block[6:]), pixels=black(96, 80, 8))
    profiles = (b"ICC_PROFILE\0\1\1" + b"\xff" * 200, b"ICC_PROFILE\0\7\3abc", b"ICC_PROFILE\0\0\0", b"ICC_PROFILE\0")
    for number, profile in enumerate(profiles):
        yield f"ICC nonsense {number}", with_segments(jpeg, segment(0xE2, profile))
    yield "MPF nonsense", with_segments(jpeg, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(40)))
    yield "Adobe nonsense", with_segments(jpeg, segment(0xEE, b"Adobe\0\x64\xff\xff\xff\xff\xff"))
    yield "JFIF nonsense", jpeg[:2] + segment(0xE0, b"JFIF\0\xff\xff\xff\0\0\0\0\xff\xff") + jpeg[2:]
    yield "Photoshop nonsense", with_segments(jpeg, segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"))
    for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tRNS", b"bKGD", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"fcTL"):
        yield f"{kind.decode()} of 1 byte", png(96, 80, 8, 0, chunk(kind, b"\xff"), pixels=black(96, 80, 8))


def extremes() -> Iterator[tuple[str, bytes]]:
    """Rare kinds of photos, and sides at the ends of what there is."""
    for size in ((1, 1), (1, 500), (500, 1), (63, 64), (64, 63), (65_500, 64), (16_383, 64)):
        for image_format in ("JPEG", "PNG"):
            yield f"{image_format} of {size[0]} x {size[1]}", encode(image_format, size=size)
    yield "CMYK", encode("JPEG", "CMYK")
    yield "16 bit", encode("PNG", "I;16")
    yield "black and white", encode("PNG", "1")
    yield "grey with alpha", encode("PNG", "LA")
    yield "transparent palette", encode("PNG", "P", transparency=bytes(range(256)))
    yield "transparent colour", encode("PNG", "RGB", transparency=(1, 2, 3))
    yield "quality 0", encode("JPEG", quality=0)


def mutations(random_: random.Random) -> Iterator[tuple[str, bytes]]:
    """Change good photos, for ever."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a" * 50)
    good = [
        encode("JPEG"),
        encode("JPEG", progressive=True),
        encode("JPEG", "CMYK"),
        with_segments(encode("JPEG", "L"), segment(0xE1, exif((ORIENTATION, 3, 1, 6)))),
        encode("PNG", pnginfo=text),
        encode("PNG", "P", transparency=3),
        encode("PNG", "I;16"),
        encode("WEBP"),
        encode("WEBP", lossless=True),
        encode("WEBP", "RGBA"),
    ]
    tricks: list[tuple[str, Callable[[random.Random, bytes], bytes]]] = [
        ("flipped bits", flip_bits),
        ("flipped bits of the header", lambda random_, data: flip_bits(random_, data[:30]) + data[30:]),
        ("cut off", lambda random_, data: data[: random_.randrange(1, len(data))]),
        ("cut in the middle", cut_out),
        ("a piece twice", repeat_piece),
        ("wrong length", change_length),
        ("overwritten", overwrite),
        ("noise in between", insert_noise),
    ]
    while True:
        data = random_.choice(good)
        if random_.random() < 0.1:
            other = random_.choice(good)
            yield "spliced", data[: random_.randrange(8, len(data))] + other[random_.randrange(len(other)) :]
            continue
        trick, change = random_.choice(tricks)
        yield trick, change(random_, data)


def flip_bits(random_: random.Random, data: bytes) -> bytes:
    """Change some bits."""
    changed = bytearray(data)
    for _ in range(random_.choice((1, 2, 5, 20))):
        changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def cut_out(random_: random.Random, data: bytes) -> bytes:
    """Take a piece away."""
    start = random_.randrange(len(data))
    return data[:start] + data[start + random_.randrange(1, 60) :] or b"\0"


def repeat_piece(random_: random.Random, data: bytes) -> bytes:
    """Put a piece in once more, somewhere."""
    start, place = random_.randrange(len(data)), random_.randrange(len(data))
    return data[:place] + data[start : start + random_.randrange(1, 200)] + data[place:]


def change_length(random_: random.Random, data: bytes) -> bytes:
    """Have four bytes in the first hundred, where lengths and sizes stand, say something absurd."""
    place = random_.randrange(4, min(100, len(data)))
    absurd = random_.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, random_.randrange(2**32)))
    return data[:place] + struct.pack(random_.choice(("<I", ">I")), absurd) + data[place + 4 :]


def overwrite(random_: random.Random, data: bytes) -> bytes:
    """Fill a piece with one byte."""
    start, length = random_.randrange(len(data)), random_.randrange(1, 100)
    return data[:start] + bytes((random_.choice((0, 0xFF, 0x41)),)) * length + data[start + length :]


def insert_noise(random_: random.Random, data: bytes) -> bytes:
    """Put random bytes in, somewhere."""
    place = random_.randrange(len(data))
    return data[:place] + random_.randbytes(random_.randrange(1, 50)) + data[place:]
