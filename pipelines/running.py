"""Turn one call of any diffusers pipeline into a run that can be resumed step by step, set aside, or given up.

The pipeline's code stays as it is. Each run calls it in a thread of its own; at the end of every step the pipeline's
callback hands the baton back to the lane, the thread that called `advance()`, and waits. So only the holder of the
baton runs torch, and a pipeline that is not safe for threads is never in two at once.
"""

import copy
import inspect
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from PIL import Image

from pipelines.errors import OutOfMemory

_OUT_OF_MEMORY_SIGNS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class LoraChoice:
    """One of the model's LoRAs, and how strongly it is laid over the model; at scale 0 it changes nothing."""

    id: str
    scale: float


@dataclass(frozen=True)
class RunRequest:
    """What a job asks of its model; everything is decided, nothing is left to a default.

    Attributes:
        prompt: what to make of the photo.
        negative_prompt: what to keep away from, where the family has one.
        params: as `SizeParams.resolved` gives them: height, width and seed are numbers.
        area: at which the model reads its photos, in pixels.
        loras: laid over the model for this run alone; no id twice.
    """

    prompt: str
    negative_prompt: str | None
    params: dict[str, Any]
    area: int
    loras: tuple[LoraChoice, ...] = ()


@dataclass(frozen=True)
class PipelineCall:
    """One call of a pipeline, ready to be made.

    Attributes:
        kwargs: for the pipeline's `__call__`; the callback is added by the run.
        first_advance: makes a context that must be open until the first step is done, for what can only be set from
            outside the call.
    """

    kwargs: dict[str, Any]
    first_advance: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)


class RunClosed(BaseException):
    """Raised inside the pipeline when its run is closed; not an Exception, so that no code there takes it for one."""


class RunTraceback(Exception):
    """Where an error arose in the run's own thread, as text; the cause of what `Run.advance` raises."""

    def __str__(self) -> str:
        return f"\n{super().__str__()}"


class Run:
    """One photo on its way through a pipeline.

    `advance()` and `close()` are for one thread, the lane. Whoever starts a run closes it. A pipeline that does not
    call back after each step runs as a whole in the first `advance()`.

    Args:
        pipeline: never called itself, but a copy of it.
        call: of the pipeline.
        scheduler: for this run; a copy of the pipeline's when left out.
        device: where the pipeline computes; found out when left out, which takes longer than all else here.
        num_threads: CPU threads that torch may use; its own choice when left out.
        around: makes a context that is open while the pipeline is called, in the run's own thread.
        has_hooks: whether the model has hooks that keep something of a run, or move weights.

    Attributes:
        step: number of steps that are done.
        total_steps: number of steps of the whole run.
        image: the result, RGB; None until `advance()` has returned False.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call: PipelineCall,
        *,
        scheduler: Any | None = None,
        device: torch.device | None = None,
        num_threads: int | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        has_hooks: bool = True,
    ) -> None:
        # The scheduler counts steps and the call keeps state on the pipeline: both are this run's own. The models,
        # which hold the memory, are shared.
        self._pipeline: Any = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler) if scheduler is None else scheduler
        self._device = execution_device(pipeline) if device is None else device
        self._call = call
        self._num_threads = num_threads
        self._around = around
        self._has_hooks = has_hooks
        self._thread: threading.Thread | None = None
        # Queues that are made in C: a semaphore of Python's would cost more than the hand-over itself.
        self._may_run: SimpleQueue[None] = SimpleQueue()
        self._handed_back: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None
        self._traceback = ""
        self._closing = False
        self.step = 0
        self.total_steps: int = call.kwargs["num_inference_steps"]
        self.image: Image.Image | None = None

    @property
    def is_open(self) -> bool:
        """Whether it may still go on: neither finished, nor failed, nor closed."""
        return not self._closing

    def advance(self, meanwhile: Callable[[], None] | None = None) -> bool:
        """Run to the next step boundary; the first call also encodes prompt and photo, the last also decodes.

        Args:
            meanwhile: called while the pipeline works; it must not raise, nor run torch.

        Returns:
            True while more steps are to come, False when `image` is there.

        Raises:
            OutOfMemory: the device or the machine has too little memory. The run is over.
            Exception: whatever the pipeline raised. The run is over.
            RuntimeError: the run was over already.
        """
        if self._closing:
            raise RuntimeError("the run is over: it cannot be advanced")
        if self._thread is None:
            # A daemon, since a lane that dies leaves its runs waiting: they must not keep the process alive.
            self._thread = threading.Thread(target=self._run, name="pipeline-run", daemon=True)
            with self._call.first_advance():
                self._thread.start()
                self._await_baton(meanwhile)
        else:
            self._may_run.put(None)
            self._await_baton(meanwhile)
        if self._error is None and self.image is None:
            return True
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            if is_out_of_memory(error):
                error = OutOfMemory(f"too little memory for the run: {one_line(error)}")
            raise error from RunTraceback(self._traceback)
        return False

    def _await_baton(self, meanwhile: Callable[[], None] | None) -> None:
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            self._handed_back.get()

    def close(self) -> None:
        """Give the run up if it is not finished, and let go of all that it holds; may be called again at any time."""
        self._closing = True
        if self._thread is not None:
            # For a thread that has ended, nobody takes the baton, and there is nothing to wait for.
            self._may_run.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        # Both belong to a thread: what the lane's own thread has set does not hold here.
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        try:
            try:
                with self._around():
                    self._finish(self._pipeline(**self._call.kwargs, **self._callback()))
            finally:
                # What hooks keep of a run must not reach the next. At a good end most pipelines see to it themselves.
                if self._has_hooks or self.image is None:
                    self._pipeline.maybe_free_model_hooks()
        except RunClosed:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the lane, where advance() raises it
            # As text: the traceback itself holds the frames, and they hold latents, which on a full device must go
            # before anything else is tried.
            self._traceback = "".join(traceback.format_exception(error))
            error.__cause__ = error.__context__ = None
            self._error = error.with_traceback(None)
        finally:
            del self._pipeline, self._call, self._around
            self._handed_back.put(None)

    def _callback(self) -> dict[str, Any]:
        takes_callback = "callback_on_step_end" in inspect.signature(self._pipeline.__call__).parameters
        return {"callback_on_step_end": self._end_step} if takes_callback else {}

    def _end_step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        if self._device.type == "cuda":
            # Kernels are queued long before they run: without this a step is reported done, and a closed run holds the
            # device, ahead of what has really happened. It costs one launch gap a step.
            torch.cuda.synchronize(self._device)
        self.step = step + 1
        self.total_steps = pipeline.num_timesteps
        if self.step < self.total_steps:
            self._handed_back.put(None)
            self._may_run.get()
        if self._closing:
            raise RunClosed
        return {}

    def _finish(self, output: Any) -> None:
        if self._closing:
            # Where nothing was called back, this is the first that the run hears of it.
            raise RunClosed
        self.image, self.step = output.images[0], self.total_steps


def execution_device(pipeline: Any) -> torch.device:
    """Tell where a pipeline computes; its weights may wait elsewhere until they are used."""
    return pipeline._execution_device  # noqa: SLF001 - told nowhere else


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means too little memory; not everywhere torch has a class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS)
    )


def one_line(error: BaseException) -> str:
    """Give what an error is and says, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
