"""The file of one journal: where it lies, who may write it, and that no half of it is ever read."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from server.client.errors import AlreadyRunning
from server.client.whole_files import put_in_place

_MAX_BYTES = 1_000_000
_UNUSED_SECONDS = 8 * 86_400.0  # longer than any journal can be gone on with


def state_folder() -> Path:
    """Name the folder of the journals, as the XDG base directories have it.

    Raises:
        RuntimeError: nobody knows where the user's home is.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    return (Path(given) if given.startswith("/") else Path.home() / ".local" / "state") / "restage"


class JournalFile:
    """One file of a folder, held by this process until `close`; the kernel lets go of it when the process dies.

    Args:
        folder: made if it is missing; only its owner may look into it.
        name: of the file, without suffix.

    Raises:
        AlreadyRunning: another process holds it.
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / f"{name}.json"
        self._part = folder / f"{name}.part"
        self._lock_path = folder / f"{name}.lock"
        self._lock = _hold(self._lock_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def read(self) -> bytes | None:
        """Return what was written last, at most a megabyte of it; None where there is nothing.

        Raises:
            OSError: it is there but cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Write `data` in place of all that was there; durable on return.

        Raises:
            OSError: it could not be written; what was there stays.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._part, flags, 0o600), "wb") as part:
            part.write(data)
        put_in_place(self._part, self.path)

    def remove(self) -> None:
        """Remove what was written, if anything was."""
        for path in (self.path, self._part):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have it."""
        # While it is held: who waits at the old file sees that it has no name any more, and takes the next.
        with suppress(OSError):
            self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)


def _hold(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(lock, path):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                return lock
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace")
            os.close(lock)
            raise AlreadyRunning(
                f"the same command is running already (process {holder or 'unknown'}); wait for it\n"
                "  to stage the same photos twice at the same time, give this one another --label"
            ) from error
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_unused(folder: Path) -> None:
    """Remove what runs left behind that nobody went on with."""
    unused_since = time.time() - _UNUSED_SECONDS
    for path in (*folder.glob("*.json"), *folder.glob("*.part"), *folder.glob("*.lock")):
        with suppress(OSError):
            if path.stat().st_mtime < unused_since:
                path.unlink()
