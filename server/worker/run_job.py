"""What happens to one job around its run on the device: stage the photo, store the output, settle what went wrong."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, cast

import structlog
from PIL import Image

from pipelines.errors import BadInput, Cancelled, DeadlineExceeded, OutOfMemory
from pipelines.photos import CONTENT_TYPES, OutputFormat
from server.errors import DependencyError, ObjectChanged, ObjectNotFound, StoreTooSlow, StoreUnavailable
from server.eta import measured_speeds
from server.jobs import JobInput, JobOutput
from server.ledger.worker_side import WorkerLedger
from server.registry import Registry
from server.settings import WorkerSettings
from server.store import Store
from server.worker.decoding import Decoders, Size
from server.worker.decoding_frames import Encoding
from server.worker.errors import LeaseLost, MemoryInPieces, ModelChanged, ModelUnavailable
from server.worker.hand import Hand, JobInHand
from server.worker.marking import leave_marker
from server.worker.patience import Outage
from server.worker.sizing import final_params, output_size

# What ends a job at its first occurrence, since another try would end the same way.
FINAL_CODES: Mapping[type[Exception], str] = {
    BadInput: "invalid_input",
    ObjectNotFound: "input_missing",
    ObjectChanged: "input_changed",
    Cancelled: "cancelled",
    DeadlineExceeded: "deadline_exceeded",
    OutOfMemory: "out_of_memory",
    ModelChanged: "model_changed",
}
LONGEST_RETRY_SECONDS = 60.0

log = structlog.stdlib.get_logger()


def failure_of(step: Callable[[], object]) -> Exception | None:
    """Run `step` and return what it raised.

    The one place that catches everything: what goes wrong with a job must not end the worker.
    """
    try:
        step()
    except Exception as error:  # noqa: BLE001
        return error
    return None


class JobRunner:
    """Takes jobs to the lane and from it, in stage threads; its methods return at once, whichever thread calls them.

    Args:
        registry: knows the job's model.
        store: where photos come from and outputs go.
        ledger: hears how each job ends.
        hand: which the job then leaves.
        store_outage: of the store.
        ledger_outage: of the ledger.
        settings: of the worker.
        decoders: decode and scale the photos, and encode the results.
        pool: the stage threads.
        on_bug: gets an error that even settling a job could not deal with.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        store: Store,
        ledger: WorkerLedger,
        hand: Hand,
        store_outage: Outage,
        ledger_outage: Outage,
        settings: WorkerSettings,
        decoders: Decoders,
        pool: Executor,
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._ledger = ledger
        self._hand = hand
        self._store_outage = store_outage
        self._ledger_outage = ledger_outage
        self._settings = settings
        self._decoders = decoders
        self._pool = pool
        self._on_bug = on_bug

    def begin(self, in_hand: JobInHand, to_lane: Callable[[JobInHand], None]) -> None:
        """Fetch, decode and scale the photos, then give the job to the lane."""
        self._in_pool(in_hand, lambda: self._stage(in_hand, to_lane))

    def finish(self, in_hand: JobInHand, image: Image.Image) -> None:
        """Encode and store what the device made, and commit it."""
        self._in_pool(in_hand, lambda: self._hand_in(in_hand, image))

    def fail(self, in_hand: JobInHand, error: Exception) -> None:
        """Tell the ledger why the run ended without an image."""
        self._submit(lambda: self._settle(in_hand, error))

    def _in_pool(self, in_hand: JobInHand, step: Callable[[], None]) -> None:
        def run() -> None:
            error = failure_of(step)
            if error is not None:
                self._settle(in_hand, error)

        self._submit(run)

    def _submit(self, step: Callable[[], None]) -> None:
        self._pool.submit(step).add_done_callback(self._look_at)

    def _look_at(self, done: "Future[None]") -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._on_bug(error)

    def _stage(self, in_hand: JobInHand, to_lane: Callable[[JobInHand], None]) -> None:
        started = time.monotonic()
        fetched = [self._fetch(in_hand, place) for place in range(len(in_hand.job.inputs))]
        in_hand.photos = [photo for photo, _ in fetched]
        in_hand.inputs = tuple(found for _, found in fetched)
        in_hand.timings["fetch"] = round(time.monotonic() - started, 3)
        to_lane(in_hand)

    def _fetch(self, in_hand: JobInHand, place: int) -> tuple[Image.Image, JobInput]:
        recorded = in_hand.job.inputs[place]
        in_hand.check()
        data = self._store_outage.outwait(
            lambda: self._store.fetch_upload(recorded.key, recorded.etag, size_bytes=recorded.size_bytes),
            check=in_hand.check,
            patience_seconds=self._settings.job_timeout_seconds,
        )
        sha256 = hashlib.sha256(data).hexdigest()
        if recorded.sha256 not in {None, sha256}:
            raise ObjectChanged(f"The photo {recorded.upload_id} does not have the sha256 it was announced with.")
        photo = self._decoders.stage(data, lambda height, width: self._reading_sizes(in_hand, place, height, width))
        return photo, replace(recorded, sha256=sha256, height=photo.height, width=photo.width)

    def _reading_sizes(self, in_hand: JobInHand, place: int, height: int, width: int) -> list[Size]:
        """Tell at which sizes the run will ask for a photo, whose own size is known from here on."""
        entry = self._registry.get(in_hand.job.model)
        if place == 0:
            in_hand.params = final_params(entry, in_hand.job, height, width)
        return entry.params_model.reading_sizes(height, width, entry.area, in_hand.params, is_first=place == 0)

    def _hand_in(self, in_hand: JobInHand, image: Image.Image) -> None:
        started = time.monotonic()
        in_hand.check()
        encoding = encoding_of(in_hand, image)
        data = self._decoders.encode(image, encoding)
        output = describe_output(in_hand, encoding, data)
        error = failure_of(lambda: self._put(in_hand, data, output))
        if error is not None:
            self._delete(output)  # a try that failed may have stored it all the same
            raise error
        in_hand.timings["store"] = round(time.monotonic() - started, 3)
        # From the first try of a commit on only its answer counts: while there is none, the object may be the result.
        reply = self._ledger_outage.outwait(
            lambda: self._ledger.commit(
                in_hand.job.id,
                in_hand.job.fence,
                output=output,
                timings=in_hand.timings,
                params=in_hand.params,
                inputs=in_hand.inputs,
                speeds=measured_speeds(in_hand.device_seconds, in_hand.total_steps or 0, image.height, image.width),
                weights_sha256=in_hand.weights_sha256,
                optimizations=in_hand.optimizations,
            ),
            check=in_hand.check_process,
        )
        if reply == "ok":
            self._mark(in_hand, output)
        else:
            self._delete(output)
        self._close(in_hand, "succeeded" if reply == "ok" else reply)

    def _put(self, in_hand: JobInHand, data: bytes, output: JobOutput) -> None:
        self._store_outage.outwait(
            lambda: self._store.put_output(output.key, data, output.content_type),
            check=in_hand.check,
            patience_seconds=self._settings.job_timeout_seconds,
        )
        in_hand.check()

    def _mark(self, in_hand: JobInHand, output: JobOutput) -> None:
        """Leave a marker beside a result that is the job's by now; without it the job is done all the same."""
        error = failure_of(lambda: leave_marker(self._ledger, self._store, in_hand, output))
        if error is not None:
            log.warning("marker.left_out", job=in_hand.job.id, error=f"{type(error).__name__}: {error}")

    def _delete(self, output: JobOutput) -> None:
        try:
            self._store.delete_output(output.key)
        except StoreUnavailable as error:
            log.warning("output.left_behind", key=output.key, error=error.detail)

    def _settle(self, in_hand: JobInHand, error: Exception) -> None:
        if not is_expected(error):
            log.error("job.crashed", job=in_hand.job.id, model=in_hand.job.model, exc_info=error)
        try:
            in_hand.check_lease()
            end = self._ledger_outage.outwait(lambda: self._tell(in_hand, error), check=in_hand.check_lease)
        except LeaseLost:
            end = "given_back" if in_hand.abandoned else "lost"
        self._close(in_hand, end, error)

    def _tell(self, in_hand: JobInHand, error: Exception) -> str:
        """Tell the ledger how the try ended; returns what became of the job."""
        job = in_hand.job
        if (code := final_code(error)) is not None:
            reply = self._ledger.fail(job.id, job.fence, code=code, detail=str(error), timings=in_hand.timings)
            return "failed" if reply == "ok" else reply
        # What is away comes back, and what this worker cannot load another may: neither costs the job anything.
        counts, told = not is_expected(error), ("not_served", str(error))
        if isinstance(error, MemoryInPieces):
            counts, told = True, ("out_of_memory", str(error))  # yet it might be the job after all
        elif isinstance(error, StoreTooSlow):
            # The store is there, and this photo or result does not get through: that need not end by itself.
            counts = True
            told = ("store_unavailable", "The photo or the result could not be moved: the store is too slow.")
        elif counts:
            bug = f"The worker met an unexpected {type(error).__name__}; its log has the details under the job's id."
            told = ("internal_error", bug)
        reply = self._ledger.retry(
            job.id,
            job.fence,
            delay_seconds=retry_delay_seconds(job.attempts, self._settings.retry_base_seconds),
            counts=counts,
            max_errors=self._settings.max_errors,
            code=told[0],
            detail=told[1],
        )
        return "retrying" if reply == "ok" else reply

    def _close(self, in_hand: JobInHand, end: str, error: Exception | None = None) -> None:
        job = in_hand.job
        fields: dict[str, object] = {"job": job.id, "model": job.model, "attempt": job.attempts}
        if in_hand.step is not None:
            fields |= {"step": in_hand.step, "total_steps": in_hand.total_steps}
        if error is not None:
            fields |= {"code": final_code(error), "error": f"{type(error).__name__}: {error}"}
        fields |= {f"{phase}_seconds": seconds for phase, seconds in in_hand.timings.items()}
        event = f"job.{end}"
        log.log(logging.WARNING if end == "failed" else logging.INFO, event, **fields)
        self._hand.release(in_hand)


def encoding_of(in_hand: JobInHand, image: Image.Image) -> Encoding:
    """Tell how a result is to be encoded."""
    spec, photo = in_hand.job.output_spec, in_hand.inputs[0]
    height, width = output_size(image, spec, (photo.height, photo.width))
    return Encoding(
        mode=image.mode,
        height=image.height,
        width=image.width,
        output_height=height,
        output_width=width,
        image_format=cast("OutputFormat", spec.format),
        quality=spec.quality,
        record=record_of(in_hand) if spec.metadata else None,
    )


def describe_output(in_hand: JobInHand, encoding: Encoding, data: bytes) -> JobOutput:
    """Describe an encoded result; its key is this try's own."""
    job, image_format = in_hand.job, encoding.image_format
    return JobOutput(
        key=f"{job.id}/{job.fence}/output.{'jpg' if image_format == 'jpeg' else image_format}",
        sha256=hashlib.sha256(data).hexdigest(),
        content_type=CONTENT_TYPES[image_format],
        height=encoding.output_height,
        width=encoding.output_width,
        size_bytes=len(data),
    )


def record_of(in_hand: JobInHand) -> dict[str, Any]:
    """Return what an output says of itself: with the weights and the photos, enough to make the same picture again."""
    job = in_hand.job
    return {
        "job_id": job.id,
        "model": job.model,
        "model_version": job.model_version,
        "weights_sha256": in_hand.weights_sha256,
        "optimizations": in_hand.optimizations,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "params": in_hand.params,
        "loras": list(job.loras),
        "input_sha256": [photo.sha256 for photo in in_hand.inputs],
    }


def final_code(error: Exception) -> str | None:
    """Return the code under which `error` ends a job, or None when another try may do better."""
    return next((code for kind, code in FINAL_CODES.items() if isinstance(error, kind)), None)


def is_expected(error: Exception) -> bool:
    """Tell what a worker must reckon with from a bug."""
    return final_code(error) is not None or isinstance(
        error, DependencyError | ModelUnavailable | LeaseLost | MemoryInPieces
    )


def retry_delay_seconds(attempts: int, base_seconds: float) -> float:
    """Return how long a job waits before its next try: twice as long after each."""
    return min(base_seconds * 2 ** min(attempts - 1, 16), LONGEST_RETRY_SECONDS)
