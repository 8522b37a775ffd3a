"""`/v1/jobs`: follow one job, cancel it, fetch its result."""

from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from server.api.errors import problems
from server.api.outputs import OutputSigner
from server.api.services import Services
from server.api.views import JobView, view_job
from server.errors import Conflict, NotFound
from server.jobs import Job
from server.keys import Principal
from server.submit.accept import ID_PATTERN


class NoOutput(Conflict):
    """Raised when the result of a job is asked for that has none, or not yet."""

    code = "no_output"
    title = "The job has no result"


@get("/jobs/{job_id:str}", tags=["Jobs"], summary="Read a job", responses=problems(404))
async def read_job(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> JobView:
    """Answer a job as it is now."""
    return view_job(await _find_job(services, principal, job_id), OutputSigner(services))


@get(
    "/jobs/{job_id:str}/output",
    status_code=307,
    tags=["Jobs"],
    summary="Download a result",
    response_description="The result lies at `Location`",
    responses=problems(404, 409),
)
async def redirect_to_output(
    job_id: FromPath[str], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> Response[None]:
    """Redirect to the result in the store."""
    job = await _find_job(services, principal, job_id)
    if job.output is None:
        raise NoOutput(f"job {job_id} has no result: it is {job.status}")
    url, _ = OutputSigner(services)(job, job.output)
    return Response(None, status_code=307, headers={"Location": url})


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
    answers = await services.ledger.cancel(principal.owner, [job_id]) if ID_PATTERN.fullmatch(job_id) else ["unknown"]
    if answers == ["finished"]:
        raise Conflict(f"job {job_id} has finished; there is nothing to cancel")
    return view_job(await _find_job(services, principal, job_id), OutputSigner(services))


async def _find_job(services: Services, principal: Principal, job_id: str) -> Job:
    # An id of another shape could name another key of the ledger.
    job = await services.ledger.read_job(job_id) if ID_PATTERN.fullmatch(job_id) else None
    if job is None or job.owner != principal.owner:
        raise NotFound(f"there is no job {job_id}")
    return job
