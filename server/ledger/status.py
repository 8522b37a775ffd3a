"""What workers say of themselves, and what follows for each model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from server.ledger.records import dump

NO_WORKER = "No running worker serves this model."


@dataclass(frozen=True)
class WorkerModel:
    """One model as one worker sees it; `reason` says why it is not ready.

    `revision` and `weights_sha256` are those of the manifest of its weights, where there is one.
    """

    ready: bool
    resident: bool = False
    reason: str | None = None
    version: str | None = None
    revision: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker announces every few seconds. It is forgotten when the announcements stop."""

    id: str
    device: str
    pid: int
    models: Mapping[str, WorkerModel] = field(default_factory=dict[str, WorkerModel])
    held_jobs: tuple[str, ...] = ()


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
    }


def parse_worker(fields: Mapping[str, str]) -> WorkerStatus:
    """Build a worker's status from its hash."""
    models: dict[str, dict[str, bool | str | None]] = json.loads(fields["models"])
    return WorkerStatus(
        id=fields["id"],
        device=fields["device"],
        pid=int(fields["pid"]),
        models={model_id: WorkerModel(**one) for model_id, one in models.items()},  # pyright: ignore[reportArgumentType]
        held_jobs=tuple(json.loads(fields["held_jobs"])),
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
