"""Around every request, whatever becomes of it: an id, a line in the log, and headers that every answer has."""

import logging
import re
import secrets
import time
from contextlib import AsyncExitStack
from typing import Any

import structlog
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from server.api.crowding import is_crowded

_log = structlog.stdlib.get_logger()
# Anything else from outside would let a client write into logs and headers.
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_STATE_KEY = "request_id"
_OPENED_KEY = "opened"
_MAX_PATH_CHARACTERS = 200


def request_id(scope: Scope) -> str:
    """Return the id of the request that `scope` belongs to."""
    return scope["state"][_STATE_KEY]


def opened_files(scope: Scope) -> AsyncExitStack:
    """Return what closes files and gives places back once the request of `scope` is done, whatever became of it."""
    return scope["state"][_OPENED_KEY]


def shown_path(scope: Scope) -> str:
    """Return the path that was asked for, for people: cut where it is absurd."""
    path: str = scope["path"]
    return path if len(path) <= _MAX_PATH_CHARACTERS else f"{path[:_MAX_PATH_CHARACTERS]}…"


class RequestContext:
    """Wraps the application from outside, so that unknown routes and failures go through it as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        chosen = given.decode("ascii") if _SANE_ID.fullmatch(given) else secrets.token_hex(16)
        scope["state"][_STATE_KEY] = chosen
        started_at = time.perf_counter()
        is_answered = False
        # The routing changes it.
        path = shown_path(scope)

        async def receive_what_is_read() -> Any:
            """Drop what comes of a body once the answer has begun: Litestar would go a call deeper for each piece."""
            message = await receive()
            while is_answered and message["type"] == "http.request":
                message = await receive()
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", chosen.encode("ascii")),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                    # /docs in a frame of another site could have its buttons pressed unseen; no page can say so itself.
                    (b"content-security-policy", b"frame-ancestors 'none'"),
                    *([(b"connection", b"close")] if is_crowded(scope) else ()),
                ]
                # Probes come every few seconds. The path only: a query may hold what is not for a log.
                _log.log(
                    logging.DEBUG if scope["path"].startswith("/health/") else logging.INFO,
                    "request.answered",
                    method=scope["method"],
                    path=path,
                    status=message["status"],
                    seconds=round(time.perf_counter() - started_at, 4),
                )
            await send(message)

        async with AsyncExitStack() as opened:
            scope["state"][_OPENED_KEY] = opened
            with structlog.contextvars.bound_contextvars(request_id=chosen):
                await self._app(scope, receive_what_is_read, send_with_headers)
