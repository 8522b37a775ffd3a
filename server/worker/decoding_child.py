"""The process that decodes photos, so that a file which brings down a decoder brings down no worker, and no job's run.

It knows neither torch nor network nor store: a photo's file comes in, its size and its scaled pictures go out. Another
of its kind encodes results, which would keep the interpreter's lock from the lane; that one is sent no photos.
"""

import ctypes
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from pipelines.errors import BadInput
from pipelines.photos import decode_photo, encode_photo
from server.worker.decoding_frames import (
    DECODE,
    ENCODE,
    FILE,
    HELLO,
    MAX_TEXT_BYTES,
    NO_MEMORY,
    PIXELS,
    REFUSED,
    SIZE,
    pack_size,
    receive_frame,
    send_frame,
    unpack_picture,
    unpack_size,
)

_PR_SET_PDEATHSIG = 1


def serve(worker: socket.socket, *, max_pixels: int, cpu_seconds: int | None) -> None:
    """Answer the worker's frames, one after the other, until it closes its end.

    Args:
        worker: the other end.
        max_pixels: photos with more are refused before they are decoded.
        cpu_seconds: a photo that takes more of the processor's time ends the process; None: it may take any.
    """
    photo: Image.Image | None = None
    while (frame := receive_frame(worker, max_bytes=sys.maxsize)) is not None:
        kind, content = frame
        try:
            if kind == DECODE:
                photo = None  # two at a time would need the memory of two
                if cpu_seconds is not None:
                    _limit_cpu(cpu_seconds)
                photo = decode_photo(bytes(content), max_pixels=max_pixels)
                send_frame(worker, SIZE, pack_size(photo.height, photo.width))
            elif kind == ENCODE:
                send_frame(worker, FILE, _encode(content))
            elif photo is not None:
                height, width = unpack_size(content)
                send_frame(worker, PIXELS, photo.resize((width, height), Image.Resampling.LANCZOS).tobytes())
        except BadInput as error:
            send_frame(worker, REFUSED, str(error).encode(errors="replace")[:MAX_TEXT_BYTES])
        except MemoryError:
            photo = None
            send_frame(worker, NO_MEMORY)


def _encode(content: bytearray) -> bytes:
    wanted, pixels = unpack_picture(content)
    image = Image.frombytes(wanted.mode, (wanted.width, wanted.height), pixels)
    size = (wanted.output_width, wanted.output_height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return encode_photo(image, wanted.image_format, wanted.quality, wanted.record)


def _limit_cpu(seconds: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _bind_to(parent_pid: int) -> None:
    """Die with the worker, however it ends, and not from a Ctrl-C that is meant for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the worker has gone")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the worker ends it, once its jobs are done


def _limit(memory_bytes: int) -> None:
    """Allow no more than decoding needs: so much memory beyond what is in use now, no files, no dumps of memory."""
    in_use_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most_bytes = in_use_bytes + memory_bytes
    # Whoever started the worker may allow less, and that cannot be raised.
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_AS)
    most_bytes = most_bytes if hard_bytes == resource.RLIM_INFINITY else min(most_bytes, hard_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _take_socket() -> socket.socket:
    """Take the socket from standard input and output, where nothing that prints could then reach it."""
    worker = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return worker


def main() -> None:
    """Serve the worker that started this process: `PARENT_PID MAX_PIXELS MEMORY_BYTES CPU_SECONDS`."""
    parent_pid, max_pixels, memory_bytes, cpu_seconds = (int(argument) for argument in sys.argv[1:])
    _bind_to(parent_pid)
    worker = _take_socket()
    _limit(memory_bytes)
    with suppress(ConnectionError):  # the worker has gone
        send_frame(worker, HELLO)  # from here on an end may be a photo's fault
        serve(worker, max_pixels=max_pixels, cpu_seconds=cpu_seconds)
    os._exit(0)  # leaves nothing to be written at the end, since nothing may be


if __name__ == "__main__":
    main()
