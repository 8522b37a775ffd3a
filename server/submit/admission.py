"""Turns what the ledger has against a batch into the errors that clients get."""

from collections.abc import Sequence

from server.errors import (
    Forbidden,
    IdempotencyConflict,
    ItemError,
    LedgerFull,
    ModelNotServed,
    NothingAccepted,
    QueueFull,
    ServerError,
    TooManyOpenJobs,
)
from server.ledger.api_side import SubmitResult
from server.settings import Settings

# Nobody knows when a job will be done; it is seconds rather than hours.
_OPEN_JOBS_WAIT_SECONDS = 30


def refusal_of(result: SubmitResult, settings: Settings) -> ServerError:
    """Say why nothing of a batch was accepted, whatever its items are."""
    match result.kind:
        case "full":
            return QueueFull(f"{settings.limits.max_open_jobs} jobs are open at most; try again when some are done")
        case "no_memory":
            most = f"{settings.admission.max_memory_fraction:.0%}"
            return LedgerFull(
                f"{result.text} % of the memory of Redis is in use, and new jobs are taken up to {most}; try again "
                "when some are done and their records are gone"
            )
        case _:
            return conflict()


def conflict() -> IdempotencyConflict:
    """Make the error for an idempotency key that comes with another body."""
    return IdempotencyConflict("this Idempotency-Key was used with another body; use a new key for a new request")


def not_served(model: str, settings: Settings) -> ModelNotServed:
    """Make the error for a model that would only let a job wait."""
    return ModelNotServed(
        f"no worker was ready for model {model} in the last {settings.admission.worker_grace_seconds:g} s; GET "
        f"/v1/models/{model} says why. Try again later, or choose another model"
    )


def nothing_accepted(errors: Sequence[ItemError]) -> NothingAccepted | ModelNotServed:
    """Make the error for a batch of which every item was refused."""
    # What a worker that comes back could do is worth asking for again, whatever is wrong with the rest.
    for error in errors:
        if error.code == ModelNotServed.code:
            return ModelNotServed(error.detail, tuple(errors))
    return NothingAccepted(f"none of the {len(errors)} item(s) can be done; see errors", tuple(errors))


def no_room_for(num_jobs: int, max_owner_jobs: int | None) -> TooManyOpenJobs | Forbidden:
    """Make the error for jobs that are more than a key lets its owner have open."""
    rule = f"with this key at most {max_owner_jobs} of its owner's jobs may be open"
    if num_jobs > (max_owner_jobs or 0):
        return Forbidden(f"{rule}, and these are {num_jobs}; name fewer at once")
    return TooManyOpenJobs(f"{rule}; try again when some are done", retry_after_seconds=_OPEN_JOBS_WAIT_SECONDS)
