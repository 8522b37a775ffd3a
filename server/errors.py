"""Every error that the server raises on purpose, each with a stable code that clients and operators may rely on.

ServerError
├─ RequestError       4xx: the caller's fault, never retried
├─ LimitReached       429: the caller's key has used all that it may for now
├─ DependencyError    503: Redis, the store or a worker is away, or full; the API answers at once, workers wait
└─ ConfigError        at boot only, never over HTTP
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldError:
    """One mistake in a request: where (JSON pointer), which (code), and what is allowed (detail)."""

    location: str
    code: str
    detail: str


@dataclass(frozen=True)
class ItemError:
    """Why one item of a request was refused while others went on, and where (JSON pointer) the mistake stands."""

    index: int
    location: str
    code: str
    detail: str


def json_pointer(path: Sequence[str | int]) -> str:
    """Write a path as a JSON pointer (RFC 6901); "" is the whole document."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


class ServerError(Exception):
    """Base of every error that the server raises on purpose."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int] = 500

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class RequestError(ServerError):
    """Raised when the caller asked for something that cannot be done; asking again changes nothing."""

    code = "bad_request"
    title = "Bad request"
    http_status = 400


class MalformedBody(RequestError):
    """Raised when a request body is not what its content type says."""

    code = "malformed_body"
    title = "The body could not be read"


class Unauthorized(RequestError):
    """Raised when a request carries no key or an unknown one."""

    code = "unauthorized"
    title = "A valid API key is needed"
    http_status = 401


class Forbidden(RequestError):
    """Raised when a key is valid but its role does not allow the call."""

    code = "forbidden"
    title = "This key may not do that"
    http_status = 403


class NotFound(RequestError):
    """Raised when an id or a route is unknown, or belongs to another owner."""

    code = "not_found"
    title = "Not found"
    http_status = 404


class MethodNotAllowed(RequestError):
    """Raised when a route exists but not for this HTTP method."""

    code = "method_not_allowed"
    title = "Method not allowed"
    http_status = 405


class Conflict(RequestError):
    """Raised when the thing is not in a state that allows the call."""

    code = "conflict"
    title = "Not possible in this state"
    http_status = 409


class IdempotencyConflict(Conflict):
    """Raised when an idempotency key comes again with another body."""

    code = "idempotency_conflict"
    title = "The idempotency key was used with another body"


class PayloadTooLarge(RequestError):
    """Raised when a request body is over the limit of its route."""

    code = "payload_too_large"
    title = "The body is too large"
    http_status = 413


class UnsupportedMediaType(RequestError):
    """Raised when a request body has a content type that the route does not take."""

    code = "unsupported_media_type"
    title = "Unsupported media type"
    http_status = 415


class InvalidRequest(RequestError):
    """Raised when a request is well-formed but its values are not allowed."""

    code = "invalid_request"
    title = "The request is not valid"
    http_status = 422

    def __init__(self, detail: str, errors: tuple[FieldError, ...] = ()) -> None:
        super().__init__(detail)
        self.errors = errors


class NothingAccepted(RequestError):
    """Raised when every item of a request was refused."""

    code = "nothing_accepted"
    title = "No item was accepted"
    http_status = 422

    def __init__(self, detail: str, item_errors: tuple[ItemError, ...] = ()) -> None:
        super().__init__(detail)
        self.item_errors = item_errors


class LimitReached(ServerError):
    """Base of what is raised when a key has used all that it may for now; later, the same request goes."""

    code = "limit_reached"
    title = "This key has used all that it may for now"
    http_status = 429

    def __init__(self, detail: str, *, retry_after_seconds: int) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class TooManyOpenJobs(LimitReached):
    """Raised when as many jobs of an owner are open as the caller's key allows."""

    code = "too_many_open_jobs"
    title = "Too many jobs of this owner are waiting"


class DependencyError(ServerError):
    """Base of what is raised when Redis or the store does not answer in time."""

    code = "dependency_unavailable"
    title = "A service that Restage needs is not available"
    http_status = 503
    retry_after_seconds: ClassVar[int] = 2


class LedgerUnavailable(DependencyError):
    """Raised when Redis cannot be reached, answers late, or refuses to write."""

    code = "ledger_unavailable"
    title = "Redis is not available"


class LedgerFull(LedgerUnavailable):
    """Raised when Redis has no memory left for new jobs, or not enough by `admission.max_memory_fraction`."""

    code = "ledger_full"
    title = "Redis has no memory for new jobs"
    retry_after_seconds = 30


class StoreUnavailable(DependencyError):
    """Raised when the object store cannot be reached, answers late, or with a server error."""

    code = "store_unavailable"
    title = "The object store is not available"


class StoreTooSlow(StoreUnavailable):
    """Raised when a call of the object store was ended because it took too long in all."""


class QueueFull(DependencyError):
    """Raised when as many jobs are open as `limits.max_open_jobs` allows."""

    code = "queue_full"
    title = "Too many jobs are waiting"
    retry_after_seconds = 30


class ModelNotServed(DependencyError):
    """Raised when no worker was ready for a model for `admission.worker_grace_seconds`."""

    code = "model_not_served"
    title = "No worker serves the model"
    retry_after_seconds = 30

    def __init__(self, detail: str, item_errors: tuple[ItemError, ...] = ()) -> None:
        super().__init__(detail)
        self.item_errors = item_errors


class ObjectNotFound(ServerError):
    """Raised when the store has no object under a key."""

    code = "object_not_found"
    title = "No such object"
    http_status = 404


class ObjectChanged(ServerError):
    """Raised when an object no longer has the ETag that it was accepted with."""

    code = "input_changed"
    title = "The object was changed after it was accepted"
    http_status = 409


class ConfigError(ServerError):
    """Raised when the configuration cannot be used; `problems` holds one line for each mistake."""

    code = "config_error"
    title = "The configuration is not usable"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
