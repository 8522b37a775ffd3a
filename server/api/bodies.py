"""How a request's body becomes the typed argument of a handler."""

import asyncio
import time
from collections.abc import AsyncGenerator
from inspect import isclass
from typing import Any

from litestar import Request
from litestar.config.app import AppConfig
from litestar.exceptions import InternalServerException
from litestar.plugins.pydantic import PydanticInitPlugin
from litestar.types import HTTPReceiveMessage, Receive
from pydantic import BaseModel

from server.api.crowding import LARGE_BYTES
from server.api.json_bodies import decode_model, parse_json
from server.api.request_context import opened_files
from server.errors import MalformedBody, RequestError, UnsupportedMediaType
from server.settings import ServerSettings


class BodyTimeout(RequestError):
    """Raised when a request's body does not arrive in time."""

    code = "request_timeout"
    title = "The body did not arrive in time"
    http_status = 408


class StrictRequest(Request[Any, Any, Any]):
    """A request whose body must be JSON, say so, and arrive in time."""

    @property
    def limits(self) -> ServerSettings:
        """How long a client may take."""
        return self.app.state.services.settings.server

    async def body(self) -> bytes:
        """Return the raw body.

        Raises:
            UnsupportedMediaType: the content type is not JSON.
            MalformedBody: it is empty, or the connection was cut.
            BodyTimeout: the client is too slow.
            TooManyLargeBodies: it is large, and so are too many others.
        """
        if self.content_type[0].lower() != "application/json":
            found = self.headers.get("content-type", "none at all")
            raise UnsupportedMediaType(f"the content type must be application/json, not {found}")
        try:
            # Without a bound, a client that sends a byte now and then holds its connection for ever.
            async with asyncio.timeout(self.limits.body_timeout_seconds):
                body = await super().body()
        except TimeoutError as error:
            raise BodyTimeout(f"the body did not arrive within {self.limits.body_timeout_seconds:g} s") from error
        except InternalServerException as error:  # what Litestar raises when the client is gone
            raise MalformedBody("the connection ended before the body did") from error
        if not body:
            raise MalformedBody("the body is empty; send a JSON object")
        return body

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Give the body as it comes, for `body`; raises TooManyLargeBodies."""
        size_bytes, is_large = 0, False
        async for chunk in super().stream():
            size_bytes += len(chunk)
            if size_bytes > LARGE_BYTES and not is_large:
                is_large = True
                self.app.state.services.large_bodies.take(opened_files(self.scope))
            yield chunk

    async def json(self) -> Any:
        """Return the body as plain JSON values; raises what `parse_json` raises."""
        return parse_json(await self.body())


class Patience:
    """How long a client may still let us wait for a large body: waiting uses it up, bytes earn it again.

    So a photo may take as long as its line needs, but a byte now and then keeps nothing open.

    Args:
        limits: say what there is at first, which is also the most, and what a byte earns.
    """

    def __init__(self, limits: ServerSettings) -> None:
        self._limits = limits
        self._seconds = limits.body_timeout_seconds

    async def receive(self, receive: Receive) -> HTTPReceiveMessage:
        """Return what `receive` does.

        Raises:
            BodyTimeout: the client has used up its time.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds):
                message: Any = await receive()
        except TimeoutError as error:
            raise BodyTimeout(
                f"the body comes too slowly: it may let us wait for {self._limits.body_timeout_seconds:g} s, and again "
                f"as long as its bytes take at {self._limits.min_body_bytes_per_second} a second"
            ) from error
        earned = len(message.get("body", b"")) / self._limits.min_body_bytes_per_second
        left = self._seconds - (time.monotonic() - started) + earned
        self._seconds = min(left, self._limits.body_timeout_seconds)
        return message


class StrictModels(PydanticInitPlugin):
    """Litestar's pydantic plugin, but a mistake in a body is told with a JSON pointer.

    Litestar joins the places of mistakes with dots, and a name may hold dots.
    """

    __slots__ = ("_max_items",)

    def __init__(self, *, max_items: int) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._max_items = max_items

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Put our decoder before the plugin's own: the first that fits is taken."""
        app_config = super().on_app_init(app_config)
        app_config.type_decoders = [(_is_model, self._decode), *(app_config.type_decoders or [])]
        return app_config

    def _decode(self, model: type[BaseModel], value: Any) -> BaseModel:
        return decode_model(model, value, max_items=self._max_items)


def _is_model(annotation: object) -> bool:
    return isclass(annotation) and issubclass(annotation, BaseModel)
