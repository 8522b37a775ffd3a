"""Looks how Redis is set before a process serves with it: one that could lose accepted jobs is refused."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, cast

import redis
import structlog
from redis.exceptions import ResponseError

from server.errors import ConfigError, LedgerUnavailable
from server.ledger.scripts import check_schema, unavailable
from server.ledger.worker_side import connect, ledger_errors
from server.settings import RedisSettings

_NAMES = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory", "maxmemory-policy")
_YES_NO = {0: "no", 1: "yes"}

_log = structlog.stdlib.get_logger()


@dataclass(frozen=True)
class RedisConfig:
    """What a Redis says of itself; None: it does not say.

    Attributes:
        appendonly: whether it writes changes into a file.
        appendfsync: when these are on the disk: always, everysec or no.
        pauses_fsync: whether that waits while the file is written anew.
        maxmemory_bytes: where it stops to take more; 0: nowhere.
        maxmemory_policy: what it does then.
    """

    appendonly: bool | None = None
    appendfsync: str | None = None
    pauses_fsync: bool | None = None
    maxmemory_bytes: int | None = None
    maxmemory_policy: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a Redis, each with what to set: what could lose jobs, and what an operator should know."""

    problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])


def judge(config: RedisConfig) -> Judgement:
    """Say what a Redis that is set so may do to accepted jobs."""
    found = Judgement()
    if config.appendonly is False:
        found.problems.append("appendonly is no: a restart loses every accepted job; set appendonly yes")
    elif config.appendfsync == "no":
        found.problems.append(
            "appendfsync is no: a power cut loses what was accepted in the last half minute; set appendfsync always"
        )
    elif config.appendfsync == "everysec":
        found.warnings.append(
            "appendfsync is everysec: a power cut or a crash of the machine loses what was accepted in the last two "
            "seconds; set appendfsync always to lose nothing"
        )
    if config.appendonly is not False and config.pauses_fsync:
        found.warnings.append(
            "no-appendfsync-on-rewrite is yes: while the file is written anew, a power cut loses what was accepted in "
            "the last half minute; set no-appendfsync-on-rewrite no"
        )
    if config.maxmemory_bytes == 0:
        found.problems.append(
            "maxmemory is not set: a machine without memory kills Redis, where it should refuse new jobs; set "
            "maxmemory, to three quarters of what Redis may have"
        )
    if config.maxmemory_policy not in {None, "noeviction"}:
        found.problems.append(
            f"maxmemory-policy is {config.maxmemory_policy}: it drops accepted jobs when memory is full; set "
            "maxmemory-policy noeviction"
        )
    if unknown := [name for name, value in _told(config).items() if value is None]:
        found.warnings.append(
            f"it does not tell {', '.join(unknown)}, since CONFIG GET is not allowed: it needs appendonly yes, "
            "appendfsync always, maxmemory and maxmemory-policy noeviction to lose no job"
        )
    return found


def _told(config: RedisConfig) -> dict[str, object]:
    return {
        "appendonly": config.appendonly,
        "appendfsync": config.appendfsync,
        "maxmemory": config.maxmemory_bytes,
        "maxmemory-policy": config.maxmemory_policy,
    }


def read_config(client: redis.Redis) -> RedisConfig:
    """Ask a Redis how it is set; where CONFIG is denied or has another name, INFO tells most of it.

    Args:
        client: that decodes what it is answered.

    Raises:
        LedgerUnavailable: it cannot be reached.
    """
    asked = cast("Any", client)  # redis types no **kwargs
    with ledger_errors():
        config = _ask(lambda: asked.config_get(*_NAMES))
        info = _ask(lambda: asked.info("memory", "persistence"))
    appendonly = config.get("appendonly", _YES_NO.get(info.get("aof_enabled", -1)))
    pauses_fsync = config.get("no-appendfsync-on-rewrite")
    maxmemory = config.get("maxmemory", info.get("maxmemory"))
    return RedisConfig(
        appendonly=None if appendonly is None else appendonly == "yes",
        appendfsync=config.get("appendfsync"),
        pauses_fsync=None if pauses_fsync is None else pauses_fsync == "yes",
        maxmemory_bytes=None if maxmemory is None else int(maxmemory),
        maxmemory_policy=config.get("maxmemory-policy", info.get("maxmemory_policy")),
    )


def _ask(question: Callable[[], Any]) -> dict[str, Any]:
    """Return what Redis answers, or nothing where it does not know the command or does not allow it."""
    try:
        return question()
    except ResponseError as error:
        if unavailable(error):
            raise
        return {}


def check_redis(settings: RedisSettings) -> None:
    """Refuse a Redis that could lose accepted jobs, and log what else should be known of it.

    With `redis.allow_data_loss` it is only warned of.

    Raises:
        ConfigError: each line says what is set, what may come of it, and what to set.
        LedgerUnavailable: it cannot be reached.
    """
    with closing(connect(settings)) as client:
        found = judge(read_config(client))
    if found.problems and not settings.allow_data_loss:
        problems = [f"redis ({settings.url}): {problem}" for problem in found.problems]
        raise ConfigError([*problems, "redis.allow_data_loss: true starts all the same, where jobs may be lost"])
    for warning in (*found.problems, *found.warnings):
        _log.warning("redis.doubted", url=settings.url, detail=warning)


def check_redis_if_there(settings: RedisSettings) -> None:
    """Do as `check_redis`, for a process that waits for a Redis that is away; it looks whose ledger is there, too.

    Raises:
        ConfigError: likewise, or the ledger is another version's.
    """
    try:
        check_redis(settings)
        with closing(connect(settings)) as client, ledger_errors():
            schema = cast("str | None", client.get(f"{settings.key_prefix}:schema"))
        check_schema(schema, settings.key_prefix)
    except LedgerUnavailable as error:
        _log.warning("redis.unchecked", url=settings.url, detail=error.detail)
