"""What the server knows of one request, as it is written to a journal and read from one that anything may stand in."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

# Without pydantic, whose import alone takes longer than all else that the command line loads.
_VERSION = 1
_ID = re.compile(r"[\w-]{1,128}", re.ASCII)  # ids become parts of URLs
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RecordDamaged(Exception):
    """Raised when a record cannot be read: it was cut, changed, or written by another version."""


@dataclass(frozen=True)
class ArrivedPhoto:
    """A photo that lies in the store."""

    upload_id: str
    sha256: str


@dataclass
class Record:
    """What the server knows of the request, in the order in which it learns it. Holds no secrets and no URLs.

    `request` is the fingerprint. `submitted` are the photos of the batch in their order: once they are settled, so is
    the body of the submission, since an idempotency key belongs to one body. `superseded_batch_id` gives way to the
    batch that is being made.
    """

    request: str = ""
    created_at: float = field(default_factory=time.time)
    idempotency_key: str = field(default_factory=lambda: secrets.token_hex(16))
    superseded_batch_id: str | None = None
    arrived: dict[int, ArrivedPhoto] = field(default_factory=dict[int, ArrivedPhoto])
    submitted: list[int] | None = None
    refused: dict[int, str] = field(default_factory=dict[int, str])
    batch_id: str | None = None

    def to_bytes(self) -> bytes:
        """Write it down."""
        return json.dumps({"version": _VERSION} | asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record":
        """Read what `to_bytes` wrote.

        Raises:
            RecordDamaged: it is something else.
        """
        try:
            found: Any = json.loads(data)
            if found.pop("version") != _VERSION:
                raise RecordDamaged("another version")
            return cls._read(**found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise RecordDamaged(str(error)) from error

    @classmethod
    def _read(
        cls,
        *,
        request: object,
        created_at: object,
        idempotency_key: object,
        superseded_batch_id: object,
        arrived: Mapping[str, Mapping[str, object]],
        submitted: object,
        refused: Mapping[str, object],
        batch_id: object,
    ) -> "Record":
        record = cls(
            request=_text(request),
            created_at=float(_number(created_at)),
            idempotency_key=_text(idempotency_key, _ID),
            superseded_batch_id=None if superseded_batch_id is None else _text(superseded_batch_id, _ID),
            arrived={
                int(index): ArrivedPhoto(_text(photo["upload_id"], _ID), _text(photo["sha256"], _SHA256))
                for index, photo in arrived.items()
            },
            submitted=None if submitted is None else [_index(index) for index in cast("list[object]", submitted)],
            refused={int(index): _text(reason) for index, reason in refused.items()},
            batch_id=None if batch_id is None else _text(batch_id, _ID),
        )
        if not record.arrived.keys() >= set(record.submitted or ()):
            raise RecordDamaged("photos were submitted that did not arrive")
        return record


def _text(value: object, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or not (pattern is None or pattern.fullmatch(value)):
        raise RecordDamaged(f"{value!r:.100} is no text of its place")
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)):
        raise RecordDamaged(f"{value!r:.100} is no number")
    return value


def _index(value: object) -> int:
    if not isinstance(value, int):
        raise RecordDamaged(f"{value!r:.100} is no index")
    return value
