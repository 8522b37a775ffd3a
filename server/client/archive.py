"""The zip of a batch's results on the caller's machine: what it is called, and whether it is whole."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Set as AbstractSet
from pathlib import Path

from server.client.errors import TransferFailed, WrongBytes
from server.client.photos import shorten

_NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|]")


def archive_file(folder: Path, label: str | None, batch_id: str) -> Path:
    """Name the archive of a batch: after its label where that leaves something to be a file's name.

    Args:
        folder: that results are put in.
        label: of the batch, whatever it says.
        batch_id: in place of a label.
    """
    name = _NOT_IN_NAMES.sub("_", label or "").strip(". ")
    return folder / f"{shorten(name) or batch_id}.zip"


def check_archive(file: Path, sha256s: AbstractSet[str]) -> None:
    """Read an archive to its end and see that the results are in it.

    Args:
        file: the archive.
        sha256s: of the results that must be in it.

    Raises:
        TransferFailed: it was cut.
        WrongBytes: it is whole, but lacks results.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = {_digest(archive, entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise TransferFailed(f"the archive did not arrive whole: {error}") from error
    if missing := len(sha256s - found):
        raise WrongBytes(f"the archive lacks {missing} of {len(sha256s)} results")


def is_whole(file: Path, sha256s: AbstractSet[str]) -> bool:
    """Whether an archive is there and has the results."""
    try:
        check_archive(file, sha256s)
    except (TransferFailed, OSError):
        return False
    return True


def _digest(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    with archive.open(entry) as file:  # reading to the end compares the entry's checksum
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
