"""One process that decodes photos or encodes results, as the worker talks to it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import StagedPhoto
from server.worker.decoding_frames import (
    DECODE,
    ENCODE,
    FILE,
    HELLO,
    MAX_TEXT_BYTES,
    NO_MEMORY,
    PIXELS,
    REFUSED,
    SCALE,
    SIZE,
    SIZE_BYTES,
    Encoding,
    Kind,
    pack_picture,
    pack_size,
    receive_frame,
    send_frame,
    unpack_size,
)

# Against a decoder that does not even use the processor; not so short that a busy machine would refuse good photos.
PATIENCE_SECONDS = 300.0
# What a decoder is told of the environment, so that no secret is within a hostile photo's reach.
PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
# Libraries that make threads would reserve memory for each, on a large machine more than a photo needs.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
# What a result's file may have beyond twice its pixels: it also says how it was made.
MOST_ENCODED_BYTES = 2**24
LOST = "the decoder gave an answer that makes no sense"
# For a process that has closed its end to be gone.
GONE_SECONDS = 10.0

Size = tuple[int, int]


class DecoderFailed(Exception):
    """Raised when a decoder cannot start, is killed from outside or gets no processor: no fault of the photo's."""


class DecoderDefeated(DecoderFailed):
    """Raised when a photo brings its decoder down; the text says how, to the photo's owner too."""


class DecoderOverrun(DecoderDefeated):
    """Raised when a photo takes too much of the processor's time, which it would do again."""


class Decoder:
    """One process that decodes or encodes, for one thread at a time.

    It is killed by the kernel when the **thread** that made it ends, so make it in one that lives as long as it shall.

    Args:
        max_pixels: photos with more are refused before they are decoded.
        memory_bytes: what it may take beyond what it begins with.
        cpu_seconds: of the processor's time, for one photo.
        patience_seconds: how long it may say and take nothing, once it is ready.

    Raises:
        OSError: there can be no such process: the machine is full, or lacks what it is made of.
    """

    def __init__(self, *, max_pixels: int, memory_bytes: int, cpu_seconds: int, patience_seconds: float) -> None:
        self._max_pixels = max_pixels
        self._cpu_seconds = cpu_seconds
        self._patience_seconds = patience_seconds
        self._peer, theirs = socket.socketpair()
        limits = (os.getpid(), max_pixels, memory_bytes, cpu_seconds)
        try:
            # Never a fork of this process, whose threads would leave locks behind. In a session of its own, so that a
            # signal for the worker's group does not end it before the worker's jobs are done.
            self._process = subprocess.Popen(  # noqa: S603 (the command is ours)
                [sys.executable, "-m", "server.worker.decoding_child", *map(str, limits)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | ENVIRONMENT,
                start_new_session=True,
            )
        except OSError:
            self._peer.close()
            raise
        finally:
            theirs.close()
        self.is_ready = False

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for its hello; return at once where that has come.

        Raises:
            DecoderFailed: it has ended before, or never comes so far.
        """
        if self.is_ready:
            return
        self._peer.settimeout(PATIENCE_SECONDS)
        try:
            hello = receive_frame(self._peer, max_bytes=0)
        except OSError:
            hello = None
        if hello is None or hello[0] != HELLO:
            raise DecoderFailed(f"the decoder did not start: {self._end()}")
        self._peer.settimeout(self._patience_seconds)
        self.is_ready = True

    def stage(self, data: bytes, sizes_of: Callable[[int, int], Sequence[Size]]) -> StagedPhoto:
        """Decode a photo and scale it.

        Args:
            data: the photo's file.
            sizes_of: told height and width of the upright photo, says each (height, width) that is wanted of it.

        Raises:
            BadInput: as `pipelines.photos.decode_photo` does.
            DecoderFailed: the process is of no use any more; where that is the photo's fault, `DecoderDefeated`.
        """
        height, width = unpack_size(self._ask(DECODE, data, SIZE, max_bytes=SIZE_BYTES))
        if not 0 < height * width <= self._max_pixels:
            raise DecoderDefeated(LOST)
        pictures: dict[Size, Image.Image] = {}
        for size in sizes_of(height, width):
            num_bytes = 3 * size[0] * size[1]
            pixels = self._ask(SCALE, pack_size(*size), PIXELS, max_bytes=num_bytes)
            if len(pixels) != num_bytes:
                raise DecoderDefeated(LOST)
            pictures[size] = Image.frombytes("RGB", (size[1], size[0]), pixels)
        return StagedPhoto(height, width, pictures)

    def encode(self, image: Image.Image, encoding: Encoding) -> bytes:
        """Encode a picture.

        Raises:
            BadInput: as `pipelines.photos.encode_photo` does.
            DecoderFailed: the process is of no use any more.
        """
        max_bytes = MOST_ENCODED_BYTES + 2 * 4 * encoding.output_height * encoding.output_width
        return bytes(self._ask(ENCODE, pack_picture(encoding, image.tobytes()), FILE, max_bytes=max_bytes))

    def close(self) -> None:
        """End the process; may be called again, but not while a photo is in it."""
        self._process.kill()
        self._process.wait()
        self._peer.close()

    def _ask(self, kind: Kind, content: bytes, expected: Kind, *, max_bytes: int) -> bytearray:
        """Send a frame, and return the content of the answer.

        What answers has read a stranger's file: nothing that it says is taken on trust.
        """
        try:
            send_frame(self._peer, kind, content)
            answer = receive_frame(self._peer, max_bytes=max(max_bytes, MAX_TEXT_BYTES))
        except TimeoutError:
            raise DecoderFailed(f"the decoder took more than {self._patience_seconds:g} s") from None
        except ConnectionAbortedError:
            raise DecoderDefeated(LOST) from None
        except OSError:
            answer = None
        if answer is None:
            raise self._why_it_ended()
        if answer[0] == REFUSED:
            raise BadInput(answer[1].decode(errors="replace"))
        if answer[0] == NO_MEMORY:
            raise DecoderDefeated("the decoder ran out of memory")
        if answer[0] != expected or (expected == SIZE and len(answer[1]) != SIZE_BYTES):
            raise DecoderDefeated(LOST)
        return answer[1]

    def _why_it_ended(self) -> DecoderFailed:
        end = self._end()
        if self._process.returncode == -signal.SIGXCPU:
            return DecoderOverrun(f"the decoder took more than {self._cpu_seconds} s of the processor's time")
        # Not by the worker, which kills it only once this is known, nor by a photo: most likely the memory was full.
        if self._process.returncode == -signal.SIGKILL:
            return DecoderFailed(f"the decoder was killed: {end}")
        return DecoderDefeated("the decoder crashed")

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GONE_SECONDS)
        return f"its exit status is {self._process.returncode}"
