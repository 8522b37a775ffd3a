"""`/v1/batches`: submit a batch, follow it, cancel it."""

from typing import Annotated

from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, JSONBody

from server.api.errors import problems
from server.api.outputs import OutputSigner
from server.api.services import Services
from server.api.views import BatchView, SubmissionView, view_batch, view_item_error
from server.errors import Conflict, Forbidden, InvalidRequest, NotFound
from server.jobs import FINAL_STATUSES, Batch, Priority
from server.keys import Principal
from server.submit.accept import ID_PATTERN, IdempotencyKey
from server.submit.request import BatchRequest, fingerprint

_MAX_KEY_CHARACTERS = 255
_IdempotencyHeader = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        description="The same key and body answer the first result again, for a day; another body is refused.",
    ),
]


@post(
    "/batches",
    tags=["Batches"],
    summary="Submit a batch",
    response_description="Every item was accepted",
    responses={
        207: ResponseSpec(SubmissionView, description="Some items were accepted", generate_examples=False),
        **problems(403, 404, 409, 413, 415, 422),
    },
)
async def submit_batch(
    data: JSONBody[BatchRequest],
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
    idempotency_key: _IdempotencyHeader = None,
) -> Response[SubmissionView]:
    """Accept the items that can be done, durably, and say of each other one why not.

    201 when every item was accepted, 207 when some were, 422 when none was.
    """
    _check_priority(data.priority, principal)
    key = None if idempotency_key is None else _read_key(idempotency_key, data)
    submission = await services.submitter.submit(principal.owner, data, key)
    return Response(
        SubmissionView(
            batch=view_batch(submission.batch, OutputSigner(services)),
            errors=[view_item_error(error) for error in submission.errors],
        ),
        status_code=submission.http_status,
        headers={"Location": f"/v1/batches/{submission.batch.id}"},
    )


@get("/batches/{batch_id:str}", tags=["Batches"], summary="Read a batch", responses=problems(404))
async def read_batch(
    batch_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> BatchView:
    """Answer a batch with all its jobs as they are now."""
    return view_batch(await _find_batch(services, principal, batch_id), OutputSigner(services))


@post(
    "/batches/{batch_id:str}/cancel",
    status_code=200,
    tags=["Batches"],
    summary="Cancel a batch",
    responses=problems(404, 409),
)
async def cancel_batch(
    batch_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> BatchView:
    """Cancel the jobs that are not done yet: queued ones at once, running ones before their next step."""
    batch = await _find_batch(services, principal, batch_id)
    open_ids = [job.id for job in batch.jobs if job.status not in FINAL_STATUSES]
    answers = await services.ledger.cancel(principal.owner, open_ids) if open_ids else []
    if all(answer == "finished" for answer in answers):
        raise Conflict(f"batch {batch_id} has finished; there is nothing to cancel")
    return view_batch(await _find_batch(services, principal, batch_id), OutputSigner(services))


async def _find_batch(services: Services, principal: Principal, batch_id: str) -> Batch:
    # An id of another shape could name another key of the ledger.
    batch = await services.ledger.read_batch(batch_id) if ID_PATTERN.fullmatch(batch_id) else None
    if batch is None or batch.owner != principal.owner:
        raise NotFound(f"there is no batch {batch_id}")
    return batch


def _check_priority(wanted: str, principal: Principal) -> None:
    from_high_to_low = [priority.value for priority in Priority]
    if from_high_to_low.index(wanted) < from_high_to_low.index(principal.max_priority):
        raise Forbidden(f"this key may ask for priority {principal.max_priority} at most, not {wanted}")


def _read_key(text: str, request: BatchRequest) -> IdempotencyKey:
    if not (0 < len(text) <= _MAX_KEY_CHARACTERS and text.isascii() and text.isprintable()):
        raise InvalidRequest(f"the header Idempotency-Key needs 1 to {_MAX_KEY_CHARACTERS} printable ASCII characters")
    return IdempotencyKey(text, fingerprint(request))
