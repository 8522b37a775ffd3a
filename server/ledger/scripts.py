"""Loads the Lua scripts: one file each, behind what they share, with flags for what works when memory is full."""

from functools import cache
from importlib.resources import files
from typing import Any

import redis
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, RedisError

from server.errors import ConfigError, LedgerFull, LedgerUnavailable
from server.queue import DRAMATIQ_NAMESPACE

# Counted up when processes of the version before could not work on the same ledger any more. Whoever changes what the
# ledger holds keeps one of before in tests/integration/ledger/fixtures.
SCHEMA_VERSION = "2"

# A full Redis must refuse new work and still let the accepted work drain.
_FLAGS = {
    "submit": "",
    "announce_uploads": "",
    "read_batch": "flags=no-writes",
    "read_jobs": "flags=no-writes",
    "list_batches": "flags=no-writes",
    "list_jobs": "flags=no-writes",
    "read_events": "flags=no-writes",
    "backlog": "flags=no-writes",
}
# What several scripts share beyond the prelude.
_PARTS = {
    "read_batch": ("reading",),
    "read_jobs": ("reading",),
    "list_batches": ("reading",),
    "list_jobs": ("reading",),
    "take_webhooks": ("reading",),
    "expire": ("expiry",),
    "delete_batch": ("expiry",),
    "finish_marked": ("expiry",),
}
_DRAINING = "flags=allow-oom"


@cache
def script_text(name: str) -> str:
    """Return the text of script `name` as Redis gets it."""
    folder = files("server.ledger") / "lua"
    flags = _FLAGS.get(name, _DRAINING)
    parts = ((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", *_PARTS.get(name, ()), name))
    return f"#!lua {flags}\n" + "\n".join(parts)


def check_schema(found: str | None, key_prefix: str) -> None:
    """Refuse a ledger that another version wrote.

    Args:
        found: what the ledger says of itself; None where there is none yet.
        key_prefix: of the ledger.

    Raises:
        ConfigError: it is of another schema version.
    """
    if found is None or found == SCHEMA_VERSION:
        return
    is_newer = found.isdecimal() and int(found) > int(SCHEMA_VERSION)
    advice = (
        "a later version of Restage wrote it: start that version again, or give another redis.key_prefix"
        if is_newer
        else "let the version that wrote it finish its jobs, or give another redis.key_prefix"
    )
    raise ConfigError(
        [f"redis: the ledger under '{key_prefix}' has schema {found}; this version reads {SCHEMA_VERSION}: {advice}"]
    )


def script_keys(key_prefix: str) -> list[str]:
    """Return the KEYS that every script takes: the ledger's prefix and Dramatiq's namespace."""
    return [key_prefix, DRAMATIQ_NAMESPACE]


def _reason(error: RedisError) -> str:
    """Return what Redis said, without the command that redis-py puts before it in a pipeline: that is a user's data."""
    reason = str(error).rpartition("of pipeline caused error: ")[2]
    return reason.removeprefix("(").strip("'\",)")


def unavailable(error: RedisError) -> LedgerUnavailable | None:
    """Return what to raise for `error` when it means that Redis cannot serve now, None when it is a mistake of ours."""
    transient = (redis.ConnectionError, redis.TimeoutError, BusyLoadingError, ReadOnlyError)
    words = ("MISCONF", "LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "BUSY ")
    reason = _reason(error)
    if isinstance(error, OutOfMemoryError) or reason.startswith("OOM"):
        return LedgerFull(f"Redis does not serve: {reason}")
    if isinstance(error, transient) or reason.startswith(words):
        return LedgerUnavailable(f"Redis does not serve: {reason}")
    return None


def as_map(flat: list[Any]) -> dict[str, str]:
    """Turn the flat reply of HGETALL inside a script into a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
