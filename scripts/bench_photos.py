"""Makes photos for benchmarks, no two alike: JPEGs of noise by size in bytes, or a camera's by size in pixels."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

_QUALITY = 85
# What noise takes at this quality; each set of photos begins with a picture that tells it exactly.
_GUESSED_BYTES_PER_PIXEL = 0.77
CONTENT_TYPE = "image/jpeg"


@dataclass(frozen=True)
class Photo:
    """A JPEG on disk."""

    path: Path
    size_bytes: int
    sha256: str


def make_photos(folder: Path, count: int, size_bytes: int, *, seed: int) -> list[Photo]:
    """Make `count` photos of about `size_bytes` each.

    Args:
        folder: that they are written to; made if missing.
        count: how many.
        size_bytes: of each file, met within about 1 %.
        seed: the same seed makes the same photos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trial = _encode_noise(size_bytes / _GUESSED_BYTES_PER_PIXEL, (seed, size_bytes))
    num_pixels = size_bytes / _GUESSED_BYTES_PER_PIXEL * size_bytes / len(trial)
    with ThreadPoolExecutor(max_workers=2) as threads:
        return list(threads.map(partial(_make_photo, folder, num_pixels, (seed, size_bytes)), range(count)))


def _make_photo(folder: Path, num_pixels: float, seeds: Sequence[int], index: int) -> Photo:
    path = folder / f"photo-{index + 1:02d}.jpg"
    data = _encode_noise(num_pixels, (*seeds, index + 1))
    path.write_bytes(data)
    return Photo(path, len(data), hashlib.sha256(data).hexdigest())


def _encode_noise(num_pixels: float, seeds: Sequence[int]) -> bytes:
    width = round((num_pixels * 4 / 3) ** 0.5)
    height = round(num_pixels / width)
    noise = np.random.default_rng(seeds).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def make_camera_photos(folder: Path, megapixels: Sequence[float], *, seed: int) -> list[Photo]:
    """Make JPEGs that take as long to read and to scale as those of a camera: soft shapes under a little grain.

    Args:
        folder: that they are written to; made if missing.
        megapixels: of each photo.
        seed: the same seed makes the same photos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_make_camera_photo(folder, size, (seed, index)) for index, size in enumerate(megapixels)]


def _make_camera_photo(folder: Path, megapixels: float, seeds: Sequence[int]) -> Photo:
    draw = np.random.default_rng(seeds)
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(megapixels * 1e6 / width)
    shapes = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    grain = draw.integers(-6, 7, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    path = folder / f"camera-{seeds[-1] + 1:02d}.jpg"
    path.write_bytes(buffer.getvalue())
    return Photo(path, len(buffer.getvalue()), hashlib.sha256(buffer.getvalue()).hexdigest())
