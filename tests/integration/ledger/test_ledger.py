"""Plain stories of batches, jobs, uploads and workers in the ledger."""

from dataclasses import replace
from typing import Any

import pytest

from server.errors import ConfigError
from server.jobs import BatchStatus, Job, JobError, JobStatus
from server.ledger.api_side import Idempotency
from server.ledger.status import NO_WORKER, WorkerModel, WorkerStatus
from server.ledger.worker_side import Alone, Backlog, HeldJob


def kill_on_device(ledger: Any, model: str = "qwen") -> Job:
    """Let a worker claim the best job, put it on its device, and die."""
    job = ledger.claim([model])
    ledger.worker().start(job.id, job.fence, on_device=True)
    ledger.sweep_for_a_lease()
    return job


def reopen(ledger: Any, job_ids: list[str], *, owner: str = "ana", max_open_jobs: int = 99) -> list[str]:
    """Ask for another round of some jobs."""
    return ledger.run(ledger.api.reopen(owner, job_ids, max_open_jobs=max_open_jobs))


def test_a_job_goes_from_submission_to_result(ledger: Any) -> None:
    """Each state, time and counter of a batch of one is right at each step of its life."""
    ledger.accept("b1", ["qwen"], name="hall.jpg", metadata={"sku": "7"})
    batch = ledger.read("b1")
    assert (batch.status, batch.counts["queued"], batch.jobs[0].queue_position) == (BatchStatus.QUEUED, 1, 1)
    assert batch.started_at_ms is None

    worker = ledger.worker()
    job = ledger.claim(["qwen"])
    assert (job.name, job.metadata, job.attempts, job.fence) == ("hall.jpg", {"sku": "7"}, 1, 1)
    assert worker.start(job.id, job.fence, on_device=True) == "ok"
    assert worker.renew([HeldJob(job.id, job.fence, step=2, total_steps=8)]) == ["ok"]
    running = ledger.job(job.id)
    assert (running.status, running.worker) == (JobStatus.RUNNING, "w1")
    assert (running.step, running.total_steps, running.queue_position) == (2, 8, None)
    assert ledger.read("b1").status == BatchStatus.RUNNING

    assert ledger.commit(job) == "ok"
    batch = ledger.read("b1")
    done = batch.jobs[0]
    assert (batch.status, batch.counts["succeeded"], batch.counts["total"]) == (BatchStatus.FINISHED, 1, 1)
    assert done.output is not None
    assert done.output.key == f"{job.id}/1/output.webp"
    assert (done.params, done.timings, done.error) == ({"seed": 7}, {"run": 1.5}, None)
    assert done.created_at_ms <= done.started_at_ms <= done.finished_at_ms == batch.finished_at_ms
    assert batch.expires_at_ms == batch.finished_at_ms + 950_000
    assert ledger.events("b1") == ["job.started", "job.succeeded", "batch.finished"]


def test_a_result_is_committed_once(ledger: Any) -> None:
    """The same hand may commit again and hears the same; a stale hand loses and changes nothing."""
    ledger.accept("b1", ["qwen"])
    stale = ledger.claim(["qwen"])
    ledger.sweep_for_a_lease()
    job = ledger.claim(["qwen"], "w2")
    assert (job.id, job.fence, job.attempts) == (stale.id, 2, 2)

    assert ledger.commit(stale) == "lost"
    assert ledger.commit(job) == "ok"
    assert ledger.commit(job) == "ok"
    assert ledger.commit(stale) == "lost"
    assert ledger.job(job.id).output.key == f"{job.id}/2/output.webp"
    assert ledger.events("b1").count("job.succeeded") == 1


def test_an_idempotency_key_gives_the_first_answer_again(ledger: Any) -> None:
    """The same key and body replay the first answer, another body is a conflict, another owner is not concerned."""
    first = Idempotency(key="order 66 ✓", body_sha256="aa", answer='{"batch":"b1"}', ttl_seconds=1250)
    again = Idempotency(key="order 66 ✓", body_sha256="aa", answer='{"batch":"b2"}', ttl_seconds=1250)
    other = Idempotency(key="order 66 ✓", body_sha256="bb", answer="{}", ttl_seconds=1250)
    batches = [ledger.batch(f"b{number}", ["qwen"]) for number in range(1, 4)]
    batches.append(ledger.batch("b4", ["qwen"], owner="bo"))
    for batch in batches:
        ledger.announce_uploads(batch)

    assert ledger.submit(batches[0], idempotency=first).kind == "accepted"
    replayed = ledger.submit(batches[1], idempotency=again)
    assert (replayed.kind, replayed.text) == ("replayed", '{"batch":"b1"}')
    assert ledger.submit(batches[2], idempotency=other).kind == "conflict"
    assert ledger.submit(batches[3], idempotency=first).kind == "accepted"
    assert ledger.run(ledger.api.find_idempotent("ana", "order 66 ✓")) == ("aa", '{"batch":"b1"}')
    assert ledger.run(ledger.api.find_idempotent("cy", "order 66 ✓")) is None
    assert ledger.run(ledger.api.read_batch("b2")) is None


def test_nothing_of_a_refused_batch_is_kept(ledger: Any) -> None:
    """A foreign or unknown upload, or a full queue, refuses the whole batch."""
    theirs = ledger.accept("b1", ["qwen"], owner="bo").jobs[0].inputs[0].upload_id
    batch = ledger.batch("b2", ["qwen", "qwen"])
    ledger.announce_uploads(batch)
    keys = sorted(ledger.client.keys())

    mine = batch.jobs[0].inputs[0].upload_id
    foreign = ledger.submit(ledger.with_uploads(batch, [[mine], [theirs]]))
    assert (foreign.kind, foreign.text) == ("missing_upload", theirs)
    assert ledger.submit(ledger.with_uploads(batch, [[mine], ["u-none"]])).text == "u-none"
    assert ledger.submit(batch, max_open_jobs=2).kind == "full"
    assert sorted(ledger.client.keys()) == keys
    assert ledger.submit(batch, max_open_jobs=3).kind == "accepted"


def test_a_running_job_hears_of_its_cancellation(ledger: Any) -> None:
    """Every call of the holder says `cancelled`, the control stream says it at once, and a late result is nobody's."""
    ledger.accept("b1", ["qwen", "qwen"])
    worker = ledger.worker()
    position = worker.control_position()
    job = ledger.claim(["qwen"])

    assert ledger.run(ledger.api.cancel("bo", [job.id])) == ["unknown"]
    assert ledger.run(ledger.api.cancel("ana", [job.id, "b1-1", "j-none"])) == ["requested", "cancelled", "unknown"]
    new_position, messages = worker.read_control(position, block_seconds=1)
    assert messages == [{"type": "cancel", "job_id": job.id}]
    assert worker.control_position() == new_position
    assert worker.read_control(new_position, block_seconds=0.01) == (new_position, [])

    assert worker.start(job.id, job.fence, on_device=True) == "cancelled"
    assert worker.renew([HeldJob(job.id, job.fence)]) == ["cancelled"]
    assert ledger.commit(job) == "cancelled"
    assert worker.fail(job.id, job.fence, code="internal_error", detail="", timings={}) == "cancelled"
    done = ledger.job(job.id)
    assert (done.status, done.output, done.error) == (JobStatus.CANCELLED, None, None)
    assert ledger.run(ledger.api.cancel("ana", [job.id])) == ["finished"]


def test_a_cancelled_job_whose_worker_died_is_not_run_again(ledger: Any) -> None:
    """The sweep cancels it instead of queueing it."""
    ledger.accept("b1", ["qwen"])
    job = ledger.claim(["qwen"])
    ledger.run(ledger.api.cancel("ana", [job.id]))
    ledger.sweep_for_a_lease()
    assert ledger.job(job.id).status == JobStatus.CANCELLED
    assert ledger.worker().claim(["qwen"], num_held=0) is None


def test_errors_of_a_job_are_bounded(ledger: Any) -> None:
    """A job's own errors delay it, are shown while it waits, and fail it at the limit."""
    ledger.accept("b1", ["qwen"])
    worker = ledger.worker()
    trouble = {"delay_seconds": 250, "counts": True, "max_errors": 2, "code": "run_failed", "detail": "NaN"}
    job = ledger.claim(["qwen"])
    assert worker.retry(job.id, job.fence, **trouble) == "ok"
    waiting = ledger.job(job.id)
    assert (waiting.status, waiting.error) == (JobStatus.QUEUED, JobError("run_failed", "NaN"))
    assert (waiting.worker, waiting.queue_position) == (None, None)
    assert worker.claim(["qwen"], num_held=0) is None

    ledger.pass_time(300)
    assert ledger.sweep().due == 1
    job = ledger.claim(["qwen"])
    assert (job.attempts, job.error) == (2, None)
    assert worker.retry(job.id, job.fence, **trouble) == "failed"
    assert ledger.job(job.id).error == JobError("run_failed", "NaN")
    assert ledger.read("b1").counts["failed"] == 1

    # The user's retry begins with none spent.
    assert ledger.run(ledger.api.reopen("ana", [job.id], max_open_jobs=9)) == ["queued"]
    job = ledger.claim(["qwen"])
    assert (job.attempts, worker.retry(job.id, job.fence, **trouble)) == (3, "ok")


def test_a_job_is_failed_by_its_holder_only(ledger: Any) -> None:
    """The holder may say it twice; whoever lost the job before changes nothing and hears so."""
    ledger.accept("b1", ["qwen"])
    stale = ledger.claim(["qwen"])
    ledger.sweep_for_a_lease()
    job, worker = ledger.claim(["qwen"], "w2"), ledger.worker()
    assert worker.fail(stale.id, stale.fence, code="x", detail="stale", timings={}) == "lost"
    for _ in range(2):
        assert worker.fail(job.id, job.fence, code="invalid_input", detail="truncated", timings={}) == "ok"
    assert worker.fail(stale.id, stale.fence, code="x", detail="stale", timings={}) == "lost"
    assert worker.retry(job.id, job.fence, delay_seconds=0, counts=False, max_errors=1, code="x", detail="") == "lost"
    assert ledger.job(job.id).error == JobError("invalid_input", "truncated")
    assert ledger.events("b1").count("job.failed") == 1


def test_giving_a_job_back_for_nobodys_fault_costs_nothing(ledger: Any) -> None:
    """A shutdown or an absent dependency spends no error, and the job keeps its place before younger ones."""
    ledger.accept("b1", ["qwen"])
    ledger.accept("b2", ["qwen"])
    worker = ledger.worker()
    for attempt in range(1, 6):
        job = ledger.claim(["qwen"])
        assert (job.id, job.attempts) == ("b1-0", attempt)
        given_back = worker.retry(
            job.id, job.fence, delay_seconds=0, counts=False, max_errors=1, code="shutdown", detail="stopping"
        )
        assert given_back == "ok"
    assert ledger.job("b1-0").error is None


def test_a_suspect_runs_alone_and_is_poisoned_at_the_third_death(ledger: Any) -> None:
    """A job that was on the device when its worker died comes back alone, twice, and then fails."""
    ledger.accept("b1", ["qwen"])
    assert not ledger.job("b1-0").suspect
    for deaths in (1, 2):
        job = kill_on_device(ledger)
        assert (job.attempts, ledger.job(job.id).suspect) == (deaths, True)
        assert ledger.worker().claim(["qwen"], num_held=1) == Alone()
    job = kill_on_device(ledger)
    failed = ledger.job(job.id)
    assert (failed.status, failed.attempts) == (JobStatus.FAILED, 3)
    assert failed.error is not None
    assert failed.error.code == "poisoned"
    assert ledger.events("b1")[-2:] == ["job.failed", "batch.finished"]


def test_only_a_death_on_the_device_makes_a_suspect(ledger: Any) -> None:
    """Staged and set-aside jobs survive any number of deaths of their workers."""
    ledger.accept("b1", ["qwen"])
    for attempt in range(1, 6):
        job = ledger.claim(["qwen"])
        assert (job.attempts, job.suspect) == (attempt, False)
        ledger.worker().start(job.id, job.fence, on_device=True)
        ledger.worker().start(job.id, job.fence, on_device=False)
        ledger.sweep_for_a_lease()


def test_a_users_retry_opens_a_new_round(ledger: Any) -> None:
    """Failed and cancelled jobs are queued with a fresh budget; the batch finishes once more; successes stay."""
    ledger.accept("b1", ["qwen", "qwen", "qwen"])
    worker = ledger.worker()
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    bad = ledger.claim(["qwen"])
    assert worker.fail(bad.id, bad.fence, code="invalid_input", detail="truncated", timings={"fetch": 0.1}) == "ok"
    assert reopen(ledger, ["b1-1"]) == ["queued"]
    assert ledger.read("b1").round == 1  # it had not finished yet
    assert ledger.run(ledger.api.cancel("ana", ["b1-1", "b1-2"])) == ["cancelled", "cancelled"]
    assert ledger.read("b1").status == BatchStatus.FINISHED

    ids = ["b1-0", "b1-1", "b1-2"]
    assert reopen(ledger, ids, owner="bo") == ["unknown"] * 3
    assert reopen(ledger, [*ids, "j-none", "b1-2"]) == ["succeeded", "queued", "queued", "unknown", "open"]
    batch = ledger.read("b1")
    assert (batch.round, batch.status, batch.finished_at_ms, batch.expires_at_ms) == (2, BatchStatus.QUEUED, None, None)
    assert (batch.jobs[1].error, batch.jobs[1].attempts, batch.jobs[1].queue_seconds) == (None, 1, None)
    assert (batch.jobs[1].finished_at_ms, batch.jobs[1].status) == (None, JobStatus.QUEUED)
    for _ in range(2):
        assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    assert ledger.events("b1").count("batch.finished") == 2
    assert ledger.read("b1").counts["succeeded"] == 3


def test_jobs_of_many_batches_are_retried_together(ledger: Any) -> None:
    """Each batch begins a round of its own where it had finished; an admin reaches those of all owners."""
    for batch_id, owner in {"b1": "ana", "b2": "ana", "b3": "bo"}.items():
        ledger.accept(batch_id, ["qwen", "qwen"], owner=owner)
        assert ledger.run(ledger.api.cancel(owner, [f"{batch_id}-0"])) == ["cancelled"]
    assert ledger.run(ledger.api.cancel("", ["b1-1", "b3-1"])) == ["cancelled"] * 2
    assert reopen(ledger, ["b1-0", "b2-0", "b3-0"]) == ["queued", "queued", "unknown"]
    assert [ledger.read(batch_id).round for batch_id in ("b1", "b2", "b3")] == [2, 1, 1]
    assert reopen(ledger, ["b3-0", "b3-1"], owner="") == ["queued", "queued"]
    assert ledger.read("b3").round == 2


def test_a_retry_needs_room_in_the_queue(ledger: Any) -> None:
    """All of the jobs that could be retried fit, or none is queued; a job that is named twice counts once."""
    ledger.accept("b1", ["qwen"] * 3)
    ledger.run(ledger.api.cancel("ana", ["b1-0", "b1-1"]))
    assert reopen(ledger, ["b1-0", "b1-1", "b1-2"], max_open_jobs=2) == ["full", "full", "open"]
    assert ledger.read("b1").counts["cancelled"] == 2
    assert reopen(ledger, ["b1-0", "b1-0"], max_open_jobs=2) == ["queued", "open"]
    assert reopen(ledger, ["b1-1"], max_open_jobs=3) == ["queued"]


def test_renewing_revives_a_lease_that_nobody_took(ledger: Any) -> None:
    """After a long silence the holder goes on, and the sweep leaves its job alone."""
    ledger.accept("b1", ["qwen"])
    job = ledger.claim(["qwen"])
    ledger.sweep()
    ledger.pass_time(5000)
    assert ledger.worker().renew([HeldJob(job.id, job.fence)]) == ["ok"]
    report = ledger.sweep()
    assert (report.requeued, report.waiting) == (0, False)
    assert ledger.commit(job) == "ok"


def test_after_a_pause_of_the_sweeps_holders_get_one_lease_time(ledger: Any) -> None:
    """Whoever could not renew while Redis was away may do so before the job is taken back."""
    ledger.accept("b1", ["qwen"])
    ledger.claim(["qwen"])
    ledger.sweep()
    ledger.pass_time(1000)
    for _ in range(6):
        report = ledger.sweep()
        assert (report.requeued, report.waiting) == (0, True)
        ledger.pass_time(100)
    assert ledger.sweep().requeued == 0  # 600 s of 650
    ledger.pass_time(100)
    assert ledger.sweep().requeued == 1


def test_a_silent_bell_rings_again(ledger: Any) -> None:
    """Where jobs are ready and no bell waits, the sweep rings once, for the models it is asked about."""
    ledger.accept("b1", ["qwen", "flux"])
    queue = f"dramatiq:{ledger.prefix}.qwen"
    assert ledger.sweep(["qwen", "flux"]).rung == 0
    ledger.client.delete(queue, f"{queue}.msgs")
    assert ledger.sweep(["flux"]).rung == 0
    assert ledger.sweep(["qwen", "flux"]).rung == 1
    assert ledger.sweep(["qwen", "flux"]).rung == 0
    assert ledger.client.llen(queue) == 1


def test_backlog_counts_what_waits(ledger: Any) -> None:
    """Ready jobs of all owners and priorities are counted for each model; running and delayed ones are not."""
    ledger.accept("b1", ["qwen", "qwen"])
    ledger.accept("b2", ["qwen"], owner="bo", priority="high")
    ledger.claim(["qwen"])
    backlog = ledger.worker().backlog(["qwen", "flux"]).models
    assert backlog["qwen"].num_ready == 2
    assert 0 <= backlog["qwen"].oldest_age_seconds < 60
    assert backlog["flux"] == Backlog(num_ready=0, oldest_age_seconds=0)
    assert ledger.worker().backlog([]).models == {}


def test_models_are_ready_where_a_live_worker_says_so(ledger: Any) -> None:
    """An announcement holds for a while, is taken back by `leave`, and says why a model is not ready."""
    worker = ledger.worker("w1")
    models = {"qwen": WorkerModel(ready=True, resident=True), "flux": WorkerModel(ready=False, reason="no weights")}
    status = WorkerStatus("w1", "cuda:0", 7, models, ("b1-0",))
    worker.announce(status)
    [announced] = ledger.run(ledger.api.workers())
    assert abs((announced.announced_at_ms or 0) / 1000 - ledger.client.time()[0]) < 60
    assert replace(announced, announced_at_ms=None) == status
    statuses = ledger.run(ledger.api.model_statuses(["qwen", "flux", "other"]))
    assert (statuses["qwen"].ready, statuses["qwen"].workers, statuses["qwen"].resident_on) == (True, 1, ("w1",))
    assert (statuses["flux"].ready, statuses["flux"].reason) == (False, "w1: no weights")
    assert statuses["other"].reason == NO_WORKER
    worker.leave()
    assert ledger.run(ledger.api.workers()) == []
    worker.announce(status)
    ledger.pass_time(31)
    assert ledger.run(ledger.api.workers()) == []
    # That somebody was ready for a model is known for longer.
    assert ledger.keys() == ["schema", "served:qwen"]


def test_workers_that_died_are_forgotten(ledger: Any) -> None:
    """A crash loop leaves no trail of worker ids while another worker lives."""
    for number in range(20):
        ledger.worker(f"crashed-{number}").announce(WorkerStatus(f"crashed-{number}", "cpu", number))
        ledger.client.delete(f"{ledger.prefix}:worker:crashed-{number}")
    ledger.worker("w1").announce(WorkerStatus("w1", "cpu", 1))
    assert ledger.client.smembers(f"{ledger.prefix}:workers") == {"w1"}


def test_another_schema_is_refused(ledger: Any) -> None:
    """A ledger of another version is not touched, and the message names both versions."""
    ledger.run(ledger.api.check_schema())
    ledger.client.set(f"{ledger.prefix}:schema", "0")
    with pytest.raises(ConfigError, match="has schema 0; this version reads 2"):
        ledger.run(ledger.api.check_schema())
