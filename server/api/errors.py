"""Every error as `application/problem+json` (RFC 9457), those of Litestar itself too."""

from http import HTTPStatus
from typing import Any

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from pydantic import Field

from server.api.request_context import request_id
from server.api.views import View
from server.errors import (
    DependencyError,
    InvalidRequest,
    ItemError,
    MethodNotAllowed,
    NotFound,
    NothingAccepted,
    PayloadTooLarge,
    RequestError,
    ServerError,
    Unauthorized,
)

_log = structlog.stdlib.get_logger()
_AnyRequest = Request[Any, Any, Any]
_MEDIA_TYPE = "application/problem+json"
# What every route under /v1 may answer.
_COMMON = (400, 401, 503)


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
            Problem, description=HTTPStatus(status).phrase, media_type=_MEDIA_TYPE, generate_examples=False
        )
        for status in sorted({*_COMMON, *statuses})
    }


def exception_handlers() -> dict[int | type[Exception], Any]:
    """Return the handlers for all that a route, or the way to it, may raise."""
    return {
        RequestError: _answer_request_error,
        DependencyError: _answer_dependency_error,
        HTTPException: _answer_litestar_error,
        Exception: _answer_unexpected,
    }


def problem(
    request: _AnyRequest, error: type[ServerError] | ServerError, detail: str, headers: dict[str, str] | None = None
) -> Response[dict[str, Any]]:
    """Write an error as a problem document."""
    body: dict[str, Any] = {
        "type": f"urn:restage:error:{error.code}",
        "title": error.title,
        "status": error.http_status,
        "detail": detail,
        "code": error.code,
        "request_id": request_id(request.scope),
    }
    if errors := _list_errors(error):
        body["errors"] = errors
    return Response(body, status_code=error.http_status, media_type=_MEDIA_TYPE, headers=headers)


def _list_errors(error: type[ServerError] | ServerError) -> list[dict[str, Any]]:
    match error:
        case InvalidRequest():
            return [{"location": one.location, "code": one.code, "detail": one.detail} for one in error.errors]
        case NothingAccepted():
            return [_list_item_error(error.field, one) for one in error.item_errors]
        case _:
            return []


def _list_item_error(field: str, error: ItemError) -> dict[str, Any]:
    return {"location": f"/{field}/{error.index}", "index": error.index, "code": error.code, "detail": error.detail}


def _answer_request_error(request: _AnyRequest, error: RequestError) -> Response[dict[str, Any]]:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    return problem(request, error, error.detail, headers)


def _answer_dependency_error(request: _AnyRequest, error: DependencyError) -> Response[dict[str, Any]]:
    _log.warning("request.refused", code=error.code, detail=error.detail)
    return problem(request, error, error.detail, {"Retry-After": str(error.retry_after_seconds)})


def _answer_litestar_error(request: _AnyRequest, error: HTTPException) -> Response[dict[str, Any]]:
    match error.status_code:
        case 404:
            return problem(request, NotFound, f"there is nothing at {request.url.path}")
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


def _answer_unexpected(request: _AnyRequest, error: Exception) -> Response[dict[str, Any]]:
    _log.error("request.failed", method=request.method, path=request.url.path, exc_info=error)
    return problem(request, ServerError, "something went wrong here; the server's log has more under this request id")
