"""`/v1/batches`: submit a batch, list them, read, cancel, retry and delete one."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated

from litestar import Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter

from server.api.errors import problems
from server.api.forms import FormOperation, FormRequest
from server.api.key_limits import take_bytes
from server.api.outputs import OutputSigner
from server.api.pages import PageCursor, PageLimit, check_cursor
from server.api.retrying import explain_no_retry, reopen
from server.api.services import Services
from server.api.views import (
    BatchList,
    BatchView,
    SubmissionView,
    view_batch,
    view_batch_summary,
    view_item_error,
)
from server.errors import Conflict, Forbidden, InvalidRequest, NotFound
from server.jobs import FINAL_STATUSES, Batch, BatchStatus, JobStatus, Priority
from server.keys import Principal
from server.submit.accept import IdempotencyKey, is_id
from server.submit.files import ReceivedFile, check_files
from server.submit.request import BatchRequest, fingerprint
from server.webhooks.addresses import check_url

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
    request_class=FormRequest,
    operation_class=FormOperation,
    response_description="Every item was accepted",
    responses={
        207: ResponseSpec(SubmissionView, description="Some items were accepted", generate_examples=False),
        **problems(403, 404, 409, 413, 415, 422),
    },
)
async def submit_batch(
    data: JSONBody[BatchRequest],
    request: FormRequest,
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
    idempotency_key: _IdempotencyHeader = None,
) -> Response[SubmissionView]:
    """Accept the items that can be done, durably, and say of each other one why not.

    201 when every item was accepted, 207 when some were, 422 when none was. As a form, the part `batch` is the JSON,
    and the photos are files whose parts the items name.
    """
    check_files(data, request.files)
    if data.webhook is not None:
        check_url(data.webhook.url, services.settings.webhooks.allowed_hosts)
        services.webhook_secrets.check(principal.key_id)
    files = request.files or {}
    _check_priority(data.priority, principal)
    key = None if idempotency_key is None else _read_key(idempotency_key, data, files)
    size_bytes = sum(file.size_bytes for file in files.values())
    submission = await services.submitter.submit(
        principal.owner,
        data,
        key,
        files,
        key_id=principal.key_id,
        max_owner_jobs=principal.max_open_jobs,
        charge=partial(take_bytes, services.ledger, principal, size_bytes),
    )
    return Response(
        SubmissionView(
            batch=view_batch(submission.batch, OutputSigner(services)),
            errors=[view_item_error(error) for error in submission.errors],
        ),
        status_code=submission.http_status,
        headers={"Location": f"/v1/batches/{submission.batch.id}"},
    )


@get("/batches", tags=["Batches"], summary="List batches", responses=problems(422))
async def list_batches(
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
    status: Annotated[BatchStatus | None, QueryParameter(description="Only batches that stand there.")] = None,
    label: Annotated[
        str | None, QueryParameter(min_length=1, max_length=255, description="Only batches of exactly this label.")
    ] = None,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
) -> BatchList:
    """Answer the caller's batches without their jobs, the newest first.

    `next_cursor` goes on behind the page; with a filter a page may be short before the end, which is where it is null.
    """
    page = await services.ledger.list_batches(
        principal.owner, status=status, label=label, limit=limit, cursor=check_cursor(cursor)
    )
    return BatchList(data=[view_batch_summary(batch) for batch in page.items], next_cursor=page.next_cursor)


@get("/batches/{batch_id:str}", tags=["Batches"], summary="Read a batch", responses=problems(404))
async def read_batch(
    batch_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> BatchView:
    """Answer a batch with all its jobs as they are now."""
    return view_batch(await find_batch(services, principal, batch_id), OutputSigner(services))


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
    batch = await find_batch(services, principal, batch_id)
    open_ids = [job.id for job in batch.jobs if job.status not in FINAL_STATUSES]
    answers = await services.ledger.cancel(principal.reach, open_ids) if open_ids else []
    if all(answer == "finished" for answer in answers):
        raise Conflict(f"batch {batch_id} has finished; there is nothing to cancel")
    return view_batch(await find_batch(services, principal, batch_id), OutputSigner(services))


async def find_batch(services: Services, principal: Principal, batch_id: str) -> Batch:
    """Return a batch that the caller may see.

    Raises:
        NotFound: there is none, or it is another owner's.
    """
    batch = await services.ledger.read_batch(batch_id) if is_id(batch_id) else None
    if batch is None or not principal.may_see(batch.owner):
        raise no_batch(batch_id)
    return batch


@post(
    "/batches/{batch_id:str}/retry",
    status_code=200,
    tags=["Batches"],
    summary="Retry a batch",
    responses=problems(403, 404, 409),
)
async def retry_batch(
    batch_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> BatchView:
    """Queue the failed and cancelled jobs again, under the same ids and with a fresh count of errors.

    A batch that had finished begins another round: it is `queued` again, and its end is told again.
    """
    batch = await find_batch(services, principal, batch_id)
    ended_ids = [job.id for job in batch.jobs if job.status in {JobStatus.FAILED, JobStatus.CANCELLED}]
    if not ended_ids:
        raise Conflict(f"batch {batch_id} has no failed or cancelled job; there is nothing to retry")
    answers = await reopen(services, principal, ended_ids)
    if "queued" not in answers:
        raise explain_no_retry(ended_ids[0], answers[0])
    return view_batch(await find_batch(services, principal, batch_id), OutputSigner(services))


@delete("/batches/{batch_id:str}", tags=["Batches"], summary="Delete a batch", responses=problems(404, 409))
async def delete_batch(
    batch_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> None:
    """Forget a finished batch: its records and results go, and its photos where no other batch needs them."""
    answer = await services.ledger.delete_batch(principal.reach, batch_id) if is_id(batch_id) else "unknown"
    if answer == "unknown":
        raise no_batch(batch_id)
    if answer == "open":
        raise Conflict(f"batch {batch_id} has jobs that are not done; cancel it, or wait for its end")


def no_batch(batch_id: str) -> NotFound:
    """Make the error for a batch that is unknown, or another owner's."""
    return NotFound(f"there is no batch {batch_id}")


def _check_priority(wanted: str, principal: Principal) -> None:
    from_high_to_low = [priority.value for priority in Priority]
    if from_high_to_low.index(wanted) < from_high_to_low.index(principal.max_priority):
        raise Forbidden(f"this key may ask for priority {principal.max_priority} at most, not {wanted}")


def _read_key(text: str, request: BatchRequest, files: Mapping[str, ReceivedFile]) -> IdempotencyKey:
    if not (0 < len(text) <= _MAX_KEY_CHARACTERS and text.isascii() and text.isprintable()):
        raise InvalidRequest(f"the header Idempotency-Key needs 1 to {_MAX_KEY_CHARACTERS} printable ASCII characters")
    return IdempotencyKey(text, fingerprint(request, {part: file.sha256 for part, file in files.items()}))
