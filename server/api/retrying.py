"""A user's retry of one job, of a batch, or of many jobs: what is shared by their routes."""

from collections.abc import Sequence

from server.api.services import Services
from server.errors import Conflict, NotFound, QueueFull, RequestError
from server.keys import Principal
from server.ledger.api_side import ReopenAnswer
from server.submit.admission import no_room_for


class InputExpired(Conflict):
    """Raised when a job cannot be run again because its photos were removed."""

    code = "input_expired"
    title = "The photos are gone"


async def reopen(services: Services, principal: Principal, job_ids: Sequence[str]) -> list[ReopenAnswer]:
    """Queue failed and cancelled jobs again; answers are in the order of `job_ids`.

    Raises:
        QueueFull: they would be more than may be open at once; none was queued.
        TooManyOpenJobs: they would be more than the caller's key allows; none was queued.
        Forbidden: they alone are more than it allows.
    """
    most = services.settings.limits.max_open_jobs
    limited = None if principal.max_open_jobs is None else (principal.owner, principal.max_open_jobs)
    answers = await services.ledger.reopen(principal.reach, job_ids, max_open_jobs=most, limited=limited)
    if "owner_full" in answers:
        refused = [job_id for job_id, answer in zip(job_ids, answers, strict=True) if answer == "owner_full"]
        # An admin may have named others' jobs as well, which its limit is not about.
        num_own = sum(job.owner == principal.owner for job in await services.ledger.read_jobs(refused))
        raise no_room_for(num_own, principal.max_open_jobs)
    if "full" in answers:
        raise QueueFull(f"{most} jobs are open at most; try again when some are done")
    return answers


def explain_no_retry(job_id: str, answer: ReopenAnswer) -> RequestError:
    """Make the error for a job that could not be queued again."""
    match answer:
        case "expired":
            return InputExpired(f"the photos of job {job_id} were removed after their time; send them again")
        case "succeeded":
            return Conflict(f"job {job_id} has succeeded; submit its photo again for another picture")
        case "open":
            return Conflict(f"job {job_id} is not done; there is nothing to retry")
        case _:
            return NotFound(f"there is no job {job_id}")
