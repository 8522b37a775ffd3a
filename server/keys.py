"""API keys: who calls, kept as hashes in a file that is read again whenever it changes."""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.errors import ConfigError, DependencyError, InvalidRequest, NotFound, Unauthorized
from server.webhook_secret import check_webhook_secret, new_webhook_secret

Role = Literal["user", "admin"]
Priority = Literal["low", "normal", "high"]


class KeysUnavailable(DependencyError):
    """Raised when the file of API keys exists but cannot be read."""

    code = "keys_unavailable"
    title = "API keys cannot be checked at the moment"


# The digest that an unknown id is compared with, so that it takes as long as a known one.
_NO_DIGEST: Final = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Principal:
    """Who is calling.

    Attributes:
        owner: whose batches, jobs and uploads these are.
        max_priority: the highest priority that the caller may ask for.
    """

    owner: str
    role: Role
    key_id: str
    max_priority: Priority = "high"

    @property
    def reach(self) -> str:
        """Whose jobs and batches the caller may read and change: an owner's, or "" for everybody's."""
        return "" if self.role == "admin" else self.owner

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to `owner` may be shown to the caller."""
        return self.reach in {"", owner}


# Who calls where `auth.mode` is `none`.
LOCAL_PRINCIPAL: Final = Principal("local", "admin", "none")


class KeyRecord(BaseModel):
    """One line of the file; the key's own secret is nowhere kept.

    Attributes:
        webhook_secrets: what the webhooks of this key are signed with, the newest first; two while it is rotated. They
            are kept as they are, since signing needs them. None in a line of before there were webhooks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    owner: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    role: Role
    max_priority: Priority
    created_at: datetime
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    webhook_secrets: tuple[Annotated[str, AfterValidator(check_webhook_secret)], ...] = Field(
        default=(), max_length=2, repr=False
    )


@dataclass(frozen=True)
class _FileState:
    """What the file held when it was last read, and how to notice that it has changed since."""

    signature: tuple[int, int, int] | None = None
    records: dict[str, KeyRecord] = field(default_factory=dict[str, KeyRecord])
    problems: tuple[str, ...] = ()


class KeyStore:
    """The keys in one file; any number of processes may read and change it at the same time.

    A file that does not exist holds no keys. Reading costs one `stat` as long as nothing has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _FileState()

    def authenticate(self, header_value: str | None) -> Principal:
        """Find out who sent an `Authorization` header.

        Args:
            header_value: `Bearer rsk_…`; None where there was no header.

        Raises:
            Unauthorized: there is no key, or it is malformed, unknown or revoked; the text does not tell which.
            KeysUnavailable: the file exists but cannot be read.
        """
        if header_value is None:
            raise Unauthorized("the header Authorization is missing; it holds: Bearer <key>")
        scheme, _, key = header_value.strip().partition(" ")
        key_id, secret = _take_apart(key.strip()) if scheme.lower() == "bearer" else ("", "")
        record = self._read().records.get(key_id)
        expected = bytes.fromhex(record.sha256) if record is not None else _NO_DIGEST
        if not hmac.compare_digest(_digest(secret), expected) or record is None:
            raise Unauthorized("this key is not valid; the header Authorization holds: Bearer <key>")
        return Principal(record.owner, record.role, record.id, record.max_priority)

    def webhook_secrets(self, key_id: str) -> tuple[str, ...]:
        """Give what the webhooks of a key are signed with, the newest first; none where the key was revoked.

        Raises:
            KeysUnavailable: the file exists but cannot be read.
        """
        record = self._read().records.get(key_id)
        return () if record is None else record.webhook_secrets

    def add(self, owner: str, role: Role, *, max_priority: Priority = "high") -> str:
        """Make a key, with a secret for its webhooks.

        Args:
            owner: 1 to 64 letters, digits, dots, hyphens, underscores or @; several keys may have the same.
            role: `admin` is for an operator, who may read, cancel, retry and delete everybody's work.
            max_priority: the highest priority that jobs of this key may have.

        Returns:
            The key, `rsk_<id>_<secret>`; it cannot be shown again.

        Raises:
            InvalidRequest: the owner's name, the role or the priority is not allowed.
            ConfigError: the file is damaged or cannot be written.
        """
        secret = secrets.token_urlsafe(32)
        with self._locked():
            records = self._read_all()
            key_id = secrets.token_hex(4)
            while key_id in records:
                key_id = secrets.token_hex(4)
            try:
                record = KeyRecord(
                    id=key_id,
                    owner=owner,
                    role=role,
                    max_priority=max_priority,
                    created_at=datetime.now(UTC),
                    sha256=_digest(secret).hex(),
                    webhook_secrets=(new_webhook_secret(),),
                )
            except ValidationError as error:
                wrong = ", ".join(str(details["loc"][0]) for details in error.errors())
                raise InvalidRequest(
                    f"not allowed: {wrong}; an owner has 1 to 64 letters, digits, dots, hyphens, underscores or @, "
                    "a role is user or admin, a priority is low, normal or high"
                ) from error
            self._write({**records, key_id: record})
        return f"rsk_{key_id}_{secret}"

    def revoke(self, key_id: str) -> None:
        """Take a key away; servers refuse it from their next request on.

        Raises:
            NotFound: there is no such key.
            ConfigError: the file is damaged or cannot be written.
        """
        with self._locked():
            records = self._read_all()
            _find(records, key_id)
            self._write({known: record for known, record in records.items() if known != key_id})

    def rotate_webhook(self, key_id: str) -> str | None:
        """Take a step towards another secret for a key's webhooks.

        Where one secret signs, or none, a new one is added, and both sign; where two do, the older one is dropped.

        Returns:
            The new secret; None where the older one was dropped.

        Raises:
            NotFound: there is no such key.
            ConfigError: the file is damaged or cannot be written.
        """
        with self._locked():
            records = self._read_all()
            record = _find(records, key_id)
            old = record.webhook_secrets
            new = None if len(old) == 2 else new_webhook_secret()
            kept = old[:1] if new is None else (new, *old)
            self._write({**records, key_id: record.model_copy(update={"webhook_secrets": kept})})
        return new

    def list(self) -> list[KeyRecord]:
        """List all keys, the oldest first.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        return list(self._read_all().values())

    def _read(self) -> _FileState:
        """Read the file if it has changed. A damaged line is no key; the others go on working."""
        try:
            status = self.path.stat()
            # A replaced file has another inode, even within the resolution of its time.
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
            if signature != self._state.signature:
                self._state = _parse(self.path, signature)
                for problem in self._state.problems:
                    structlog.get_logger().warning("keys.line_ignored", problem=problem)
        except FileNotFoundError:
            self._state = _FileState()
        except OSError as error:
            raise KeysUnavailable(f"the keys in {self.path} cannot be read: {error.strerror}") from error
        return self._state

    def _read_all(self) -> dict[str, KeyRecord]:
        """Read the file to change or to show it: then a damaged line must not be lost in silence."""
        try:
            state = _parse(self.path, None)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError([f"{self.path}: cannot be read: {error.strerror}"]) from error
        if state.problems:
            raise ConfigError([*state.problems])
        return state.records

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
        text = "".join(f"{record.model_dump_json()}\n" for record in records.values())
        try:
            # Created for its owner alone (0600).
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError([f"{self.path}: cannot be written: {error.strerror}"]) from error


def _parse(path: Path, signature: tuple[int, int, int] | None) -> _FileState:
    records: dict[str, KeyRecord] = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = KeyRecord.model_validate_json(line)
        except ValidationError:
            problems.append(f"{path}:{number}: is no key as `restage keys add` writes it")
            continue
        if record.id in records:
            problems.append(f"{path}:{number}: the id {record.id} is given twice")
        records.setdefault(record.id, record)
    return _FileState(signature, records, tuple(problems))


def _find(records: dict[str, KeyRecord], key_id: str) -> KeyRecord:
    if key_id not in records:
        raise NotFound(f"there is no key {key_id!r}; there are {', '.join(records) or 'none'}")
    return records[key_id]


def _take_apart(key: str) -> tuple[str, str]:
    """Split `rsk_<id>_<secret>`; two empty texts, which no key has, where it is something else."""
    match = re.fullmatch(r"rsk_([0-9a-f]{8})_([A-Za-z0-9_-]{43})", key)
    return (match[1], match[2]) if match else ("", "")


def _digest(secret: str) -> bytes:
    # A secret of 256 random bits cannot be guessed from its hash: no slow hash is needed, as for passwords.
    return hashlib.sha256(secret.encode("ascii")).digest()
