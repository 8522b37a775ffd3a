"""Has photos decoded in processes of their own, which are limited, and replaced when a photo brings one down.

A decoder is code in C that reads what strangers wrote: what it does wrong must not end the worker, nor take the
interpreter's lock from the lane. Photos are scaled there too, so that a photo's own pixels never come to the worker;
and results are encoded in another such process, which reads no stranger's file, for the lock's sake: an encoder of PNG
in this process slows the lane's steps.
"""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import structlog
from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import StagedPhoto
from server.settings import Settings
from server.worker.decoder import PATIENCE_SECONDS, Decoder, DecoderDefeated, DecoderFailed, DecoderOverrun, Size
from server.worker.decoding_frames import Encoding

# A photo takes under 2 s of a slow processor. What takes much more was made to.
CPU_SECONDS = 30
# Of 25 that the widest way through `decode_photo` was seen to take: a WEBP file with transparency, turned.
BYTES_PER_PIXEL = 32
HEADROOM_BYTES = 256 * 2**20
# How often a photo is tried: an end that was not its own fault, such as a full machine, is unlikely to come twice.
NUM_TRIES = 2
# Before a new process where one did not come up or was killed: twice as long after each further one that is, until
# one of them has done its work.
REST_SECONDS = 0.5
LONGEST_REST_SECONDS = 30.0

# A photo of 12 megapixels takes 0.16 s of a processor and a PNG of one megapixel 0.2 s, so these keep up with a lane
# that does four jobs a second. More would only take processors from it.
MAX_PROCESSES = 2

Made = TypeVar("Made")

log = structlog.stdlib.get_logger()


class Crew:
    """Processes of one kind, lent out one by one; who finds all taken waits.

    Args:
        num_processes: at most.
        create: makes one.
    """

    def __init__(self, num_processes: int, create: Callable[[], Decoder]) -> None:
        self._create = create
        self._places = threading.Semaphore(num_processes)
        self._changing = threading.Lock()
        self._idle: list[Decoder] = []
        self._all: set[Decoder] = set()
        self._num_failures = 0
        self._next_start_at = 0.0

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        with self._changing:
            return [decoder.pid for decoder in self._all if decoder.is_running]

    @property
    def num_idle(self) -> int:
        """How many wait for work."""
        return len(self._idle)

    def start_one(self) -> None:
        """Start a process beforehand. It need not come up: whoever wants one later starts another."""
        with suppress(DecoderFailed):
            self._give_back(self._start())

    def make(self, work: Callable[[Decoder], Made]) -> Made:
        """Do `work` with a process, and once more with another where the first fails.

        Raises:
            DecoderFailed: of the last try.
        """
        for _ in range(NUM_TRIES - 1):
            try:
                with self._borrowed() as decoder:
                    return work(decoder)
            except DecoderOverrun:
                raise
            except DecoderFailed:
                continue  # `_borrowed` has logged it
        with self._borrowed() as decoder:
            return work(decoder)

    def close(self) -> None:
        """End all processes; may be called again."""
        with self._changing:
            decoders, self._idle = list(self._all), []
            self._all.clear()
        for decoder in decoders:
            decoder.close()

    @contextmanager
    def _borrowed(self) -> Generator[Decoder]:
        with self._places:
            decoder = self._take()
            try:
                decoder.wait_until_ready()
                yield decoder
            except BadInput:
                self._give_back(decoder)
                raise
            except BaseException as error:
                # Also one that only lacked memory: a fresh one has it in one piece. After anything else nobody knows
                # what would come of it next.
                log.warning("decoder.replaced", pid=decoder.pid, reason=str(error))
                self._drop(decoder)
                if isinstance(error, DecoderFailed) and not isinstance(error, DecoderDefeated):
                    self._put_off(error)
                raise
            self._give_back(decoder)
            self._num_failures = 0

    def _take(self) -> Decoder:
        while (decoder := self._pop()) is not None:
            if decoder.is_running or not decoder.is_ready:
                return decoder
            log.warning("decoder.replaced", pid=decoder.pid, reason="it died idle")  # which no photo pays for
            self._drop(decoder)
        return self._start()

    def _pop(self) -> Decoder | None:
        with self._changing:
            return self._idle.pop() if self._idle else None

    def _give_back(self, decoder: Decoder) -> None:
        with self._changing:
            self._idle.append(decoder)

    def _drop(self, decoder: Decoder) -> None:
        with self._changing:
            self._all.discard(decoder)
        decoder.close()

    def _start(self) -> Decoder:
        # Where none can live, jobs wait here, rather than that one after the other is claimed and fails.
        time.sleep(max(0.0, self._next_start_at - time.monotonic()))
        try:
            decoder = self._create()
        except OSError as error:
            self._put_off(error)
            raise DecoderFailed(f"the decoder did not start: {error}") from None
        with self._changing:
            self._all.add(decoder)
        return decoder

    def _put_off(self, error: Exception) -> None:
        with self._changing:
            rest_seconds = min(REST_SECONDS * 2 ** min(self._num_failures, 16), LONGEST_REST_SECONDS)
            self._num_failures += 1
            self._next_start_at = time.monotonic() + rest_seconds
        log.error("decoder.failed", reason=str(error), rest_seconds=rest_seconds)


class Decoders:
    """The processes of a worker for photos, and the one for results; `stage` and `encode` are for any thread.

    The first process for photos is started at once, so make this before anything large is imported; the others when
    they are wanted. Results have theirs, so that no photo that is made to be slow keeps them waiting, and no file of a
    stranger's comes near them.

    Args:
        num_processes: for photos, at most; one more is for results.
        max_pixels: photos with more are refused before they are decoded.
        max_file_bytes: of a photo's file.
        cpu_seconds: a photo that takes more of the processor's time is refused.
        patience_seconds: a process that does nothing for so long is given up.
        memory_bytes: what a process may take; enough for the largest photo when left out.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        max_pixels: int,
        max_file_bytes: int,
        cpu_seconds: int = CPU_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        memory_bytes: int | None = None,
    ) -> None:
        memory_bytes = memory_bytes or HEADROOM_BYTES + 2 * max_file_bytes + BYTES_PER_PIXEL * max_pixels

        def create() -> Decoder:
            return Decoder(
                max_pixels=max_pixels,
                memory_bytes=memory_bytes,
                cpu_seconds=cpu_seconds,
                patience_seconds=patience_seconds,
            )

        self.for_photos = Crew(num_processes, create)
        self.for_results = Crew(1, create)
        self.for_photos.start_one()

    def stage(self, data: bytes, sizes_of: Callable[[int, int], Sequence[Size]]) -> StagedPhoto:
        """Decode a photo and scale it, as `Decoder.stage` does.

        Raises:
            BadInput: as `pipelines.photos.decode_photo` does; or the photo has taken too much of the processor's time,
                or brought down two decoders.
            DecoderFailed: there is no decoder, or it was killed, which says nothing of the photo.
        """
        try:
            return self.for_photos.make(lambda decoder: decoder.stage(data, sizes_of))
        except DecoderDefeated as error:
            raise BadInput(f"the image could not be decoded: {error}") from None

    def encode(self, image: Image.Image, encoding: Encoding) -> bytes:
        """Encode a picture, scaled where that is asked; never waits for a photo.

        Raises:
            BadInput: the format cannot hold a side that long.
            DecoderFailed: two processes have failed over it.
        """
        return self.for_results.make(lambda decoder: decoder.encode(image, encoding))

    def close(self) -> None:
        """End all processes, once nobody has a photo decoded any more."""
        self.for_photos.close()
        self.for_results.close()


def start_decoders(settings: Settings) -> Decoders:
    """Start what decodes the photos of a worker and encodes its results: three processes at most."""
    return Decoders(
        min(MAX_PROCESSES, settings.worker.stage_threads),
        max_pixels=settings.limits.max_image_pixels,
        max_file_bytes=settings.limits.max_upload_bytes,
    )
