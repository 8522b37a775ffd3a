"""Who is calling: looked at before anything else of a request is read."""

from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from server.api.services import Services
from server.keys import LOCAL_PRINCIPAL, Principal


def require_key(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Let a request pass that carries a valid key, and remember whose it is.

    Raises:
        Unauthorized: it carries none, or one that is unknown or revoked.
    """
    services: Services = connection.app.state.services
    header = connection.headers.get("authorization")
    connection.scope["user"] = LOCAL_PRINCIPAL if services.keys is None else services.keys.authenticate(header)


def provide_principal(request: Request[Any, Any, Any]) -> Principal:
    """Hand the caller to a handler; only behind `require_key`."""
    return cast("Principal", request.user)
