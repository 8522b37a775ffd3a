"""The stage threads in this process, on a real ledger and a real store: results that come too late or must wait."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image

from server.embedded import EmbeddedStore
from server.jobs import Job, JobStatus
from server.ledger.worker_side import WorkerLedger, connect
from server.store import Store


class RunnerKit:
    """A runner with two stage threads, and a hand for its jobs."""

    def __init__(self, workers, store):
        from server.worker.hand import Hand
        from server.worker.patience import Outage
        from server.worker.run_job import JobRunner

        self.workers = workers
        self.bugs = []
        self.ledger = WorkerLedger(
            connect(workers.settings.redis), worker_id="runner-test", key_prefix=workers.prefix, lease_seconds=60
        )
        self.hand = Hand(on_release=lambda: None)
        self.pool = ThreadPoolExecutor(2)
        self.runner = JobRunner(
            registry=workers.registry,
            store=store,
            ledger=self.ledger,
            hand=self.hand,
            store_outage=Outage("store"),
            ledger_outage=Outage("redis"),
            settings=workers.settings.worker,
            max_image_pixels=10**8,
            pool=self.pool,
            on_bug=self.bugs.append,
        )
        self.staged = queue.SimpleQueue()

    def claim(self, **recorded):
        """Have a job accepted and claimed."""
        photo = self.workers.upload(self.workers.picture())
        self.workers.submit(self.workers.job(replace(photo, **recorded)))
        job = self.ledger.claim(self.workers.registry.ids, num_held=0)
        assert isinstance(job, Job)
        return self.hand.take(job)

    def stage(self, in_hand):
        """Stage a job and wait until the lane would have it."""
        self.runner.begin(in_hand, self.staged.put)
        assert self.staged.get(timeout=60) is in_hand

    def finish(self, in_hand):
        """Hand in a picture, and wait until the job has left the hand."""
        self.runner.finish(in_hand, Image.new("RGB", (in_hand.params["width"], in_hand.params["height"])))
        assert self.hand.wait_empty(60)

    def lose(self, in_hand):
        """Let the ledger take the job away."""
        job = in_hand.job
        self.ledger.retry(job.id, job.fence, delay_seconds=600, counts=False, max_errors=3, code="test", detail="gone")


@pytest.fixture
def open_runner(workers):
    """Give a function that makes a runner on a store."""
    opened = []

    def make(store):
        opened.append(RunnerKit(workers, store))
        return opened[-1]

    yield make
    for kit in opened:
        kit.pool.shutdown()
        assert kit.bugs == []


def test_result_of_a_lost_job_is_deleted(open_runner, workers):
    """A commit that comes too late changes nothing, and the object that it would have named is removed."""
    kit = open_runner(workers.store)
    in_hand = kit.claim()
    kit.stage(in_hand)
    kit.lose(in_hand)

    kit.finish(in_hand)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.output) == (JobStatus.QUEUED, None)
    assert workers.outputs(job.id) == []


def test_result_of_a_cancelled_job_is_deleted(open_runner, workers):
    """A cancel that was acknowledged before the commit wins over it."""
    kit = open_runner(workers.store)
    in_hand = kit.claim()
    kit.stage(in_hand)
    workers.wait(workers.api.cancel("ana", [in_hand.job.id]))

    kit.finish(in_hand)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.output) == (JobStatus.CANCELLED, None)
    assert workers.outputs(job.id) == []


def test_flag_ends_the_work_before_anything_is_stored(open_runner, workers):
    """A job known to be lost is left alone; one known to be cancelled is settled, and neither reaches the store."""
    kit = open_runner(workers.store)
    lost, cancelled = kit.claim(), kit.claim()
    workers.wait(workers.api.cancel("ana", [cancelled.job.id]))
    lost.lost, cancelled.cancelled = True, True
    for in_hand in (lost, cancelled):
        kit.runner.begin(in_hand, kit.staged.put)
    assert kit.hand.wait_empty(60)

    assert kit.staged.empty()
    assert workers.read(lost.job.id).status is JobStatus.RUNNING
    assert workers.read(cancelled.job.id).status is JobStatus.CANCELLED


def test_worker_waits_for_a_store_that_is_away(open_runner, workers, tmp_path):
    """Photo and result wait for the store to come back; the job's only attempt succeeds."""
    server = EmbeddedStore(tmp_path / "store")
    server.start()
    try:
        server.wait_ready()
        settings = workers.settings.store.model_copy(update={"endpoint": server.endpoint})
        keys = {"access_key": server.access_key, "secret_key": server.secret_key}
        store = Store(type(settings).model_validate(settings.model_dump() | keys | {"read_timeout_seconds": 2}))
        store.ensure_buckets()
        kit = open_runner(store)
        workers.store = store
        in_hand = kit.claim()
        kit.stage(in_hand)
        server.kill()
        kit.runner.finish(in_hand, Image.new("RGB", (in_hand.params["width"], in_hand.params["height"])))
        assert not kit.hand.wait_empty(1.5)

        server.start()
        server.wait_ready()
        assert kit.hand.wait_empty(60)

        job = workers.read(in_hand.job.id)
        assert (job.status, job.attempts) == (JobStatus.SUCCEEDED, 1)
        assert workers.outputs(job.id) == [job.output.key]
        store.close()
    finally:
        server.kill()


def test_job_that_met_a_store_away_for_good_costs_nothing(open_runner, workers):
    """When waiting has been long enough the job goes back to the queue without an error on its account."""
    dead = workers.settings.store.model_copy(update={"endpoint": "127.0.0.1:1"})
    kit = open_runner(Store(dead))
    kit.runner._settings = kit.runner._settings.model_copy(update={"job_timeout_seconds": 0.3})
    in_hand = kit.claim()
    kit.runner.begin(in_hand, kit.staged.put)
    assert kit.hand.wait_empty(60)

    job = workers.read(in_hand.job.id)
    assert (job.status, job.attempts, job.error) == (JobStatus.QUEUED, 1, None)
    assert workers.field(job.id, "errors") == "0"
