"""`/v1/jobs`: read jobs, cancel one, retry one or many, fetch a result."""

from typing import Annotated

from litestar import MediaType, Response, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody, QueryParameter
from pydantic import Field

from server.api.errors import problems
from server.api.outputs import OutputSigner
from server.api.pages import PageCursor, PageLimit, check_cursor
from server.api.retrying import explain_no_retry, reopen
from server.api.services import Services
from server.api.views import ItemErrorView, JobList, JobView, View, view_item_error, view_job
from server.errors import Conflict, ItemError, NotFound, NothingAccepted, json_pointer
from server.jobs import Job, JobStatus
from server.keys import Principal
from server.ledger.api_side import ReopenAnswer
from server.submit.accept import is_id
from server.submit.request import RequestModel

_MOST_RETRIES = 100


class NoOutput(Conflict):
    """Raised when the result of a job is asked for that has none, or not yet."""

    code = "no_output"
    title = "The job has no result"


class OutputExpired(NoOutput):
    """Raised when the result of a job is asked for that had one, which was removed after its time."""

    code = "output_expired"
    title = "The result is gone"
    http_status = 410


class RetryRequest(RequestModel):
    """Jobs to be queued again, of any batches."""

    ids: Annotated[list[str], Field(min_length=1, max_length=_MOST_RETRIES, description="Of failed or cancelled jobs.")]


class RetryView(View):
    """The jobs that were queued again, and why the others were not; `index` is the place in `ids`."""

    data: list[JobView]
    errors: list[ItemErrorView]


@get("/jobs", tags=["Jobs"], summary="List jobs", responses=problems(422))
async def list_jobs(
    services: NamedDependency[Services],
    principal: NamedDependency[Principal],
    status: Annotated[JobStatus | None, QueryParameter(description="Only jobs that stand there.")] = None,
    model: Annotated[
        str | None, QueryParameter(min_length=1, max_length=64, description="Only jobs of this model.")
    ] = None,
    limit: PageLimit = 20,
    cursor: PageCursor = None,
) -> JobList:
    """Answer the caller's jobs across batches, those of the newest batch first; an admin sees everybody's.

    `next_cursor` goes on behind the page; with a filter a page may be short before the end, which is where it is null.
    """
    page = await services.ledger.list_jobs(
        principal.reach or None, status=status, model=model, limit=limit, cursor=check_cursor(cursor)
    )
    sign = OutputSigner(services)
    return JobList(data=[view_job(job, sign) for job in page.items], next_cursor=page.next_cursor)


@get("/jobs/{job_id:str}", tags=["Jobs"], summary="Read a job", responses=problems(404))
async def read_job(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> JobView:
    """Answer a job as it is now."""
    return view_job(await _find_job(services, principal, job_id), OutputSigner(services))


@get(
    "/jobs/{job_id:str}/output",
    status_code=307,
    media_type=MediaType.TEXT,
    tags=["Jobs"],
    summary="Download a result",
    response_description="The result lies at `Location`",
    responses=problems(404, 409, 410),
)
async def redirect_to_output(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> Response[bytes]:
    """Redirect to the result in the store."""
    job = await _find_job(services, principal, job_id)
    if job.output is None and job.status == JobStatus.SUCCEEDED:
        raise OutputExpired(f"the result of job {job_id} was removed after its time")
    if job.output is None:
        raise NoOutput(f"job {job_id} has no result: it is {job.status}")
    url, _ = OutputSigner(services)(job, job.output)
    return Response(b"", status_code=307, media_type=MediaType.TEXT, headers={"Location": url})


@post(
    "/jobs/{job_id:str}/cancel",
    status_code=200,
    tags=["Jobs"],
    summary="Cancel a job",
    responses=problems(404, 409),
)
async def cancel_job(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> JobView:
    """Cancel a job: at once while it is queued, before its next step while it runs."""
    answers = await services.ledger.cancel(principal.reach, [job_id]) if is_id(job_id) else ["unknown"]
    if answers == ["finished"]:
        raise Conflict(f"job {job_id} has finished; there is nothing to cancel")
    return view_job(await _find_job(services, principal, job_id), OutputSigner(services))


@post(
    "/jobs/{job_id:str}/retry",
    status_code=200,
    tags=["Jobs"],
    summary="Retry a job",
    responses=problems(403, 404, 409),
)
async def retry_job(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> JobView:
    """Queue a failed or cancelled job again, under the same id and with a fresh count of errors."""
    [answer] = await _reopen_known(services, principal, [job_id])
    if answer != "queued":
        raise explain_no_retry(job_id, answer)
    return view_job(await _find_job(services, principal, job_id), OutputSigner(services))


@post(
    "/jobs/retry",
    status_code=200,
    tags=["Jobs"],
    summary="Retry many jobs",
    response_description="Every job was queued again",
    responses={
        207: ResponseSpec(RetryView, description="Some jobs were queued again", generate_examples=False),
        **problems(403, 413, 415, 422),
    },
)
async def retry_jobs(
    data: JSONBody[RetryRequest], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> Response[RetryView]:
    """Queue failed and cancelled jobs of any batches again; an admin may name everybody's.

    200 when all were queued again, 207 when some were, 422 when none was.
    """
    answers = dict(enumerate(await _reopen_known(services, principal, data.ids)))
    queued = list(dict.fromkeys(data.ids[index] for index, answer in answers.items() if answer == "queued"))
    refused = {
        index: explain_no_retry(data.ids[index], answer) for index, answer in answers.items() if answer != "queued"
    }
    errors = [
        ItemError(index, json_pointer(("ids", index)), error.code, error.detail) for index, error in refused.items()
    ]
    if not queued:
        detail = f"none of the {len(errors)} job(s) can be retried; see errors"
        raise NothingAccepted(detail, tuple(errors))
    jobs = await services.ledger.read_jobs(queued)
    sign = OutputSigner(services)
    view = RetryView(data=[view_job(job, sign) for job in jobs], errors=[view_item_error(error) for error in errors])
    return Response(view, status_code=207 if errors else 200)


async def _reopen_known(services: Services, principal: Principal, job_ids: list[str]) -> list[ReopenAnswer]:
    # One that stands there twice is one job.
    known = [job_id for job_id in dict.fromkeys(job_ids) if is_id(job_id)]
    answers = dict(zip(known, await reopen(services, principal, known) if known else [], strict=True))
    return [answers.get(job_id, "unknown") for job_id in job_ids]


async def _find_job(services: Services, principal: Principal, job_id: str) -> Job:
    job = await services.ledger.read_job(job_id) if is_id(job_id) else None
    if job is None or not principal.may_see(job.owner):
        raise NotFound(f"there is no job {job_id}")
    return job
