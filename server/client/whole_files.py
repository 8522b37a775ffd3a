"""Files that appear whole or not at all, also when the power is cut."""

import os
from contextlib import suppress
from pathlib import Path


def put_in_place(part: Path, file: Path) -> None:
    """Give what was written to `part` its name `file`, over what had that name; both lie in the same folder.

    Raises:
        OSError: it could not be kept; `file` is as it was.
    """
    # Data before name: after a power cut a new name could otherwise stand for an empty file.
    _sync(part)
    part.replace(file)
    # Not every file system can do this for a folder; what is lost then is a file that will be made again.
    with suppress(OSError):
        _sync(file.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
