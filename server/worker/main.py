"""One worker process: builds the parts, starts their threads, and stops them in order.

```
bell ─▶ claimer ─▶ stage threads ─▶ lane ─▶ stage threads ─▶ committed
             (fetch, decode)     (torch)   (encode, store)
```
"""

import os

# Read when the libraries below are imported: weights are local, and nothing may ask the network for them.
os.environ["HF_HUB_OFFLINE"] = "1"
# Photos of all sizes leave holes of all sizes: segments that can grow keep them usable. Either name is the operator's.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

import faulthandler
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Literal

import structlog
from PIL import Image

from server.errors import ConfigError, LedgerUnavailable
from server.jobs import Job
from server.ledger.status import CurrentJob, WorkerStatus
from server.ledger.worker_side import WorkerLedger, connect
from server.logs import configure_logging
from server.registry import Registry, load_registry
from server.settings import Settings
from server.store import Store
from server.worker.announcing import Announcer
from server.worker.bells import Bells
from server.worker.claimer import Claimer
from server.worker.control import ControlReader
from server.worker.decoding import Decoders
from server.worker.hand import Hand, JobInHand
from server.worker.lane import Lane
from server.worker.patience import Outage
from server.worker.planner import Planner
from server.worker.renewing import Renewer
from server.worker.residency import Residency
from server.worker.run_job import JobRunner
from server.worker.specs import model_specs

EXIT_OK = 0
EXIT_OTHER_LEDGER = 1
EXIT_NO_MODELS = 3
EXIT_THREAD_DIED = 4
EXIT_DEVICE_WORN_OUT = 6
# After so long a thread in Python code gives way to the lane, which it would otherwise keep from its device.
SWITCH_SECONDS = 0.001
# What threads get to notice that the process ends.
FAREWELL_SECONDS = 4.0

Order = Literal["stop", "no_models", "device_worn_out", "other_ledger"]
_EXIT_STATUS: Mapping[Order, int] = {
    "stop": EXIT_OK,
    "no_models": EXIT_NO_MODELS,
    "other_ledger": EXIT_OTHER_LEDGER,
    "device_worn_out": EXIT_DEVICE_WORN_OUT,
}

log = structlog.stdlib.get_logger()


def run_worker(settings: Settings, decoders: Decoders, device: str | None = None) -> int:
    """Serve jobs on one device until SIGTERM or SIGINT; to be called from the main thread.

    The first signal lets the jobs in hand finish, the second gives them back.

    Args:
        settings: of the whole server.
        decoders: made before this module was imported, which brings torch; closed at the end.
        device: as torch names it; `worker.device` when left out.

    Returns:
        The exit status: 0 after a signal, 1 when the ledger is another version's, 3 when no model can be served, 6 when
        jobs do not fit any more that did. (A device that is lost ends the process with 5, a thread that dies with 4,
        the watchdog with 1.)
    """
    configure_logging(settings.log)
    faulthandler.enable()
    sys.setswitchinterval(SWITCH_SECONDS)
    threading.excepthook = _end_for_thread
    worker = Worker(settings, load_registry(settings), decoders, device or settings.worker.device)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, worker.ask_to_stop)
    return worker.run()


class Worker:
    """All parts of the process, wired."""

    def __init__(self, settings: Settings, registry: Registry, decoders: Decoders, device: str) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._settings = settings
        self._decoders = decoders
        self._device = device
        # The one queue whose `put` may interrupt itself: signals arrive in the middle of anything.
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._ledger_outage = Outage("redis")
        self._ledger = self._make_ledger()
        self._store = Store(settings.store)
        self._pool = ThreadPoolExecutor(settings.worker.stage_threads, thread_name_prefix="stage")
        self._work_awaits = threading.Event()
        self._hand = Hand(on_release=self._work_awaits.set)
        self._residency = Residency(
            model_specs(settings, registry),
            device=device,
            capacity=settings.worker.max_resident_models,
            memory_bytes=settings.worker.memory_bytes,
            load_timeout_seconds=settings.worker.load_timeout_seconds,
            retry_seconds=settings.worker.model_retry_seconds,
            on_change=self._models_changed,
            in_hand=self._hand.models,
        )
        self._runner = JobRunner(
            registry=registry,
            store=self._store,
            ledger=self._ledger,
            hand=self._hand,
            store_outage=Outage("store"),
            ledger_outage=self._ledger_outage,
            settings=settings.worker,
            decoders=decoders,
            pool=self._pool,
            on_bug=_end_for_bug,
        )
        self._lane = Lane(
            self._residency,
            self._ledger,
            self._ledger_outage,
            settings=settings.worker,
            device=device,
            on_image=self._finish,
            on_failure=self._fail,
            on_worn_out=lambda: self._orders.put("device_worn_out"),
        )
        self._planner = Planner(
            self._ledger,
            self._hand,
            self._residency,
            settings=settings.worker,
            request_swap=self._lane.request_swap,
            request_check=self._lane.request_check,
            on_change=self._placement_changed,
        )
        self._claimer = Claimer(
            self._ledger,
            self._ledger_outage,
            self._hand,
            self._residency,
            settings=settings.worker,
            awake=self._work_awaits,
            take=self._take,
            planner=self._planner,
        )
        self._bells = Bells(settings.redis, registry.ids, on_ring=self._work_awaits.set)
        self._renewer = Renewer(
            self._ledger, self._ledger_outage, self._hand, lease_seconds=settings.worker.lease_seconds
        )
        self._control = ControlReader(
            self._make_ledger(),
            self._ledger_outage,
            self._hand,
            on_ready=self._claimer.note_ready,
            block_seconds=min(1.0, settings.redis.timeout_seconds / 2),
        )
        self._announcer = Announcer(
            self._ledger,
            self._ledger_outage,
            status=self._status,
            interval_seconds=settings.worker.announce_seconds,
        )
        self._threads: dict[str, threading.Thread] = {}
        self._is_stopping = False

    def ask_to_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a signal handler)
        """Take a signal: nothing is done here but to pass it on."""
        self._orders.put("stop")

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        log.info("worker.started", worker=self.id, device=self._device)
        self._start("lane", self._lane.run)
        self._start("renewer", self._renewer.run)
        self._start("control", self._control.run)
        self._start("announcer", self._announcer.run)
        self._start("claimer", self._claim)
        self._bells.start()
        order = self._orders.get()
        log.info("worker.stopping", worker=self.id, reason=order, held_jobs=len(self._hand))
        self._finish_jobs(may_run=order != "device_worn_out")
        self._stop_threads(order)
        if order == "no_models":
            log.critical("worker.useless", worker=self.id, detail="no enabled model can be loaded; see model.refused")
        else:
            log.info("worker.stopped", worker=self.id)
        return _EXIT_STATUS[order]

    def _start(self, name: str, run: Callable[[], None]) -> None:
        # Daemons: a thread that does not end must not keep the process.
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads[name] = thread
        thread.start()

    def _finish_jobs(self, *, may_run: bool) -> None:
        self._claimer.stop()
        self._threads["claimer"].join()
        # Before the bells, which take a second to fall silent: others may load these models meanwhile.
        self._is_stopping = True
        self._announcer.wake()
        self._bells.stop()
        if not may_run:
            self._give_back(self._hand.to_run())
            return
        deadline = time.monotonic() + self._settings.worker.shutdown_timeout_seconds
        while not self._hand.wait_empty(0.1):
            if time.monotonic() > deadline or not self._orders.empty():
                self._give_back(self._hand.jobs())
                return

    def _give_back(self, jobs: Sequence[JobInHand]) -> None:
        log.warning("worker.giving_back", worker=self.id, held_jobs=len(jobs))
        for in_hand in jobs:
            in_hand.abandoned = True
            try:
                self._ledger.retry(
                    in_hand.job.id,
                    in_hand.job.fence,
                    delay_seconds=0,
                    counts=False,
                    max_errors=self._settings.worker.max_errors,
                    code="worker_stopped",
                    detail="The worker was stopped.",
                )
            except LedgerUnavailable as error:
                self._ledger_outage.note(error)  # the lease brings the job back
        self._hand.wait_empty(FAREWELL_SECONDS)

    def _stop_threads(self, order: Order) -> None:
        for part in (self._lane, self._control, self._renewer, self._announcer):
            part.stop()
        deadline = time.monotonic() + FAREWELL_SECONDS
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        if order != "no_models":
            try:
                self._ledger.leave()
            except LedgerUnavailable as error:
                self._ledger_outage.note(error)  # the announcement runs out
        else:
            self._announcer.announce()  # so that the API can say why, for as long as an announcement lasts
        busy = [name for name, thread in self._threads.items() if thread.is_alive()]
        if busy or len(self._hand):
            # In a load, a step or a transfer that cannot be interrupted; nothing is left to be done for them.
            log.warning("worker.left_threads", worker=self.id, threads=busy, held_jobs=len(self._hand))
            os._exit(_EXIT_STATUS[order])
        self._pool.shutdown()
        self._decoders.close()
        self._store.close()

    def _claim(self) -> None:
        try:
            self._claimer.run()
        except ConfigError as error:
            log.critical("worker.refused", worker=self.id, detail=error.detail)
            self._orders.put("other_ledger")

    def _take(self, job: Job) -> None:
        in_hand = self._hand.take(job)
        log.info("job.claimed", job=job.id, model=job.model, attempt=job.attempts, suspect=job.suspect)
        self._runner.begin(in_hand, self._lane.submit)

    def _finish(self, in_hand: JobInHand, image: Image.Image) -> None:
        self._runner.finish(in_hand, image)
        self._work_awaits.set()  # there is room for the next

    def _fail(self, in_hand: JobInHand, error: Exception) -> None:
        self._runner.fail(in_hand, error)
        self._work_awaits.set()

    def _models_changed(self) -> None:
        self._announcer.wake()
        self._work_awaits.set()
        if not self._residency.usable:
            self._orders.put("no_models")

    def _placement_changed(self) -> None:
        self._announcer.wake()

    def _status(self) -> WorkerStatus:
        # Before the models: what has come into memory in between is told twice, not left out.
        current, decided = self._lane.current, self._planner.decided
        models = self._residency.statuses()
        loading, leaving = (decided.load, decided.evict) if decided else (None, ())
        if self._is_stopping:
            # It claims no more: others should not take it for a holder while it finishes.
            loading, leaving = None, tuple(model for model, one in models.items() if one.resident)
        return WorkerStatus(
            id=self.id,
            device=self._device,
            pid=os.getpid(),
            models=models,
            held_jobs=tuple(one.job.id for one in self._hand.jobs()),
            current_job=current and CurrentJob(current.job.id, current.job.model, current.step, current.total_steps),
            memory=self._residency.memory_status(),
            loading=loading,
            leaving=leaving,
        )

    def _make_ledger(self) -> WorkerLedger:
        settings = self._settings
        return WorkerLedger(
            connect(settings.redis),
            worker_id=self.id,
            key_prefix=settings.redis.key_prefix,
            lease_seconds=settings.worker.lease_seconds,
        )


def _end_for_thread(died: threading.ExceptHookArgs) -> None:
    """End the process when one of its threads dies: half a worker would hold jobs and never finish them."""
    log.critical("thread.died", thread=died.thread.name if died.thread else None, exc_info=died.exc_value)
    os._exit(EXIT_THREAD_DIED)


def _end_for_bug(error: BaseException) -> None:
    log.critical("thread.died", thread=threading.current_thread().name, exc_info=error)
    os._exit(EXIT_THREAD_DIED)
