"""What all of the API's calls of the ledger share: the client, and the scripts it has registered."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from server.ledger.scripts import script_keys, script_text, unavailable
from server.settings import RedisSettings

_MAX_CONNECTIONS = 64


@asynccontextmanager
async def ledger_errors() -> AsyncGenerator[None]:
    """Turn a Redis that does not serve into `LedgerUnavailable`; mistakes of ours stay what they are."""
    try:
        yield
    except RedisError as error:
        if (translated := unavailable(error)) is None:
            raise
        raise translated from error


def connect(settings: RedisSettings) -> Redis:
    """Return a client that answers or fails within about two timeouts; it connects at its first call.

    A broken connection is made anew once. A timeout is not tried again: redis-py would do so for connecting and for the
    call, four times in all, while the client of the API waits. More calls than there are connections wait their turn.
    """
    pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType] (redis types no **kwargs)
        settings.url,
        max_connections=_MAX_CONNECTIONS,
        timeout=settings.timeout_seconds,
        password=settings.password.get_secret_value() if settings.password else None,
        decode_responses=True,
        socket_timeout=settings.timeout_seconds,
        socket_connect_timeout=settings.timeout_seconds,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 1, supported_errors=(redis.ConnectionError,)),
    )
    return Redis.from_pool(pool)


class ApiScripts:
    """Runs scripts under one key prefix; one round trip a call, on the event loop.

    Every call raises LedgerUnavailable when Redis cannot be reached, is too slow, or refuses to write.
    """

    SCRIPTS: tuple[str, ...] = ()

    def __init__(self, client: Redis, *, key_prefix: str) -> None:
        self._client = client
        self._prefix = key_prefix
        self._keys = script_keys(key_prefix)
        names = {name for kind in type(self).__mro__ for name in getattr(kind, "SCRIPTS", ())}
        self._scripts = {name: client.register_script(script_text(name)) for name in names}

    async def ping(self) -> None:
        """Return when Redis answers."""
        async with ledger_errors():
            await cast("Any", self._client).ping()

    async def close(self) -> None:
        """Close the connections; calls that wait for Redis end first or fail."""
        await asyncio.shield(self._client.aclose())

    async def _run(self, name: str, *args: object) -> Any:
        async with ledger_errors():
            return await self._scripts[name](keys=self._keys, args=[*args])  # pyright: ignore[reportArgumentType]
