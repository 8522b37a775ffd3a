"""The file of API keys: one line for each, changed as a whole, by any number of processes at the same time."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.errors import ConfigError
from server.webhook_secret import check_webhook_secret

Role = Literal["user", "admin"]
Priority = Literal["low", "normal", "high"]
MOST_REQUESTS_PER_MINUTE: Final = 10**6
MOST_OPEN_JOBS: Final = 10**9
# A double, which is what buckets are counted in, still holds whole bytes there, and fractions of them.
MOST_BYTES_PER_DAY: Final = 10**15


class KeyLimits(TypedDict, total=False):
    """What a key may use at most; None is no limit.

    Attributes:
        max_priority: the highest priority that its jobs may have.
        requests_per_minute: calls under `/v1`; as many may come at once.
        max_open_jobs: jobs of its owner that are queued or running, when it adds more.
        max_bytes_per_day: of photos that it announces or sends; as many may come at once.
    """

    max_priority: Priority
    requests_per_minute: int | None
    max_open_jobs: int | None
    max_bytes_per_day: int | None


class KeyRecord(BaseModel):
    """One line of the file; the key's own secret is nowhere kept. `KeyLimits` explains the limits.

    Attributes:
        webhook_secrets: what the webhooks of this key are signed with, the newest first; two while it is rotated. They
            are kept as they are, since signing needs them. None in a line of before there were webhooks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    owner: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    role: Role
    max_priority: Priority
    requests_per_minute: int | None = Field(default=None, ge=1, le=MOST_REQUESTS_PER_MINUTE)
    max_open_jobs: int | None = Field(default=None, ge=1, le=MOST_OPEN_JOBS)
    max_bytes_per_day: int | None = Field(default=None, ge=1, le=MOST_BYTES_PER_DAY)
    created_at: datetime
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    webhook_secrets: tuple[Annotated[str, AfterValidator(check_webhook_secret)], ...] = Field(
        default=(), max_length=2, repr=False
    )


@dataclass(frozen=True)
class KeyLines:
    """What the file held: the keys by their ids, and what is wrong with the other lines."""

    records: dict[str, KeyRecord]
    problems: tuple[str, ...]


class KeyFile:
    """One file of keys; one that does not exist holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_lines(self) -> KeyLines:
        """Read the file. A damaged line is no key, and none of the others' business.

        Raises:
            OSError: it cannot be read, or does not exist.
        """
        records: dict[str, KeyRecord] = {}
        problems: list[str] = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = KeyRecord.model_validate_json(line)
            except ValidationError:
                problems.append(f"{self.path}:{number}: is no key as `restage keys add` writes it")
                continue
            if record.id in records:
                problems.append(f"{self.path}:{number}: the id {record.id} is given twice")
            records.setdefault(record.id, record)
        return KeyLines(records, tuple(problems))

    def read_all(self) -> dict[str, KeyRecord]:
        """Read the file to change or to show it: then a damaged line must not be lost in silence.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        try:
            lines = self.read_lines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError([f"{self.path}: cannot be read: {error.strerror}"]) from error
        if lines.problems:
            raise ConfigError([*lines.problems])
        return lines.records

    @contextmanager
    def changing(self) -> Generator[dict[str, KeyRecord]]:
        """Give the keys to be changed, and write them at the end; nothing is written where an error is raised.

        Raises:
            ConfigError: the file is damaged, or cannot be read or written.
        """
        with self._locked():
            records = self.read_all()
            yield records
            self._write(records)

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Keep other processes from changing the file between our reading and our writing."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.path.with_name(f"{self.path.name}.lock").open("a")
        except OSError as error:
            raise ConfigError([f"{self.path}: cannot be written: {error.strerror}"]) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, records: dict[str, KeyRecord]) -> None:
        """Replace the file as a whole: a reader, and a crash, find the old keys or the new ones."""
        target = Path(os.path.realpath(self.path))
        # What is not limited is not written: servers that know no such limits yet can read such a line.
        text = "".join(f"{record.model_dump_json(exclude_none=True)}\n" for record in records.values())
        try:
            # Created for its owner alone (0600).
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    _take_over_rights(target, descriptor)
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError([f"{self.path}: cannot be written: {error.strerror}"]) from error


def _take_over_rights(target: Path, descriptor: int) -> None:
    """Give a new file the owner and the mode of the one that it replaces, so that a running API can go on reading."""
    try:
        before = target.stat()
    except FileNotFoundError:
        return
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
