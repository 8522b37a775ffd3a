"""Every error as `application/problem+json` (RFC 9457), those of Litestar itself too."""

from dataclasses import asdict
from enum import Enum
from http import HTTPStatus
from inspect import isclass
from typing import Any, cast

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers.base import BaseRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import KwargDefinition
from pydantic import Field

from server.api.request_context import request_id, shown_path
from server.api.views import View
from server.errors import (
    DependencyError,
    FieldError,
    InvalidRequest,
    LimitReached,
    MethodNotAllowed,
    ModelNotServed,
    NotFound,
    NothingAccepted,
    PayloadTooLarge,
    RequestError,
    ServerError,
    Unauthorized,
)

_log = structlog.stdlib.get_logger()
_AnyRequest = Request[Any, Any, Any]
PROBLEM_TYPE = "application/problem+json"
# What every route under /v1 may answer.
_COMMON = (400, 401, 429, 503)


class ProblemError(View):
    """One mistake in a request; `index` is there where one item or file was refused."""

    location: str = Field(description="JSON pointer into the body.")
    index: int | None = None
    code: str
    detail: str


class Problem(View):
    """Why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable; meant for programs.")
    request_id: str = Field(description="The log of the server has it too.")
    errors: list[ProblemError] | None = None


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """Describe the refusals of a route under /v1 for the OpenAPI document."""
    return {
        status: ResponseSpec(
            Problem, description=HTTPStatus(status).phrase, media_type=PROBLEM_TYPE, generate_examples=False
        )
        for status in sorted({*_COMMON, *statuses})
    }


def exception_handlers() -> dict[int | type[Exception], Any]:
    """Return the handlers for all that a route, or the way to it, may raise."""
    return {
        RequestError: _answer_request_error,
        LimitReached: _answer_limit_reached,
        DependencyError: _answer_dependency_error,
        HTTPException: _answer_litestar_error,
        Exception: _answer_unexpected,
    }


def problem(
    request: _AnyRequest, error: type[ServerError] | ServerError, detail: str, headers: dict[str, str] | None = None
) -> Response[dict[str, Any]]:
    """Answer an error as a problem document."""
    body = problem_body(error, detail, request_id(request.scope))
    return Response(body, status_code=error.http_status, media_type=PROBLEM_TYPE, headers=headers)


def problem_body(error: type[ServerError] | ServerError, detail: str, request_id: str) -> dict[str, Any]:
    """Write an error as a problem document."""
    body: dict[str, Any] = {
        "type": f"urn:restage:error:{error.code}",
        "title": error.title,
        "status": error.http_status,
        "detail": detail,
        "code": error.code,
        "request_id": request_id,
    }
    if errors := _list_errors(error):
        body["errors"] = errors
    return body


def _list_errors(error: type[ServerError] | ServerError) -> list[dict[str, Any]]:
    match error:
        case InvalidRequest():
            return [asdict(one) for one in error.errors]
        case NothingAccepted() | ModelNotServed():
            return [asdict(one) for one in error.item_errors]
        case _:
            return []


def _answer_request_error(request: _AnyRequest, error: RequestError) -> Response[dict[str, Any]]:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    return problem(request, error, error.detail, headers)


def _answer_limit_reached(request: _AnyRequest, error: LimitReached) -> Response[dict[str, Any]]:
    return problem(request, error, error.detail, {"Retry-After": str(error.retry_after_seconds)})


def _answer_dependency_error(request: _AnyRequest, error: DependencyError) -> Response[dict[str, Any]]:
    _log.warning("request.refused", code=error.code, detail=error.detail)
    return problem(request, error, error.detail, {"Retry-After": str(error.retry_after_seconds)})


def _answer_litestar_error(request: _AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    if isinstance(error, ValidationException):
        return _answer_wrong_parameters(request, error)
    match error.status_code:
        case 404:
            return problem(request, NotFound, f"there is nothing at {shown_path(request.scope)}")
        case 405:
            allowed = (error.headers or {}).get("allow", "")
            detail = f"{request.method} is not possible here; allowed: {allowed}"
            return problem(request, MethodNotAllowed, detail, {"Allow": allowed})
        case 413:
            return problem(request, PayloadTooLarge, "the body is larger than limits.max_body_bytes allows")
        case status if status < 500:
            return problem(request, RequestError, error.detail)
        case _:
            return _answer_unexpected(request, error)


def _answer_wrong_parameters(request: _AnyRequest, error: ValidationException) -> Response[dict[str, Any]]:
    """Tell mistakes in a query or a header as those in a body are told; `?limit` is the parameter `limit`."""
    found = cast("list[dict[str, Any]]", error.extra or [])
    mistakes = tuple(
        FieldError(f"?{one.get('key', '')}", "invalid_value", _explain_parameter(request, one)) for one in found
    )
    detail = f"{mistakes[0].location}: {mistakes[0].detail}" if mistakes else error.detail
    return _answer_request_error(request, InvalidRequest(detail, mistakes))


def _explain_parameter(request: _AnyRequest, mistake: dict[str, Any]) -> str:
    handler = cast("BaseRouteHandler", request.route_handler)
    field = handler.parsed_fn_signature.parameters.get(mistake.get("key", ""))
    kinds = [one.annotation for one in (field, *field.inner_types)] if field else []
    values = [value for kind in kinds if isclass(kind) and issubclass(kind, Enum) for value in kind]
    if values:
        return f"allowed are {', '.join(str(value.value) for value in values)}"
    match field.kwarg_definition if field else None:
        case KwargDefinition(ge=int(low), le=int(high)):
            return f"needs a whole number from {low} to {high}"
        case KwargDefinition(max_length=int(most)) as limits:
            return f"needs {limits.min_length or 0} to {most} characters"
        case _:
            pass
    return str(mistake.get("message", "cannot be read")).replace("`", "").lower()


def _answer_unexpected(request: _AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    _log.error("request.failed", method=request.method, path=shown_path(request.scope), exc_info=error)
    return problem(request, ServerError, "something went wrong here; the server's log has more under this request id")
