"""The one thread that runs torch: it takes the best job one step further, again and again."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from PIL import Image

from pipelines.errors import DeadlineExceeded, OutOfMemory
from pipelines.loading import LoadedModel
from pipelines.running import LoraChoice, Run, RunRequest
from server.errors import LedgerUnavailable
from server.jobs import Priority
from server.ledger.worker_side import Reply, WorkerLedger
from server.settings import WorkerSettings
from server.worker.device import device_works
from server.worker.hand import JobInHand
from server.worker.patience import Outage
from server.worker.placement import Swap
from server.worker.residency import Residency
from server.worker.run_job import failure_of, is_expected
from server.worker.watchdog import watchdog

EXIT_DEVICE_LOST = 5
_RANK = {priority: rank for rank, priority in enumerate(Priority)}

log = structlog.stdlib.get_logger()


@dataclass(eq=False)
class LaneJob:
    """A job whose photos are ready. `run` is None until its first step and again when it must start anew."""

    in_hand: JobInHand
    run: Run | None = None
    had_room: bool = False

    @property
    def model(self) -> tuple[str, str]:
        """Which weights it needs in memory."""
        return self.in_hand.job.model, self.in_hand.job.model_version


def choose(jobs: Sequence[LaneJob]) -> LaneJob:
    """Return the job to take further: the highest priority, then the one under way, then the first claimed.

    LoRAs change the model itself, for all of its runs: a job that wants others waits until no run needs those.
    """
    under_way = {job.model: job.in_hand.job.loras for job in jobs if job.run is not None}
    may_run = [job for job in jobs if under_way.get(job.model, job.in_hand.job.loras) == job.in_hand.job.loras]
    return min(may_run, key=lambda one: (_RANK[one.in_hand.job.priority], one.run is None, one.in_hand.order))


class Lane:
    """Runs jobs step by step. `run` is the lane's own thread; what stands before it may be called by any.

    Args:
        residency: the models; only the lane changes it.
        ledger: is told which job is on the device.
        outage: of the ledger.
        settings: of the worker.
        device: as torch names it.
        on_image: gets a job and its image, when the run has ended well.
        on_failure: gets a job and what ended its run.
    """

    def __init__(
        self,
        residency: Residency,
        ledger: WorkerLedger,
        outage: Outage,
        *,
        settings: WorkerSettings,
        device: str,
        on_image: Callable[[JobInHand, Image.Image], None],
        on_failure: Callable[[JobInHand, Exception], None],
    ) -> None:
        self._residency = residency
        self._ledger = ledger
        self._outage = outage
        self._settings = settings
        self._device = device
        self._on_image = on_image
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._arrived: list[LaneJob] = []
        self._swap: Swap | None = None
        self._stopping = False
        self._jobs: list[LaneJob] = []
        self._on_device: LaneJob | None = None

    def submit(self, in_hand: JobInHand) -> None:
        """Give the lane a job whose photos are decoded."""
        with self._changed:
            self._arrived.append(LaneJob(in_hand))
            self._changed.notify_all()

    def request_swap(self, swap: Swap) -> None:
        """Ask for other models in memory; done between jobs."""
        with self._changed:
            self._swap = swap
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread end after the step that it is in."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Load what fits, then work until `stop`."""
        if self._settings.torch_threads is not None:
            torch.set_num_threads(self._settings.torch_threads)
        self._residency.check_all()
        self._residency.preload()
        while self._wait_for_work():
            self._drop_unwanted()
            if swap := self._take_swap():
                self._residency.swap(swap)
            elif self._jobs:
                self._advance(choose(self._jobs))
        for job in self._jobs:
            self._drop_run(job)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._jobs or self._arrived or self._swap)
            self._jobs += self._arrived
            self._arrived.clear()
            return not self._stopping

    def _drop_unwanted(self) -> None:
        for job in [one for one in self._jobs if one.in_hand.is_flagged]:
            self._end(job, failure_of(job.in_hand.check))

    def _take_swap(self) -> Swap | None:
        if any(job.run for job in self._jobs):
            return None
        with self._changed:
            swap, self._swap = self._swap, None
        return swap

    def _advance(self, job: LaneJob) -> None:
        error = failure_of(lambda: self._step(job))
        if error is not None and not is_expected(error) and not device_works(self._device):
            log.critical("device.lost", device=self._device, job=job.in_hand.job.id, exc_info=error)
            os._exit(EXIT_DEVICE_LOST)  # only another process can use the device again; the lease brings the job back
        if isinstance(error, OutOfMemory) and not job.had_room:
            error = None  # its frames hold tensors
            self._make_room(job)
        elif error is not None or (job.run and job.run.image):
            self._end(job, error)

    def _step(self, job: LaneJob) -> None:
        in_hand, settings = job.in_hand, self._settings
        in_hand.check()
        if in_hand.device_seconds > settings.job_timeout_seconds:
            raise DeadlineExceeded(f"The job took more than {settings.job_timeout_seconds:g} s on the device.")
        name = self._residency.name_of(in_hand.job)
        model = self._residency.require(name)
        self._residency.check_same_weights(in_hand.job, name)
        in_hand.weights_sha256 = self._residency.weights_sha256(name)
        self._put_on_device(job)
        started = time.monotonic()
        try:
            self._run_step(job, model)
        finally:
            in_hand.device_seconds += time.monotonic() - started

    def _run_step(self, job: LaneJob, model: LoadedModel) -> None:
        in_hand, settings = job.in_hand, self._settings
        if job.run is None:
            request = RunRequest(
                prompt=in_hand.job.prompt,
                negative_prompt=in_hand.job.negative_prompt,
                params=in_hand.params,
                area=model.spec.area,
                loras=tuple(LoraChoice(lora["id"], lora["scale"]) for lora in in_hand.job.loras),
            )
            job.run = model.start(in_hand.photos, request, num_threads=settings.torch_threads)
        remaining_seconds = max(0.0, settings.job_timeout_seconds - in_hand.device_seconds)
        with watchdog(remaining_seconds + settings.step_grace_seconds):
            job.run.advance()
        in_hand.step, in_hand.total_steps = job.run.step, job.run.total_steps

    def _end(self, job: LaneJob, error: Exception | None) -> None:
        image = job.run.image if job.run else None
        self._drop_run(job)
        self._jobs.remove(job)
        in_hand = job.in_hand
        in_hand.photos = []
        in_hand.timings["run"] = round(in_hand.device_seconds, 3)
        if image is not None and error is None:
            self._on_image(in_hand, image)
        elif error is not None:
            self._on_failure(in_hand, error)

    def _make_room(self, job: LaneJob) -> None:
        log.warning("device.full", device=self._device, job=job.in_hand.job.id, model=job.in_hand.job.model)
        job.had_room = True
        for one in self._jobs:
            self._drop_run(one)
        self._residency.evict_others(self._residency.name_of(job.in_hand.job))

    def _drop_run(self, job: LaneJob) -> None:
        self._take_off_device(job)
        if job.run:
            job.run.close()
            job.run = None

    def _put_on_device(self, job: LaneJob) -> None:
        if self._on_device is job:
            return
        if self._on_device:
            self._take_off_device(self._on_device)
        in_hand = job.in_hand
        reply: Reply = self._outage.outwait(
            lambda: self._ledger.start(in_hand.job.id, in_hand.job.fence, on_device=True), check=in_hand.check
        )
        in_hand.note(reply)
        in_hand.check()
        self._on_device = job

    def _take_off_device(self, job: LaneJob) -> None:
        if self._on_device is not job:
            return
        self._on_device = None
        in_hand = job.in_hand
        try:
            in_hand.note(self._ledger.start(in_hand.job.id, in_hand.job.fence, on_device=False))
        except LedgerUnavailable as error:
            # Not worth waiting for: at worst the job runs alone once, should this process die before it is settled.
            self._outage.note(error)
