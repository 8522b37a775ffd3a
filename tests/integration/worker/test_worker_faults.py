"""Workers die, freeze and are stopped, Redis goes away: each job is done once, and pays for its own faults only."""

import resource
import signal
import time
from collections import Counter
from dataclasses import replace

import psutil

from server.embedded import EmbeddedValkey
from server.errors import LedgerUnavailable
from server.jobs import JobStatus
from tests.chaos.proxy import Proxy

# Some three seconds on an idle machine: time enough to do harm.
LONG = {"num_inference_steps": 100, "height": 384, "width": 384}
FAULTY = "tests.integration.worker.faulty_worker"
# The watchdog waits for the rest of a job's time, and then some.
HASTY = {"RESTAGE__WORKER__JOB_TIMEOUT_SECONDS": "6", "RESTAGE__WORKER__STEP_GRACE_SECONDS": "0.5"}


def test_killed_workers_job_is_done_by_another(crew):
    """After kill -9 in mid-run the other worker claims the job within lease + sweep + 1 s, and it is committed once.

    The clock of the one is two minutes fast, that of the other as much slow: a lease that followed either would end far
    too late, or at once.
    """
    crew.ensure(0)
    fast, slow = (crew.start(module=FAULTY, CLOCK_SKEW_SECONDS=skew) for skew in ("120", "-120"))
    crew.wait_ready(2)
    slow.send_signal(signal.SIGSTOP)  # so that it is the other that claims
    batch_id, job_id = crew.submit(crew.job(crew.upload(crew.picture()), params=LONG))
    crew.step(job_id)
    slow.send_signal(signal.SIGCONT)
    victim = crew.holder(job_id)
    assert victim is fast
    assert crew.read(job_id).attempts == 1

    victim.kill_group()
    killed_at = time.monotonic()
    crew.until("the second claim", lambda: crew.read(job_id).attempts == 2)
    seconds = time.monotonic() - killed_at
    (job,) = crew.finished(batch_id).jobs

    print(f"claimed again {seconds:.2f} s after the kill")  # noqa: T201
    # Ten times what is promised, since the machine may be busy.
    assert seconds < 10 * (crew.settings.worker.lease_seconds + 0.5 + 1)
    assert (job.status, job.attempts, job.suspect) == (JobStatus.SUCCEEDED, 2, True)
    assert crew.holder(job_id) is slow
    told = crew.events(batch_id)
    assert told.count("job.succeeded") == told.count("batch.finished") == 1
    assert crew.outputs(job_id) == [f"{job_id}/2/output.png"]


def test_frozen_worker_that_wakes_up_leaves_the_job_alone(crew):
    """A worker that slept for longer than its lease finds its job lost: one commit, and no object but the result."""
    crew.ensure(2)
    batch_id, job_id = crew.submit(crew.job(crew.upload(crew.picture()), params=LONG))
    crew.step(job_id)
    frozen = crew.holder(job_id)

    frozen.send_signal(signal.SIGSTOP)
    crew.until("the second claim", lambda: crew.read(job_id).attempts == 2)
    frozen.send_signal(signal.SIGCONT)
    (job,) = crew.finished(batch_id).jobs

    crew.until("the loser's end", lambda: "job.lost" in frozen.tail(20))
    assert (job.status, job.attempts) == (JobStatus.SUCCEEDED, 2)
    assert crew.holder(job_id) is not frozen
    assert crew.events(batch_id).count("job.succeeded") == 1
    assert crew.outputs(job_id) == [f"{job_id}/2/output.png"]
    assert len(crew.alive()) == 2


def test_sigterm_lets_the_jobs_in_hand_finish(crew):
    """After SIGTERM no job is claimed, those in hand are done, the worker takes its leave and ends with status 0."""
    crew.ensure(1)
    photo = crew.upload(crew.picture())
    jobs = [replace(crew.job(photo, params=LONG | {"height": 512, "width": 512}), index=0)]
    jobs += [replace(crew.job(photo), index=index) for index in range(1, 8)]
    batch_id, first, *_ = crew.submit(*jobs)
    crew.step(first)
    worker = crew.holder(first)
    decoders = psutil.Process(worker.pid).children()
    assert decoders

    (worker_id,) = [one.id for one in crew.statuses() if one.pid == worker.pid]

    def is_holder():
        # Others that were killed before may still stand there for a while.
        keys = [f"{crew.prefix}:holders:{model}" for model in crew.registry.ids]
        return any(crew._client.zscore(key, worker_id) is not None for key in keys)

    assert is_holder()
    worker.send_signal(signal.SIGTERM)
    crew.until("no holder", lambda: not is_holder())
    assert crew.read(first).status == JobStatus.RUNNING, "it was a holder for as long as it had jobs"
    (status,) = [one for one in crew.statuses() if one.pid == worker.pid]
    resident = {model for model, one in status.models.items() if one.resident}
    assert (status.loading, set(status.leaving)) == (None, resident)
    crew.until("the end of the worker", lambda: not worker.is_running)

    assert worker.poll() == 0
    assert not any(one.is_running() for one in decoders)
    states = [(job.status, job.attempts) for job in crew.wait(crew.api.read_batch(batch_id)).jobs]
    assert states[0] == (JobStatus.SUCCEEDED, 1)
    assert set(states) == {(JobStatus.SUCCEEDED, 1), (JobStatus.QUEUED, 0)}
    assert worker.pid not in {one.pid for one in crew.statuses()}
    crew.ensure(1)
    assert crew.finished(batch_id).counts["succeeded"] == 8


def test_second_signal_gives_the_jobs_back_at_once(crew):
    """After another signal the jobs are queued again at their old places, at no cost, and the process is gone."""
    crew.ensure(1)
    photo = crew.upload(crew.picture())
    longer = {"num_inference_steps": 100, "height": 640, "width": 640}
    batch_id, *waiting = crew.submit(*(crew.job(photo, params=longer) for _ in range(4)))
    job_ids = waiting[:2]  # as many as a hand holds
    crew.until("a first step", lambda: any(crew.read(job_id).step for job_id in job_ids))
    worker = crew.holder(job_ids[0])

    worker.send_signal(signal.SIGINT)
    crew.until("the first signal", lambda: "worker.stopping" in worker.tail())
    worker.send_signal(signal.SIGTERM)
    crew.until("the end of the worker", lambda: not worker.is_running)

    assert worker.poll() == 0
    for job_id in job_ids:
        job = crew.read(job_id)
        assert (job.status, job.error) == (JobStatus.QUEUED, None)
        costs = [crew.field(job_id, name) for name in ("errors", "deaths", "device_deaths", "suspect")]
        assert costs == ["0"] * 4
    assert worker.tail(20).count("job.given_back") == 2
    assert crew._client.zrange(f"{crew.prefix}:ready:{crew.FLUX}:normal:ana", 0, -1) == waiting
    crew.wait(crew.api.cancel("ana", waiting))
    assert crew.finished(batch_id).counts["cancelled"] == 4


def test_job_that_ends_its_workers_is_poisoned_and_the_others_lose_nothing(crew):
    """Killed, crashed, hung in native code, each in the midst of a step: the job on the device pays, no other.

    It is a suspect then and runs alone; the third death ends it. Of the 50 jobs of its batch another is cancelled, and
    all the others succeed.
    """
    crew.ensure(0)
    faulty = {fault: crew.start(module=FAULTY, FAULT=fault, **HASTY) for fault in ("kill", "segfault", "native_hang")}
    crew.wait_ready(3)
    photo = crew.upload(crew.picture())
    jobs = [replace(crew.job(photo, params=LONG), prompt="fault")]
    jobs += [replace(crew.job(photo, params={"num_inference_steps": 1}), index=index) for index in range(1, 50)]
    batch_id, poison, *others = crew.submit(*jobs)
    unwanted = others.pop()
    assert crew.wait(crew.api.cancel("ana", [unwanted])) == ["cancelled"]
    for attempt in (2, 3):

        def is_on_device(attempt=attempt):
            return crew.read(poison).attempts == attempt and crew.field(poison, "on_device") == "1"

        crew.until(f"run {attempt} of the poison", is_on_device)
        jobs = crew.wait(crew.api.read_batch(batch_id)).jobs
        in_hand = [job.id for job in jobs if job.status is JobStatus.RUNNING and job.worker == jobs[0].worker]
        assert in_hand == [poison], "a suspect must run alone"

    crew.until("the end of all three", lambda: not crew.alive())
    job = crew.until("the sweep", lambda: (job := crew.read(poison)).status is JobStatus.FAILED and job)
    assert (job.error.code, job.attempts) == ("poisoned", 3)
    ends = {fault: child.poll() for fault, child in faulty.items()}
    assert ends == {"kill": -signal.SIGKILL, "segfault": -signal.SIGSEGV, "native_hang": 1}
    assert "Segmentation fault" in faulty["segfault"].tail(200)
    assert "Timeout (" in faulty["native_hang"].tail(200)
    crew.ensure(1)
    batch = crew.finished(batch_id)
    ended = {"succeeded": 48, "failed": 1, "cancelled": 1}
    assert batch.counts == {"total": 50, "queued": 0, "running": 0} | ended
    told = Counter(crew.events(batch_id))
    assert {kind: told[f"job.{kind}"] for kind in ended} == ended
    assert told["batch.finished"] == 1
    costs = [[crew.field(job_id, name) for name in ("errors", "device_deaths", "suspect")] for job_id in others]
    assert costs == [["0"] * 3] * 48
    for job in batch.jobs[1:49]:
        crew.image(job)


def test_job_that_does_not_fit_fails_and_the_worker_goes_on(crew):
    """Out of memory, a job gets the device to itself; then it fails as `out_of_memory`, and others are still done."""
    crew.ensure(1)
    photo = crew.upload(crew.picture())
    pid = crew.alive()[0].pid
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + 50 * 2**20, limits[1]))
    huge = crew.job(photo, params={"num_inference_steps": 1, "height": 1280, "width": 1280})
    batch_id, _ = crew.submit(huge)

    (job,) = crew.finished(batch_id).jobs
    resource.prlimit(pid, resource.RLIMIT_AS, limits)

    assert (job.status, job.error.code, job.attempts) == (JobStatus.FAILED, "out_of_memory", 1)
    log = crew.alive()[0].tail(200)
    assert log.count("device.full") == 1
    assert f"model={crew.QWEN}" in next(line for line in log.splitlines() if "model.evicted" in line)
    next_batch, *_ = crew.submit(crew.job(photo, crew.QWEN), crew.job(photo))
    assert crew.finished(next_batch).counts["succeeded"] == 2


def test_thread_that_dies_ends_the_process(crew):
    """Half a worker would hold jobs for ever: what no code reckons with ends all of it, and its log says why."""
    crew.ensure(1)
    (worker,) = crew.alive()
    turns = f"{crew.prefix}:turns:{crew.FLUX}:normal"
    crew._client.set(turns, "not a sorted set")
    try:
        crew.until("the end of the worker", lambda: not worker.is_running)
    finally:
        crew._client.delete(turns)

    assert worker.poll() == 4
    assert "thread.died" in worker.tail(100)
    assert "WRONGTYPE" in worker.tail(100)


def submit_if_redis_serves(workers, photo):
    try:
        return workers.submit(workers.job(photo))
    except LedgerUnavailable:
        return None


def test_redis_that_dies_or_falls_silent_in_mid_job_costs_time_only(new_workers, tmp_path, wait_until):
    """Redis is killed during a run and started again after a while: the same attempt is committed, and work goes on.

    Then it cannot be heard from the worker, for longer than the worker's calls wait and than its lease: what it sent
    meanwhile arrives late, and still each job is committed once.
    """
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    proxy = Proxy(server.ports[0]).start()
    try:
        server.wait_ready()
        workers = new_workers(server.url)
        workers.start(RESTAGE__REDIS__URL=f"redis://{proxy.address}/0")
        workers.wait_ready()
        photo = workers.upload(workers.picture())
        batch_id, job_id = workers.submit(workers.job(photo, params=LONG))
        workers.step(job_id)

        server.kill()
        time.sleep(2.5)  # longer than the ledger takes for a late sweep, shorter than a lease
        server.start()
        server.wait_ready()
        (job,) = workers.finished(batch_id).jobs

        assert (job.status, job.attempts) == (JobStatus.SUCCEEDED, 1)
        assert workers.outputs(job_id) == [f"{job_id}/1/output.png"]
        log = workers.children[0].tail(200)
        assert log.count("dependency.lost") == log.count("dependency.back") == 1
        # The test's own connections of before the kill are dead too, and each says so once.
        next_batch, _ = wait_until(lambda: submit_if_redis_serves(workers, photo))
        assert workers.finished(next_batch).counts["succeeded"] == 1

        some_time = LONG | {"num_inference_steps": 40}
        jobs = [workers.job(photo, params=some_time), *(workers.job(photo) for _ in range(3))]
        batch_id, job_id, *_ = workers.submit(*jobs)
        workers.step(job_id)
        proxy.black_hole()
        lease_seconds = workers.settings.worker.lease_seconds
        workers.until("the sweep", lambda: workers.read(job_id).status is JobStatus.QUEUED)
        time.sleep(lease_seconds / 2)
        proxy.heal()
        batch = workers.finished(batch_id)
        assert batch.counts["succeeded"] == 4
        assert workers.events(batch_id).count("job.succeeded") == 4
        for job in batch.jobs:
            workers.image(job)
            workers.until("one object", lambda job=job: workers.outputs(job.id) == [job.output.key])
        assert workers.children[0].is_running
    finally:
        proxy.close()
        server.kill()


def test_step_that_never_ends_ends_the_process(new_workers, valkey):
    """The watchdog ends a worker whose device does not answer, with a traceback; the job is then a suspect."""
    workers = new_workers(valkey.url)
    worker = workers.start(module=FAULTY, FAULT="python_hang", **HASTY)
    workers.wait_ready()
    photo = workers.upload(workers.picture())
    _, job_id = workers.submit(replace(workers.job(photo, params=LONG), prompt="fault"))
    workers.step(job_id)
    began = time.monotonic()
    workers.until("the end of the worker", lambda: not worker.is_running)

    assert time.monotonic() - began < 10 * (6 + 0.5)  # what HASTY grants
    assert worker.poll() == 1
    assert "Timeout (0:00:0" in worker.tail(200)
    assert "in advance" in worker.tail(200)
    job = workers.until("the sweep", lambda: (job := workers.read(job_id)).status is JobStatus.QUEUED and job)
    assert (job.suspect, job.attempts) == (True, 1)
