"""What workers say of themselves, and what follows for each model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.ledger.records import dump

NO_WORKER = "No running worker serves this model."


@dataclass(frozen=True)
class WorkerModel:
    """One model as one worker sees it.

    Attributes:
        ready: whether a job of it would run.
        resident: whether it is in memory.
        reason: why it is not ready.
        version: as the registry has it.
        revision: of the manifest of its weights, where there is one.
        weights_sha256: likewise.
        weights_bytes: what its weights take of the device; None where they could not be counted.
        loaded_seconds: since it was loaded, when this was announced; None unless it is resident.
        idle_seconds: since a step of its jobs, likewise.
    """

    ready: bool
    resident: bool = False
    reason: str | None = None
    version: str | None = None
    revision: str | None = None
    weights_sha256: str | None = None
    weights_bytes: int | None = None
    loaded_seconds: float | None = None
    idle_seconds: float | None = None


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of a worker's device, in bytes; `None` where it is not known: before the start, and on a CPU.

    Attributes:
        budget_bytes: what models are planned into.
        allocated_bytes: what tensors take.
        reserved_bytes: what the process keeps of the device for its tensors.
    """

    budget_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class CurrentJob:
    """The job on a worker's device; steps are None until the first is done."""

    job_id: str
    model: str
    step: int | None = None
    total_steps: int | None = None


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker announces every few seconds. It is forgotten when the announcements stop.

    Attributes:
        id: of this process.
        device: as torch names it.
        pid: on its machine.
        models: all that it knows of.
        held_jobs: ids of the jobs in its hand.
        current_job: the one on the device.
        memory: of the device.
        loading: the model that comes into memory next, or is being loaded.
        leaving: those that make room for it.
        announced_at_ms: by Redis' clock; None before it was announced.
    """

    id: str
    device: str
    pid: int
    models: Mapping[str, WorkerModel] = field(default_factory=dict[str, WorkerModel])
    held_jobs: tuple[str, ...] = ()
    current_job: CurrentJob | None = None
    memory: WorkerMemory = field(default_factory=WorkerMemory)
    loading: str | None = None
    leaving: tuple[str, ...] = ()
    announced_at_ms: int | None = None


@dataclass(frozen=True)
class ModelStatus:
    """One model over all live workers."""

    ready: bool
    reason: str | None
    workers: int
    resident_on: tuple[str, ...]
    revision: str | None = None
    weights_sha256: str | None = None


def worker_fields(status: WorkerStatus) -> dict[str, str]:
    """Return the hash that a worker announces."""
    models = {model_id: vars(one) for model_id, one in status.models.items()}
    return {
        "id": status.id,
        "device": status.device,
        "pid": str(status.pid),
        "models": dump(models),
        "held_jobs": dump(status.held_jobs),
        "current_job": dump(vars(status.current_job) if status.current_job else None),
        "memory": dump(vars(status.memory)),
        "loading": status.loading or "",
        "leaving": dump(status.leaving),
    }


def parse_worker(fields: Mapping[str, str]) -> WorkerStatus:
    """Build a worker's status from its hash; one of an older version says less."""
    models: dict[str, dict[str, Any]] = json.loads(fields["models"])
    current: dict[str, Any] | None = json.loads(fields.get("current_job", "null"))
    announced_at = fields.get("announced_at")
    return WorkerStatus(
        id=fields["id"],
        device=fields["device"],
        pid=int(fields["pid"]),
        models={model_id: WorkerModel(**one) for model_id, one in models.items()},
        held_jobs=tuple(json.loads(fields["held_jobs"])),
        current_job=CurrentJob(**current) if current else None,
        memory=WorkerMemory(**json.loads(fields.get("memory", "{}"))),
        loading=fields.get("loading") or None,
        leaving=tuple(json.loads(fields.get("leaving", "[]"))),
        announced_at_ms=int(announced_at) if announced_at else None,
    )


def model_statuses(workers: Iterable[WorkerStatus], model_ids: Iterable[str]) -> dict[str, ModelStatus]:
    """Say for each model whether a job for it would run now, and why not."""
    live = list(workers)
    statuses: dict[str, ModelStatus] = {}
    for model_id in model_ids:
        seen = [(worker, worker.models[model_id]) for worker in live if model_id in worker.models]
        ready = [worker for worker, model in seen if model.ready]
        reasons = [f"{worker.id}: {model.reason}" for worker, model in seen if model.reason]
        statuses[model_id] = ModelStatus(
            ready=bool(ready),
            reason=None if ready else "; ".join(reasons) or NO_WORKER,
            workers=len(ready),
            resident_on=tuple(worker.id for worker, model in seen if model.resident),
            revision=_common(model.revision for _, model in seen if model.ready),
            weights_sha256=_common(model.weights_sha256 for _, model in seen if model.ready),
        )
    return statuses


def _common(values: Iterable[str | None]) -> str | None:
    """Give the value that all have; None where they differ, as while new weights are rolled out."""
    different = set(values)
    return different.pop() if len(different) == 1 else None
