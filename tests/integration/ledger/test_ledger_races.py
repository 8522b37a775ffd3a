"""Cancels that race with claims and commits, from several connections at once: each job has one end."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.jobs import Job, JobStatus

NUM_JOBS = 40
MOST_ROUNDS = 20
ANSWERS = {"cancelled", "requested", "finished"}


def work(ledger: Any, worker_id: str) -> dict[str, str]:
    """Do jobs until none is left; returns what each commit was answered."""
    worker, answers = ledger.worker(worker_id), {}
    while isinstance(job := worker.claim(["qwen"], num_held=0), Job):
        worker.start(job.id, job.fence, on_device=True)
        upload_ids = [one.upload_id for one in job.inputs]
        answers[job.id] = ledger.commit_as(worker, job.id, job.fence, upload_ids, speeds={"run": 1.5})
    return answers


def race(ledger: Any, batch_id: str, chance: random.Random) -> set[str]:
    """Let two workers do a batch whose jobs are cancelled meanwhile, and check it; returns the answers to cancels."""
    batch = ledger.accept(batch_id, ["qwen"] * NUM_JOBS)
    job_ids = [job.id for job in batch.jobs]
    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work, ledger, f"w{number}") for number in range(2)]
        # In their own order but for some: so that cancels meet jobs that wait, that run, and that are done.
        wanted = sorted(job_ids, key=lambda job_id: job_ids.index(job_id) + chance.uniform(0, 12))
        cancels = {job_id: ledger.run(ledger.api.cancel("ana", [job_id]))[0] for job_id in wanted}
        commits = {job_id: answer for one in working for job_id, answer in one.result().items()}

    batch, told = ledger.read(batch_id), Counter(ledger.events(batch_id))
    for job in batch.jobs:
        # Whoever was told that a job is cancelled, or will be, must never see its picture.
        expected = JobStatus.SUCCEEDED if cancels[job.id] == "finished" else JobStatus.CANCELLED
        assert (job.status, job.output is not None) == (expected, expected is JobStatus.SUCCEEDED)
        assert commits.get(job.id) == {"finished": "ok", "requested": "cancelled"}.get(cancels[job.id])
    answers = Counter(cancels.values())
    assert batch.counts["succeeded"] == told["job.succeeded"] == answers["finished"]
    assert batch.counts["cancelled"] == told["job.cancelled"] == NUM_JOBS - answers["finished"]
    assert told["batch.finished"] == 1
    return set(answers)


def test_cancels_that_race_with_claims_and_commits_end_each_job_once(ledger: Any) -> None:
    """Each job ends as its cancel was answered, the worker hears the same, and both are counted once."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201
    chance = random.Random(seed)
    seen: set[str] = set()
    for number in range(MOST_ROUNDS):
        seen |= race(ledger, f"b{number}", chance)
        if seen == ANSWERS:
            return
    assert seen == ANSWERS, "the race was never close"
