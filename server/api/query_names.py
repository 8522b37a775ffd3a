"""Refuses query parameters that nobody reads: a mistyped filter would else silently show everything."""

from itertools import islice
from typing import Any, cast

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi.spec import Operation, Parameter
from litestar.types import HTTPScope

from server.config.allowed import suggest
from server.errors import FieldError, InvalidRequest

_MAX_REPORTED_ERRORS = 50


def refuse_unknown_names(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Let a request pass whose route reads all of its query parameters, each given once.

    Raises:
        InvalidRequest: a name is unknown, or stands there twice.
    """
    given = [name for name, _ in connection.query_params.multi_items()]
    if not given:
        return
    known = _names_of_route(connection)
    # Finding what was probably meant takes time, and a query may hold thousands of names.
    unknown = islice((name for name in dict.fromkeys(given) if name not in known), _MAX_REPORTED_ERRORS)
    mistakes = [
        FieldError(f"?{name}", "unknown_field", f"there is no such parameter here; {suggest(name, known)}")
        for name in unknown
    ]
    mistakes += [
        FieldError(f"?{name}", "invalid_value", "stands there more than once")
        for name in dict.fromkeys(given)
        if name in known and given.count(name) > 1
    ]
    if mistakes:
        raise InvalidRequest(f"{mistakes[0].location}: {mistakes[0].detail}", tuple(mistakes[:_MAX_REPORTED_ERRORS]))


def _names_of_route(connection: ASGIConnection[Any, Any, Any, Any]) -> list[str]:
    # The document is made once and kept, and names for each route what its handler reads.
    item = (connection.app.openapi_schema.paths or {}).get(connection.scope["path_template"])
    operation: Operation | None = getattr(item, cast("HTTPScope", connection.scope)["method"].lower(), None)
    parameters = (operation.parameters if operation else None) or []
    return [one.name for one in parameters if isinstance(one, Parameter) and one.param_in == "query"]
