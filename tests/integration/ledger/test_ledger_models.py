"""Jobs and the models they were accepted for: which weights, and what becomes of jobs whose model is taken away."""

from typing import Any

import pytest

from server.jobs import JobStatus
from server.ledger.status import WorkerModel, WorkerStatus

GRACE_SECONDS = 250
SHA = "a" * 64


def announce(ledger: Any, worker_id: str = "w1", model: str = "qwen", **fields: Any) -> None:
    """Let a worker say of one model what it finds."""
    known = {"ready": True, "version": "1", "revision": "c" * 40, "weights_sha256": SHA} | fields
    ledger.worker(worker_id).announce(WorkerStatus(worker_id, "cpu", 1, {model: WorkerModel(**known)}))


def fail_removed(ledger: Any, *models: str) -> int:
    """Look once for jobs whose model is gone, with `models` in the registry."""
    return ledger.run(ledger.api.fail_removed(models, grace_seconds=GRACE_SECONDS))


def test_accepted_job_names_the_weights_that_workers_have(ledger: Any) -> None:
    """A job says which weights it was accepted for; those of another model or version are none of its business."""
    announce(ledger)
    announce(ledger, "w2", "kontext", version="2")
    ledger.accept("b1", ["qwen", "kontext", "klein"])
    assert [job.weights_sha256 for job in ledger.read("b1").jobs] == [SHA, None, None]


def test_weights_are_known_while_all_workers_are_away(ledger: Any) -> None:
    """What a worker said of weights outlives it, so that a job accepted meanwhile is for these too."""
    announce(ledger)
    ledger.worker().leave()
    ledger.accept("b1", ["qwen"])
    assert ledger.read("b1").jobs[0].weights_sha256 == SHA


@pytest.mark.parametrize("fields", [{"ready": False, "reason": "damaged"}, {"weights_sha256": None}])
def test_weights_that_nobody_can_tell_are_left_open(ledger: Any, fields: dict[str, Any]) -> None:
    """A worker that cannot load a model, or finds no manifest, says nothing about its weights."""
    announce(ledger, **fields)
    ledger.accept("b1", ["qwen"])
    assert ledger.read("b1").jobs[0].weights_sha256 is None


def test_result_names_the_weights_it_was_made_with(ledger: Any) -> None:
    """The commit writes down what the job ran on; where nobody knows, what it was accepted for stays."""
    announce(ledger)
    ledger.accept("b1", ["qwen", "qwen"])
    first, second = ledger.claim(["qwen"]), ledger.claim(["qwen"])
    ledger.commit(first, weights_sha256="b" * 64)
    ledger.commit(second)
    assert [job.weights_sha256 for job in ledger.read("b1").jobs] == ["b" * 64, SHA]


def test_jobs_of_a_removed_model_fail_after_a_while(ledger: Any) -> None:
    """Once nobody knows a model for long enough, what waits for it fails, clearly; nothing else does."""
    ledger.accept("b1", ["qwen", "qwen", "kontext"])
    ledger.accept("b2", ["qwen"], owner="bob", priority="high")
    assert fail_removed(ledger, "kontext") == 0
    ledger.pass_time(200)
    assert fail_removed(ledger, "kontext") == 0
    ledger.pass_time(100)
    assert fail_removed(ledger, "kontext") == 3
    jobs = [*ledger.read("b1").jobs, *ledger.read("b2").jobs]
    assert [job.status for job in jobs] == [JobStatus.FAILED, JobStatus.FAILED, JobStatus.QUEUED, JobStatus.FAILED]
    assert jobs[0].error.code == "model_removed"
    assert jobs[0].error.detail == "The model qwen was taken away before the job could run."
    assert ledger.events("b2") == ["job.failed", "batch.finished"]
    assert ledger.worker().claim(["qwen"], num_held=0) is None
    assert fail_removed(ledger, "kontext") == 0


def test_a_model_that_somebody_knows_is_not_removed(ledger: Any) -> None:
    """A registry or a live worker that knows the model, ready or not, keeps its jobs; the time then starts anew."""
    ledger.accept("b1", ["qwen"])
    for knows in (lambda: fail_removed(ledger, "qwen"), lambda: announce(ledger, ready=False)):
        fail_removed(ledger)
        ledger.pass_time(200)
        knows()
        assert fail_removed(ledger) == 0
        ledger.worker().leave()
        ledger.pass_time(100)
        assert fail_removed(ledger) == 0
    ledger.pass_time(300)
    assert fail_removed(ledger) == 1


def test_a_job_that_runs_is_left_to_its_worker(ledger: Any) -> None:
    """Only what waits is failed: a running job ends as its worker says, and one that is given back fails then."""
    ledger.accept("b1", ["qwen", "qwen"])
    running, other = ledger.claim(["qwen"]), ledger.claim(["qwen"])
    fail_removed(ledger)
    ledger.pass_time(300)
    assert fail_removed(ledger) == 0
    assert ledger.commit(running) == "ok"
    options = {"delay_seconds": 0, "counts": False, "max_errors": 3, "code": "worker_stopped", "detail": ""}
    ledger.worker().retry(other.id, other.fence, **options)
    assert fail_removed(ledger) == 1


def test_a_removed_model_that_comes_back_takes_retried_jobs(ledger: Any) -> None:
    """Jobs that failed with their model can be queued again, and run once it is served."""
    ledger.accept("b1", ["qwen"])
    fail_removed(ledger)
    ledger.pass_time(300)
    assert fail_removed(ledger) == 1
    announce(ledger)
    fail_removed(ledger)
    ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=9))
    assert fail_removed(ledger, "qwen") == 0
    assert ledger.claim(["qwen"]).id == "b1-0"
