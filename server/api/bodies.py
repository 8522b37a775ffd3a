"""How a request's body becomes the typed argument of a handler."""

import asyncio
from inspect import isclass
from typing import Any

from litestar import Request
from litestar.config.app import AppConfig
from litestar.exceptions import InternalServerException
from litestar.plugins.pydantic import PydanticInitPlugin
from pydantic import BaseModel

from server.api.json_bodies import decode_model, parse_json
from server.errors import MalformedBody, RequestError, UnsupportedMediaType

_BODY_TIMEOUT_SECONDS = 30


class BodyTimeout(RequestError):
    """Raised when a request's body does not arrive in time."""

    code = "request_timeout"
    title = "The body did not arrive in time"
    http_status = 408


class StrictRequest(Request[Any, Any, Any]):
    """A request whose body must be JSON, say so, and arrive in time."""

    async def body(self) -> bytes:
        """Return the raw body.

        Raises:
            UnsupportedMediaType: the content type is not JSON.
            MalformedBody: it is empty, or the connection was cut.
            BodyTimeout: the client is too slow.
        """
        if self.content_type[0].lower() != "application/json":
            found = self.headers.get("content-type", "none at all")
            raise UnsupportedMediaType(f"the content type must be application/json, not {found}")
        try:
            # Without a bound, a client that sends a byte now and then holds its connection for ever.
            async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
                body = await super().body()
        except TimeoutError as error:
            raise BodyTimeout(f"the body did not arrive within {_BODY_TIMEOUT_SECONDS} s") from error
        except InternalServerException as error:  # what Litestar raises when the client is gone
            raise MalformedBody("the connection ended before the body did") from error
        if not body:
            raise MalformedBody("the body is empty; send a JSON object")
        return body

    async def json(self) -> Any:
        """Return the body as plain JSON values; raises what `parse_json` raises."""
        return parse_json(await self.body())


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
