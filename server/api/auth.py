"""Who is calling: looked at before anything else of a request is read."""

import socket
from typing import Any, cast

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import Headers
from litestar.handlers.base import BaseRouteHandler

from server.api.services import Services
from server.errors import Unauthorized
from server.keys import LOCAL_PRINCIPAL, Principal
from server.settings import is_loopback


def require_key(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Let a request pass that carries a valid key, and remember whose it is.

    Raises:
        Unauthorized: it carries none, several, or one that is unknown or revoked; or, where nobody needs one, it was
            sent for a page of another site.
    """
    services: Services = connection.app.state.services
    if services.keys is None:
        _check_comes_from_here(connection.headers)
        connection.scope["user"] = LOCAL_PRINCIPAL
        return
    headers = connection.headers.getall("authorization", [])
    # A proxy may look at the one and we at the other.
    if len(headers) > 1:
        raise Unauthorized("the header Authorization stands there more than once; it holds one key: Bearer <key>")
    connection.scope["user"] = services.keys.authenticate(headers[0] if headers else None)


def _check_comes_from_here(headers: Headers) -> None:
    """Refuse what a page of another site has a browser on this machine send.

    Nobody else reaches a server without keys. But any site can let its own name lead to 127.0.0.1, and read the answers
    then; and any page can send a form here, without reading them.
    """
    host = _name_in(headers.get("host", ""))
    # Who runs the network may let any other name lead here, one without a dot as well. Every browser sends a name.
    if host and not (_is_of_this_machine(host) or host == socket.gethostname().lower()):
        raise _not_from_here("Host", host)
    for origin in headers.getall("origin", []):
        name = _name_in(origin)
        if not (_is_of_this_machine(name) or (name == host and "://" in origin)):
            raise _not_from_here("Origin", origin)


def _name_in(authority: str) -> str:
    """Return the host of an origin, or of a Host header, without its port."""
    host = authority.rpartition("//")[2].lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].removesuffix(".")


def _is_of_this_machine(name: str) -> bool:
    return is_loopback(name) or name.endswith(".localhost")


def _not_from_here(header: str, value: str) -> Unauthorized:
    return Unauthorized(
        "without keys this server answers this machine alone, under a loopback address such as 127.0.0.1 or localhost; "
        f"the header {header} names {value[:100]!a}"
    )


def provide_principal(request: Request[Any, Any, Any]) -> Principal:
    """Hand the caller to a handler; only behind `require_key`."""
    return cast("Principal", request.user)
