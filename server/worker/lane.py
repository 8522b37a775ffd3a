"""The one thread that runs torch: it takes the best job one step further, again and again."""

import threading
import time
from collections.abc import Callable
from functools import partial

import structlog
import torch
from PIL import Image

from pipelines.errors import DeadlineExceeded, OutOfMemory
from pipelines.loading import LoadedModel
from server.errors import LedgerUnavailable
from server.ledger.worker_side import Reply, SentStart, WorkerLedger
from server.settings import WorkerSettings
from server.worker.device import cpu_threads, end_if_lost
from server.worker.errors import MemoryInPieces
from server.worker.hand import JobInHand, as_held
from server.worker.lane_job import LaneJob
from server.worker.patience import Outage
from server.worker.placement import Swap
from server.worker.policy import choose
from server.worker.residency import Residency
from server.worker.run_job import failure_of, is_expected
from server.worker.watchdog import arm, disarm, watchdog
from server.worker.wear import Wear

# A load cannot be interrupted: before each that nobody waits for, the claimer gets so long to bring jobs.
PRELOAD_PAUSE_SECONDS = 0.5

log = structlog.stdlib.get_logger()


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
        on_worn_out: called when only another process can use the device's memory again.
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
        on_worn_out: Callable[[], None],
    ) -> None:
        self._residency = residency
        self._ledger = ledger
        self._outage = outage
        self._settings = settings
        self._device = device
        self._num_threads = cpu_threads(settings.torch_threads, device)
        self._on_image = on_image
        self._on_failure = on_failure
        self._on_worn_out = on_worn_out
        self._changed = threading.Condition()
        self._arrived: list[LaneJob] = []
        self._swap: Swap | None = None
        self._check: str | None = None
        self._stopping = False
        self._jobs: list[LaneJob] = []
        self._is_preloading = True
        # What the ledger was last told; the job may have ended since.
        self._on_device: LaneJob | None = None
        self._sent_start: SentStart | None = None
        self._wear = Wear()
        self._busy_seconds = 0.0
        # Whose run the watchdog ends the process for. It stays armed while the run goes on without a pause,
        # since arming it costs more than all else between two steps.
        self._watched: LaneJob | None = None
        self._to_hand_over: list[Callable[[], None]] = []
        residency.let_go = self._drop_runs_of

    @property
    def busy_seconds(self) -> float:
        """How long runs have had the device, since the process began."""
        return self._busy_seconds

    @property
    def current(self) -> JobInHand | None:
        """The job whose run has the device."""
        job = self._on_device
        return job.in_hand if job and job.run else None

    def submit(self, in_hand: JobInHand) -> None:
        """Give the lane a job whose photos are decoded."""
        with self._changed:
            self._arrived.append(LaneJob(in_hand, is_exclusive=self._residency.is_exclusive(in_hand.job.model)))
            self._changed.notify_all()

    def request_swap(self, swap: Swap) -> None:
        """Ask for other models in memory; done between jobs."""
        with self._changed:
            self._swap = swap
            self._changed.notify_all()

    def request_check(self, name: str) -> None:
        """Ask for another look at a model that was refused; done between jobs."""
        with self._changed:
            self._check = name
            self._changed.notify_all()

    def stop(self) -> None:
        """Let the thread end after the step that it is in."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Load a model, then work until `stop`; further ones that fit are loaded while there is nothing to do."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        self._residency.check_all()
        self._residency.preload()
        while self._wait_for_work():
            self._drop_unwanted()
            if swap := self._take_swap():
                self._swap_models(swap)
            elif name := self._take_check():
                self._clear_device()
                self._residency.check_again(name)
            elif self._jobs:
                self._advance(self._choose())
            elif self._is_preloading:
                self._preload_next()
        for job in self._jobs:
            self._drop_run(job)
        self._clear_device()

    def _wait_for_work(self) -> bool:
        if not self._jobs and not self._arrived:
            self._clear_device()
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or self._jobs or self._arrived or self._swap or self._check,
                PRELOAD_PAUSE_SECONDS if self._is_preloading else None,
            )
            self._jobs += self._arrived
            self._arrived.clear()
            return not self._stopping

    def _preload_next(self) -> None:
        self._clear_device()
        self._is_preloading = self._residency.preload_next()

    def _drop_unwanted(self) -> None:
        for job in [one for one in self._jobs if one.in_hand.is_flagged]:
            self._end(job, failure_of(job.in_hand.check))

    def _choose(self) -> LaneJob:
        # One that ran out of memory has the device to itself the second time, whoever comes meanwhile.
        alone = [job for job in self._jobs if job.had_room and job.run]
        return alone[0] if alone else choose(self._jobs, max_wait_seconds=self._settings.max_wait_seconds)

    def _goes_on(self) -> bool:
        """Tell whether the next step is not a run's first: what is only set aside can wait for a change of models."""
        return bool(self._jobs) and self._choose().run is not None

    def _take_swap(self) -> Swap | None:
        if self._swap is None or self._goes_on():
            return None
        with self._changed:
            swap, self._swap = self._swap, None
        return swap

    def _take_check(self) -> str | None:
        if self._check is None or self._goes_on():
            return None
        with self._changed:
            name, self._check = self._check, None
        return name

    def _swap_models(self, swap: Swap) -> None:
        self._clear_device()
        self._residency.swap(swap)

    def _advance(self, job: LaneJob) -> None:
        started = time.monotonic()
        error = failure_of(lambda: self._step(job))
        for other in self._jobs:
            if other is not job:
                other.waited_seconds += time.monotonic() - started
        if error is not None and (isinstance(error, OutOfMemory) or not is_expected(error)):
            end_if_lost(self._device, error, limit_seconds=self._settings.step_grace_seconds)
        if isinstance(error, OutOfMemory) and not job.had_room:
            error = None  # its frames hold tensors
            self._make_room(job)
        elif error is not None or (job.run and job.run.image):
            self._end(job, self._judge_memory(job, error))

    def _step(self, job: LaneJob) -> None:
        in_hand, settings = job.in_hand, self._settings
        in_hand.check()
        if in_hand.device_seconds > settings.job_timeout_seconds:
            raise DeadlineExceeded(f"The job took more than {settings.job_timeout_seconds:g} s on the device.")
        model = self._require(job)
        self._put_on_device(job)
        started = time.monotonic()
        error = failure_of(lambda: self._run_step(job, model))
        seconds = time.monotonic() - started
        in_hand.device_seconds += seconds
        self._busy_seconds += seconds
        unwanted = failure_of(lambda: self._hear_of_start(job))
        # What went wrong counts, whatever the ledger says.
        if (first := error or unwanted) is not None:
            raise first

    def _require(self, job: LaneJob) -> LoadedModel:
        in_hand = job.in_hand
        name = self._residency.versions.name_of(in_hand.job)
        if name not in self._residency.loaded:
            self._clear_device()  # should the load end the process, no job is to blame
        model = self._residency.require(name)
        if job.run is None:
            self._admit(job, name)
        self._residency.versions.check_same_weights(in_hand.job, name)
        in_hand.weights_sha256 = self._residency.versions.weights_sha256(name)
        return model

    def _admit(self, job: LaneJob, name: str) -> None:
        if job.had_room:
            self._empty_device_for(name)  # others may have come since
            return
        params, num_photos = job.in_hand.params, len(job.in_hand.photos)
        self._residency.make_room(name, height=params["height"], width=params["width"], num_photos=num_photos)

    def _run_step(self, job: LaneJob, model: LoadedModel) -> None:
        in_hand = job.in_hand
        self._watch(job)
        if job.run is None:
            in_hand.optimizations = model.spec.optimizations.applied
            job.run = model.start(in_hand.photos, job.request(model.spec.area), num_threads=self._num_threads)
        # What has ended is passed on while the device works: the threads that are woken by it take the processor.
        job.run.advance(self._hand_over)
        in_hand.step, in_hand.total_steps = job.run.step, job.run.total_steps

    def _watch(self, job: LaneJob) -> None:
        if self._watched is not job:
            remaining_seconds = max(0.0, self._settings.job_timeout_seconds - job.in_hand.device_seconds)
            arm(remaining_seconds + self._settings.step_grace_seconds)
            self._watched = job

    def _watch_nobody(self) -> None:
        if self._watched is not None:
            self._watched = None
            disarm()

    def _end(self, job: LaneJob, error: Exception | None) -> None:
        image = job.run.image if job.run else None
        self._drop_run(job)
        self._jobs.remove(job)
        in_hand = job.in_hand
        in_hand.photos = []
        in_hand.timings["run"] = round(in_hand.device_seconds, 3)
        in_hand.has_left_device = True
        if image is not None and error is None:
            self._to_hand_over.append(partial(self._on_image, in_hand, image))
        elif error is not None:
            self._to_hand_over.append(partial(self._on_failure, in_hand, error))

    def _hand_over(self) -> None:
        """Pass on what has ended."""
        while self._to_hand_over:
            self._to_hand_over[0]()
            del self._to_hand_over[0]

    def _make_room(self, job: LaneJob) -> None:
        log.warning("device.full", device=self._device, job=job.in_hand.job.id, model=job.in_hand.job.model)
        job.had_room = True
        self._empty_device_for(self._residency.versions.name_of(job.in_hand.job))

    def _empty_device_for(self, name: str) -> None:
        for one in self._jobs:
            self._drop_run(one)
        self._residency.evict_others(name)

    def _judge_memory(self, job: LaneJob, error: Exception | None) -> Exception | None:
        """Learn from a run's end; one that did not fit where one as large did is no fault of the job's."""
        if error is not None and not isinstance(error, OutOfMemory):
            return error
        model = job.in_hand.job.model
        if error is None:
            self._wear.note_fit(model, job.num_pixels)
            return None
        if not self._wear.note_failure(model, job.num_pixels):
            return error
        if self._wear.is_worn_out:
            log.critical("device.worn_out", device=self._device, model=model)
            self._on_worn_out()
        return MemoryInPieces(str(error))

    def _drop_run(self, job: LaneJob) -> None:
        if job.run and self._watched is job:
            job.run.close()
        elif job.run:
            self._watch_nobody()
            with watchdog(self._settings.step_grace_seconds):
                job.run.close()
        self._watch_nobody()
        job.run = None

    def _drop_runs_of(self, name: str) -> None:
        """Close the runs of a model that leaves memory, which they would keep; they begin anew."""
        for job in self._jobs:
            if job.run and self._residency.versions.name_of(job.in_hand.job) == name:
                self._drop_run(job)

    def _put_on_device(self, job: LaneJob) -> None:
        """Tell the ledger whose step comes. The step does not wait for the answer, which stands behind a disk."""
        if self._on_device is job:
            return
        in_hand, before, self._on_device = job.in_hand, self._on_device, None
        self._watch_nobody()
        leaving = as_held(before.in_hand) if before else None
        self._sent_start = self._ledger.send_start(in_hand.job.id, in_hand.job.fence, instead_of=leaving)
        if not self._sent_start.is_sent:
            self._hear_of_start(job)
        self._on_device = job

    def _hear_of_start(self, job: LaneJob) -> None:
        """Hear what the ledger said to the job's START; a job that is not wanted has had one step in vain."""
        start, self._sent_start = self._sent_start, None
        if start is None:
            return
        # While the answer is not there, nobody knows who is on the device.
        self._on_device = None
        if not start.is_answered:
            self._watch_nobody()  # waiting for Redis is no fault of the device

        def reply() -> Reply:
            try:
                return start.reply()
            except LedgerUnavailable:
                self._watch_nobody()  # what was answered is that Redis cannot serve: that may take long
                raise

        said = self._outage.outwait(reply, check=job.in_hand.check)
        self._on_device = job
        job.in_hand.note(said)
        job.in_hand.check()

    def _clear_device(self) -> None:
        """Say that no job is on the device; while another goes on at once, that says it too."""
        job, self._on_device = self._on_device, None
        self._watch_nobody()
        self._hand_over()
        if job is None:
            return
        try:
            job.in_hand.note(self._ledger.start(job.in_hand.job.id, job.in_hand.job.fence, on_device=False))
        except LedgerUnavailable as error:
            # Not worth waiting for: at worst the job runs alone once, should this process die before it is settled.
            self._outage.note(error)
