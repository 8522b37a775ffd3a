"""API keys: who calls and what a key may use, kept as hashes in a file that is read again whenever it changes."""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Unpack

import structlog
from pydantic import ValidationError

from server.errors import DependencyError, InvalidRequest, NotFound, Unauthorized
from server.key_file import (
    MOST_BYTES_PER_DAY,
    MOST_OPEN_JOBS,
    MOST_REQUESTS_PER_MINUTE,
    KeyFile,
    KeyLimits,
    KeyLines,
    KeyRecord,
    Priority,
    Role,
)
from server.webhook_secret import new_webhook_secret


class KeysUnavailable(DependencyError):
    """Raised when the file of API keys exists but cannot be read."""

    code = "keys_unavailable"
    title = "API keys cannot be checked at the moment"


# The digest that an unknown id is compared with, so that it takes as long as a known one.
_NO_DIGEST: Final = hashlib.sha256(b"").digest()


@dataclass(frozen=True)
class Principal:
    """Who is calling, and what the key may use: `KeyLimits` explains the limits.

    Attributes:
        owner: whose batches, jobs and uploads these are.
    """

    owner: str
    role: Role
    key_id: str
    max_priority: Priority = "high"
    requests_per_minute: int | None = None
    max_open_jobs: int | None = None
    max_bytes_per_day: int | None = None

    @property
    def reach(self) -> str:
        """Whose jobs and batches the caller may read and change: an owner's, or "" for everybody's."""
        return "" if self.role == "admin" else self.owner

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to `owner` may be shown to the caller."""
        return self.reach in {"", owner}


# Who calls where `auth.mode` is `none`.
LOCAL_PRINCIPAL: Final = Principal("local", "admin", "none")


@dataclass(frozen=True)
class _FileState:
    """What the file held when it was last read, and how to notice that it has changed since."""

    signature: tuple[int, int, int] | None = None
    lines: KeyLines = field(default_factory=lambda: KeyLines({}, ()))


class KeyStore:
    """The keys in one file; any number of processes may read and change it at the same time.

    A file that does not exist holds no keys. Reading costs one `stat` as long as nothing has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = KeyFile(path)
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
        scheme, _, key = header_value.strip(" \t").partition(" ")
        key_id, secret = _take_apart(key.strip(" \t")) if scheme.lower() == "bearer" else ("", "")
        record = self._records().get(key_id)
        expected = bytes.fromhex(record.sha256) if record is not None else _NO_DIGEST
        if not hmac.compare_digest(_digest(secret), expected) or record is None:
            raise Unauthorized("this key is not valid; the header Authorization holds: Bearer <key>")
        return Principal(
            record.owner,
            record.role,
            record.id,
            record.max_priority,
            requests_per_minute=record.requests_per_minute,
            max_open_jobs=record.max_open_jobs,
            max_bytes_per_day=record.max_bytes_per_day,
        )

    def webhook_secrets(self, key_id: str) -> tuple[str, ...]:
        """Give what the webhooks of a key are signed with, the newest first; none where the key was revoked.

        Raises:
            KeysUnavailable: the file exists but cannot be read.
        """
        record = self._records().get(key_id)
        return () if record is None else record.webhook_secrets

    def add(self, owner: str, role: Role, **limits: Unpack[KeyLimits]) -> str:
        """Make a key, with a secret for its webhooks.

        Args:
            owner: 1 to 64 letters, digits, dots, hyphens, underscores or @; several keys may have the same.
            role: `admin` is for an operator, who may read, cancel, retry and delete everybody's work.
            limits: those that are left out do not limit.

        Returns:
            The key, `rsk_<id>_<secret>`; it cannot be shown again.

        Raises:
            InvalidRequest: the owner's name, the role or a limit is not allowed.
            ConfigError: the file is damaged or cannot be written.
        """
        secret = secrets.token_urlsafe(32)
        with self._file.changing() as records:
            key_id = secrets.token_hex(4)
            while key_id in records:
                key_id = secrets.token_hex(4)
            made = {
                "id": key_id,
                "owner": owner,
                "role": role,
                "created_at": datetime.now(UTC),
                "sha256": _digest(secret).hex(),
                "webhook_secrets": (new_webhook_secret(),),
            }
            records[key_id] = _checked({"max_priority": "high"} | made | limits)
        return f"rsk_{key_id}_{secret}"

    def limit(self, key_id: str, **limits: Unpack[KeyLimits]) -> KeyRecord:
        """Change what a key may use, from servers' next request on; its secrets stay.

        Args:
            key_id: of a key that there is.
            limits: those that are left out stay as they are.

        Returns:
            The key as it is now.

        Raises:
            NotFound: there is no such key.
            InvalidRequest: a limit is not allowed.
            ConfigError: the file is damaged or cannot be written.
        """
        with self._file.changing() as records:
            changed = _checked(_find(records, key_id).model_dump() | limits)
            records[key_id] = changed
        return changed

    def revoke(self, key_id: str) -> None:
        """Take a key away; servers refuse it from their next request on.

        Raises:
            NotFound: there is no such key.
            ConfigError: the file is damaged or cannot be written.
        """
        with self._file.changing() as records:
            _find(records, key_id)
            del records[key_id]

    def rotate_webhook(self, key_id: str) -> str | None:
        """Take a step towards another secret for a key's webhooks.

        Where one secret signs, or none, a new one is added, and both sign; where two do, the older one is dropped.

        Returns:
            The new secret; None where the older one was dropped.

        Raises:
            NotFound: there is no such key.
            ConfigError: the file is damaged or cannot be written.
        """
        with self._file.changing() as records:
            record = _find(records, key_id)
            old = record.webhook_secrets
            new = None if len(old) == 2 else new_webhook_secret()
            kept = old[:1] if new is None else (new, *old)
            records[key_id] = record.model_copy(update={"webhook_secrets": kept})
        return new

    def list(self) -> list[KeyRecord]:
        """List all keys, the oldest first.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        return list(self._file.read_all().values())

    def _records(self) -> dict[str, KeyRecord]:
        """Read the file if it has changed. A damaged line is no key; the others go on working."""
        try:
            status = self.path.stat()
            # A replaced file has another inode, even within the resolution of its time.
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
            if signature != self._state.signature:
                self._state = _FileState(signature, self._file.read_lines())
                for problem in self._state.lines.problems:
                    structlog.get_logger().warning("keys.line_ignored", problem=problem)
        except FileNotFoundError:
            self._state = _FileState()
        except OSError as error:
            raise KeysUnavailable(f"the keys in {self.path} cannot be read: {error.strerror}") from error
        return self._state.lines.records


def _checked(fields: dict[str, object]) -> KeyRecord:
    try:
        return KeyRecord.model_validate(fields)
    except ValidationError as error:
        wrong = ", ".join(str(details["loc"][0]) for details in error.errors())
        raise InvalidRequest(
            f"not allowed: {wrong}; an owner has 1 to 64 letters, digits, dots, hyphens, underscores or @, "
            "a role is user or admin, a priority is low, normal or high; requests_per_minute is a whole number from 1 "
            f"to {MOST_REQUESTS_PER_MINUTE}, max_open_jobs to {MOST_OPEN_JOBS}, max_bytes_per_day to "
            f"{MOST_BYTES_PER_DAY}"
        ) from error


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
