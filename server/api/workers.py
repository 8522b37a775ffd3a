"""`/v1/workers`: what the operator may know of the workers, each as it last announced itself."""

from datetime import UTC, datetime

from litestar import get
from litestar.di import NamedDependency
from pydantic import Field

from server.api.errors import problems
from server.api.services import Services
from server.api.views import View
from server.errors import Forbidden
from server.keys import Principal
from server.ledger.status import WorkerModel, WorkerStatus


class ResidentView(View):
    """A model in a worker's memory."""

    model: str
    version: str | None
    weights_bytes: int | None = Field(description="As counted from its files; null where they could not be counted.")
    loaded_at: datetime | None
    last_used_at: datetime | None = Field(description="When a job of it last made a step, or it was loaded.")


class RefusedView(View):
    """A model that a worker cannot serve now; it is looked at again after a while."""

    model: str
    reason: str


class MemoryView(View):
    """Memory of a worker's device, in bytes."""

    budget_bytes: int | None = Field(description="What models are planned into; null before the start.")
    allocated_bytes: int | None = Field(description="What tensors take; null on a CPU.")
    reserved_bytes: int | None = Field(description="What the process keeps for its tensors; null on a CPU.")


class CurrentJobView(View):
    """The job on a worker's device; steps are null until the first is done."""

    id: str
    model: str
    step: int | None
    total_steps: int | None


class WorkerView(View):
    """A worker process, which drives one device."""

    id: str
    device: str
    pid: int
    announced_at: datetime | None = Field(description="All here is as it was then.")
    memory: MemoryView
    resident: list[ResidentView] = Field(description="The models in memory.")
    loading: str | None = Field(description="The model that comes into memory next.")
    leaving: list[str] = Field(description="Models that make room for it: none of their jobs are claimed any more.")
    ready: list[str] = Field(description="Models whose jobs would run here, whether in memory or not.")
    refused: list[RefusedView]
    current_job: CurrentJobView | None
    held_jobs: list[str] = Field(description="Ids of the jobs in its hand.")


class WorkerList(View):
    """All workers that announced themselves lately."""

    data: list[WorkerView]


@get("/workers", tags=["Operations"], summary="List the workers", responses=problems(403))
async def list_workers(services: NamedDependency[Services], principal: NamedDependency[Principal]) -> WorkerList:
    """Answer every live worker, by id; for the operator alone."""
    if principal.role != "admin":
        raise Forbidden("only a key of the role admin may look at the workers")
    return WorkerList(data=[_view(worker) for worker in await services.ledger.workers()])


def _view(worker: WorkerStatus) -> WorkerView:
    announced_at_ms, current = worker.announced_at_ms, worker.current_job
    return WorkerView(
        id=worker.id,
        device=worker.device,
        pid=worker.pid,
        announced_at=_before(announced_at_ms, 0.0),
        memory=MemoryView(**vars(worker.memory)),
        resident=[_resident(name, one, announced_at_ms) for name, one in worker.models.items() if one.resident],
        loading=worker.loading,
        leaving=list(worker.leaving),
        ready=[name for name, one in worker.models.items() if one.ready],
        refused=[RefusedView(model=name, reason=one.reason) for name, one in worker.models.items() if one.reason],
        current_job=current
        and CurrentJobView(id=current.job_id, model=current.model, step=current.step, total_steps=current.total_steps),
        held_jobs=list(worker.held_jobs),
    )


def _resident(name: str, one: WorkerModel, announced_at_ms: int | None) -> ResidentView:
    return ResidentView(
        model=name,
        version=one.version,
        weights_bytes=one.weights_bytes,
        loaded_at=_before(announced_at_ms, one.loaded_seconds),
        last_used_at=_before(announced_at_ms, one.idle_seconds),
    )


def _before(announced_at_ms: int | None, seconds: float | None) -> datetime | None:
    """Return what was so many seconds before the announcement: by Redis' clock, since workers' clocks differ."""
    if announced_at_ms is None or seconds is None:
        return None
    return datetime.fromtimestamp(announced_at_ms / 1000 - seconds, UTC)
