"""A lane in this process, on a real ledger and real twins."""

import queue
import threading

from server.jobs import Job
from server.ledger.worker_side import WorkerLedger, connect


class LaneKit:
    """A running lane; `ended` gets (job, image or error) in the order of the ends."""

    def __init__(self, workers, *, registry=None, **settings):
        from server.worker.hand import Hand
        from server.worker.lane import Lane
        from server.worker.patience import Outage
        from server.worker.residency import Residency
        from server.worker.specs import model_specs

        self.workers = workers
        self.settings = workers.settings.worker.model_copy(update=settings)
        self.ledger = WorkerLedger(
            connect(workers.settings.redis), worker_id="lane-test", key_prefix=workers.prefix, lease_seconds=60
        )
        self.hand = Hand(on_release=lambda: None)
        self.ended = queue.SimpleQueue()
        self.residency = Residency(
            model_specs(workers.settings, registry or workers.registry),
            device="cpu",
            capacity=self.settings.max_resident_models,
            load_timeout_seconds=120,
            on_change=lambda: None,
            memory_bytes=self.settings.memory_bytes,
            retry_seconds=self.settings.model_retry_seconds,
            in_hand=self.hand.models,
        )
        self.lane = Lane(
            self.residency,
            self.ledger,
            Outage("redis"),
            settings=self.settings,
            device="cpu",
            on_image=lambda job, image: self.ended.put((job, image)),
            on_failure=lambda job, error: self.ended.put((job, error)),
            on_worn_out=lambda: self.ended.put((None, "worn out")),
        )
        self.thread = threading.Thread(target=self.lane.run)

    def runner(self, decoders, pool, on_bug):
        """Make the stage threads' side of the same ledger and hand."""
        from server.worker.patience import Outage
        from server.worker.run_job import JobRunner

        return JobRunner(
            registry=self.workers.registry,
            store=self.workers.store,
            ledger=self.ledger,
            hand=self.hand,
            store_outage=Outage("store"),
            ledger_outage=Outage("redis"),
            settings=self.settings,
            decoders=decoders,
            pool=pool,
            on_bug=on_bug,
        )

    def claim(self, *jobs):
        """Have jobs accepted, claimed and staged; returns them in the order of `jobs`."""
        from pipelines.photos import decode_photo

        _, *ids = self.workers.submit(*jobs)
        claimed = {}
        for _ in ids:
            job = self.ledger.claim(self.workers.registry.ids, num_held=0)
            assert isinstance(job, Job)
            in_hand = claimed[job.id] = self.hand.take(job)
            data = self.workers.store.fetch_upload(job.inputs[0].key, job.inputs[0].etag)
            in_hand.photos = [decode_photo(data, max_pixels=10**8)]
            in_hand.params, in_hand.inputs = job.params, job.inputs
        return [claimed[job_id] for job_id in ids]

    def wait_loaded(self, model):
        """Wait until the lane has loaded a model, and return it: only the lane itself may ask for that."""
        self.workers.until(f"{model} in memory", lambda: model in self.residency.loaded)
        return self.residency._loaded[model]

    def next_end(self):
        """Wait for the next job to end."""
        return self.ended.get(timeout=60)

    def on_device(self, in_hand):
        """Whether the ledger holds the job for being on the device."""
        return self.workers.field(in_hand.job.id, "on_device") == "1"
