"""How requests end when their process does: what takes seconds is finished, and all others get an answer in time."""

import asyncio
import json
from collections.abc import Callable
from typing import ClassVar

import structlog
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from server.api.errors import PROBLEM_TYPE, problem_body
from server.api.request_context import request_id
from server.errors import DependencyError

# What the last answers get to reach clients that do not read.
_SEND_SECONDS = 0.3
_log = structlog.stdlib.get_logger()


class ServerStopping(DependencyError):
    """Raised when a request cannot be finished before its process ends; another one takes it."""

    code: ClassVar[str] = "server_stopping"
    title: ClassVar[str] = "The server is being stopped"


class Stopping:
    """The end of this process, as its requests see it."""

    def __init__(self) -> None:
        self.has_begun = False
        self.requests: set[_Request] = set()
        self._acts: list[Callable[[], None]] = []

    def when_begun(self, act: Callable[[], None]) -> None:
        """Have `act` called when the end begins."""
        self._acts.append(act)

    def begin(self) -> None:
        """Tell everybody: event streams end, and each further answer is the last of its connection."""
        self.has_begun = True
        for act in self._acts:
            act()

    async def end_requests(self) -> None:
        """Answer 503 to what was not answered yet, and break off answers that have begun."""
        endings = [asyncio.create_task(request.end()) for request in self.requests]
        if endings:
            await asyncio.wait(endings, timeout=_SEND_SECONDS)


class StoppableRequests:
    """Wraps the application so that none of its requests outlives the process without an answer."""

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Request(scope, send, self._stopping).run(self._app, receive)


class _Request:
    """One request, which may be ended from outside."""

    def __init__(self, scope: HTTPScope, send: Send, stopping: Stopping) -> None:
        self._scope = scope
        self._path = scope["path"]  # the routing changes it
        self._send = send
        self._stopping = stopping
        self._limit = asyncio.timeout(None)
        self._has_begun_answer = False
        self._is_answered_here = False

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        try:
            async with self._limit:
                self._stopping.requests.add(self)
                try:
                    await app(self._scope, receive, self._pass_on)
                finally:
                    self._stopping.requests.discard(self)
        except (TimeoutError, asyncio.CancelledError):
            # Once it was ended here, whatever else ends it has nothing to add.
            if not self._limit.expired():
                raise

    async def _pass_on(self, message: Message) -> None:
        if self._is_answered_here:
            return
        if message["type"] == "http.response.start":
            self._has_begun_answer = True
            if self._stopping.has_begun:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        await self._send(message)

    async def end(self) -> None:
        if self._has_begun_answer:
            _log.warning("request.broken_off", path=self._path, reason="the server is being stopped")
        else:
            # Before the cancellation: a thread that waits for the store keeps that for as long as it waits itself.
            self._is_answered_here = True
            _log.warning("request.refused", code=ServerStopping.code, path=self._path)
            await self._refuse()
        if self in self._stopping.requests:  # it may have ended meanwhile
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _refuse(self) -> None:
        detail = f"the server is being stopped before this request was done; {self._advise()}"
        body = json.dumps(problem_body(ServerStopping, detail, request_id(self._scope))).encode()
        headers = [
            (b"content-type", PROBLEM_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(ServerStopping.retry_after_seconds).encode()),
            (b"connection", b"close"),
        ]
        await self._send({"type": "http.response.start", "status": ServerStopping.http_status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _advise(self) -> str:
        if self._scope["method"] != "POST" or self._path.rstrip("/") != "/v1/batches":
            return "send it again"
        if any(name == b"idempotency-key" for name, _ in self._scope["headers"]):
            return "send it again with the same Idempotency-Key"
        return (
            "look at GET /v1/batches whether it was accepted before you send it again: without an Idempotency-Key that "
            "would be another batch"
        )
