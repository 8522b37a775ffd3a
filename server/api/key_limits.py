"""What a key may use: requests a minute and bytes a day, out of buckets that all API processes share."""

import asyncio
import math
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from server.api.services import Services
from server.errors import Forbidden, LedgerUnavailable, LimitReached
from server.keys import Principal
from server.ledger.api_side import ApiLedger

_MINUTE_SECONDS = 60
_DAY_SECONDS = 24 * 3600
# A request is not held up for longer by the question whether it may come.
_PATIENCE_SECONDS = 0.5


class TooManyRequests(LimitReached):
    """Raised when a key has made as many requests as it may for now."""

    code = "too_many_requests"
    title = "This key makes too many requests"


class TooManyBytes(LimitReached):
    """Raised when a key has announced or sent as many bytes of photos as it may for now."""

    code = "too_many_bytes"
    title = "This key sends too many bytes"


async def limit_requests(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Let a request pass whose key may make one more now; only behind `require_key`. Keys without a limit cost nothing.

    Raises:
        TooManyRequests: the key may not.
    """
    principal: Principal = connection.scope["user"]
    most = principal.requests_per_minute
    if most is None:
        return
    services: Services = connection.app.state.services
    bucket = f"requests:{principal.key_id}"
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            wait_seconds = await services.ledger.take_tokens(bucket, 1, capacity=most, fills_in_seconds=_MINUTE_SECONDS)
    except (LedgerUnavailable, TimeoutError):
        # Open: what a flood could wear out is behind Redis, and answers 503 by itself while that is away. What does not
        # need Redis, such as the presets, is a constant, and goes on.
        return
    if wait_seconds:
        raise TooManyRequests(
            f"this key may make {most} requests a minute; the next one goes in {_whole(wait_seconds)} s",
            retry_after_seconds=_whole(wait_seconds),
        )


async def take_bytes(ledger: ApiLedger, principal: Principal, size_bytes: int) -> None:
    """Count photos that are announced, or that came with a request, towards what their key may send in a day.

    Raises:
        TooManyBytes: the key may not send so many now; none was counted.
        Forbidden: it may never send so many at once.
        LedgerUnavailable: Redis is away. Closed: an upload is accepted by Redis or not at all, so nothing that could
            be done without it is refused, and what is not counted would never be.
    """
    most = principal.max_bytes_per_day
    if most is None or size_bytes == 0:
        return
    if size_bytes > most:
        raise Forbidden(f"this key may send {most} bytes a day, and these photos have {size_bytes}; send fewer at once")
    bucket = f"bytes:{principal.key_id}"
    wait_seconds = await ledger.take_tokens(bucket, size_bytes, capacity=most, fills_in_seconds=_DAY_SECONDS)
    if wait_seconds:
        raise TooManyBytes(
            f"this key may send {most} bytes a day; {size_bytes} more go in {_whole(wait_seconds)} s",
            retry_after_seconds=_whole(wait_seconds),
        )


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
