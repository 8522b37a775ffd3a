"""Whether a model is ready follows from what the live workers say, and from nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from server.ledger.status import (
    NO_WORKER,
    ModelStatus,
    WorkerModel,
    WorkerStatus,
    model_statuses,
    parse_worker,
    worker_fields,
)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
worker_models = st.builds(WorkerModel, ready=st.booleans(), resident=st.booleans(), reason=st.none() | texts)
workers = st.builds(
    WorkerStatus,
    id=texts,
    device=texts,
    pid=st.integers(1, 2**22),
    models=st.dictionaries(texts, worker_models, max_size=3),
    held_jobs=st.lists(texts, max_size=3).map(tuple),
)


def worker(worker_id: str, **models: WorkerModel) -> WorkerStatus:
    """Describe a worker."""
    return WorkerStatus(id=worker_id, device="cpu", pid=1, models=models)


@given(workers)
def test_a_worker_comes_back_as_it_was(status: WorkerStatus) -> None:
    """What a worker announces is read as it was written, all of it as strings in between."""
    fields = worker_fields(status)
    assert all(isinstance(value, str) for value in fields.values())
    assert parse_worker(fields) == status


def test_without_a_worker_no_model_is_ready() -> None:
    """The reason says so."""
    assert model_statuses([], ["qwen"]) == {"qwen": ModelStatus(False, NO_WORKER, 0, ())}
    silent = worker("w1", flux=WorkerModel(ready=True))
    assert model_statuses([silent], ["qwen"])["qwen"].reason == NO_WORKER


def test_one_ready_worker_is_enough() -> None:
    """A model is ready as soon as one worker would run it; another's trouble is then not shown."""
    statuses = model_statuses(
        [
            worker("w1", qwen=WorkerModel(ready=False, reason="out of memory")),
            worker("w2", qwen=WorkerModel(ready=True, resident=True)),
            worker("w3", qwen=WorkerModel(ready=True)),
        ],
        ["qwen"],
    )
    assert statuses["qwen"] == ModelStatus(True, None, 2, ("w2",))


def test_every_workers_reason_is_told() -> None:
    """Where no worker is ready, each says why, under its own name."""
    statuses = model_statuses(
        [
            worker("w1", qwen=WorkerModel(ready=False, reason="no weights")),
            worker("w2", qwen=WorkerModel(ready=False, reason="out of memory")),
        ],
        ["qwen"],
    )
    assert statuses["qwen"] == ModelStatus(False, "w1: no weights; w2: out of memory", 0, ())


@given(st.lists(workers, max_size=4), st.lists(texts, max_size=4))
def test_readiness_and_reason_exclude_each_other(live: list[WorkerStatus], model_ids: list[str]) -> None:
    """Every model that was asked for is answered: ready with at least one worker, or not ready with a reason."""
    statuses = model_statuses(iter(live), model_ids)
    assert set(statuses) == set(model_ids)
    for status in statuses.values():
        assert status.ready == (status.workers > 0) == (status.reason is None)
