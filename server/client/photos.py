"""Photos and results as files on the caller's machine: what can be sent, and where results are put."""

import hashlib
import mimetypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.client.errors import BadPhotos

MAX_PHOTOS = 50
_MAX_NAME_BYTES = 200
_CONTENT_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
_SUFFIXES = {"image/webp": ".webp", "image/png": ".png", "image/jpeg": ".jpg"}


@dataclass(frozen=True)
class Photo:
    """A photo as it is announced to the server; `sha256` lets the store refuse bytes that were changed on the way."""

    path: Path
    content_type: str
    size_bytes: int
    sha256: str

    @property
    def announcement(self) -> dict[str, str | int]:
        """What `POST /v1/uploads` wants to know of it."""
        return {
            "filename": plain(self.path.name),
            "content_type": self.content_type,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
        }


def read_photo(path: Path) -> Photo:
    """Look at a photo: type by its first bytes, size and digest. The server looks closer.

    Raises:
        BadPhotos: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content_type = _guess_content_type(path, file.read(12))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            return Photo(path, content_type, file.tell(), digest.hexdigest())
    except OSError as error:
        raise BadPhotos([f"{path}: cannot be read ({error.strerror})"]) from error


def size_of(photo: Path) -> int:
    """Return the size of a photo in bytes.

    Raises:
        BadPhotos: it has gone.
    """
    try:
        return photo.stat().st_size
    except OSError as error:
        raise BadPhotos([f"{photo}: cannot be read ({error.strerror})"]) from error


def _guess_content_type(path: Path, start: bytes) -> str:
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "image/webp"
    for magic, content_type in _CONTENT_TYPES.items():
        if start.startswith(magic):
            return content_type
    # No photo that the server takes: its answer says so better than we could.
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"


def check_photos(paths: Sequence[Path]) -> None:
    """Refuse what cannot be sent, before anything is sent.

    Raises:
        BadPhotos: too many files, or some that are missing, folders, empty or not readable.
    """
    problems = [problem for path in paths if (problem := _find_problem(path))]
    if len(paths) > MAX_PHOTOS:
        problems.append(f"{len(paths)} photos are too many for one batch: at most {MAX_PHOTOS}; submit them in parts")
    if problems:
        raise BadPhotos(problems)


def _find_problem(path: Path) -> str | None:
    if path.is_dir():
        return f"{path}: is a folder; name the photos in it, such as {path}/*.jpg"
    if not path.exists():
        return f"{path}: there is no such file"
    if not os.access(path, os.R_OK):
        return f"{path}: may not be read by you"
    if path.stat().st_size == 0:
        return f"{path}: is empty"
    return None


def prepare_folder(folder: Path) -> None:
    """Make the folder of the results and see that files can be made in it.

    Raises:
        BadPhotos: they cannot; better known now than when the results are there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # has no name that could be left behind
    except OSError as error:
        raise BadPhotos(
            [f"{folder}: results cannot be written there ({error.strerror}); choose another with --out"]
        ) from error


def result_file(folder: Path, position: int, photo: Path, output: Mapping[str, str]) -> Path:
    """Name the file of a result; the number keeps photos of the same name apart.

    Args:
        folder: that results are put in.
        position: of the photo among those that were given, from 0.
        photo: that was given.
        output: the job's output in the server's answer.
    """
    suffix = _SUFFIXES.get(output["content_type"], ".bin")
    return folder / f"{position + 1:03d}-{shorten(photo.stem)}{suffix}"


def is_there(file: Path, sha256: str) -> bool:
    """Whether a result was fetched before."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == sha256
    except OSError:
        return False


def plain(name: str | Path) -> str:
    """Write a file's name for others: bytes that are no text can be neither sent nor shown as text."""
    return str(name).encode(errors="surrogateescape").decode(errors="replace")


def shorten(name: str) -> str:
    """Cut a name so that number, suffix and what marks an unfinished file fit beside it in the 255 bytes of a name."""
    return name.encode(errors="surrogateescape")[:_MAX_NAME_BYTES].decode(errors="ignore")
