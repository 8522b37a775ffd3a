"""The stage threads of a worker in this process, on a real ledger and store."""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from server.jobs import Job
from server.ledger.worker_side import WorkerLedger, connect


class RunnerKit:
    """A runner with two stage threads, and a hand for its jobs."""

    def __init__(self, workers, store, decoders):
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
            decoders=decoders,
            pool=self.pool,
            on_bug=self.bugs.append,
        )
        self.staged = queue.SimpleQueue()

    def claim(self, *, data=None, output=None, has_digest=False, **record):
        """Have a job accepted and claimed; `record` is what its record has besides."""
        seen = {} if has_digest else {"sha256": None}
        photo = self.workers.upload(self.workers.picture() if data is None else data, **seen)
        self.workers.submit(replace(self.workers.job(photo, output=output), **record))
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
