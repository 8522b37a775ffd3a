"""Real decoding processes: they give what the decoder gives in this process, and no photo brings down more than one."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from pipelines.errors import BadInput
from pipelines.photos import decode_photo, encode_photo
from server.worker import decoding
from server.worker.decoding import DecoderFailed, Decoders
from server.worker.decoding_child import serve
from server.worker.decoding_frames import (
    DECODE,
    REFUSED,
    SIZE,
    Encoding,
    pack_size,
    receive_frame,
    send_frame,
    unpack_size,
)
from server.worker.run_job import final_code, is_expected

MAX_PIXELS = 100_000_000
NUM_PHOTOS = 50
ORIENTATION = 0x0112
SMALL = (40, 56)


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    """Between failures of decoders, whose number then tells as much."""
    monkeypatch.setattr(decoding, "REST_SECONDS", 0.1)


def one_size(_height, _width):
    return [SMALL]


def answer(peer, max_bytes):
    """Wait for a frame that must come."""
    frame = receive_frame(peer, max_bytes=max_bytes)
    assert frame is not None
    return frame


def make(num_processes=1, **limits):
    return closing(Decoders(num_processes, max_pixels=MAX_PIXELS, max_file_bytes=10**8, **limits))


def encoded(image, image_format, **options):
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def drawn_photo(chance):
    """Draw a photo of any kind that the decoder takes."""
    image_format = chance.choice(["JPEG", "PNG", "WEBP"])
    modes = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "L", "LA", "P", "1"], "WEBP": ["RGB", "RGBA"]}
    height, width = (int(side) for side in chance.integers(16, 200, 2))
    noise = Image.fromarray(chance.integers(0, 256, (9, 12, 4), dtype=np.uint8)).resize((width, height))
    exif = Image.Exif()
    exif[ORIENTATION] = int(chance.integers(1, 9))
    return encoded(noise.convert(chance.choice(modes[image_format])), image_format, exif=exif)


def endless_photo():
    """Make a small file that takes minutes to decode: the same scan of a large progressive JPEG, again and again."""
    data = encoded(Image.new("L", (8000, 8000), 128), "JPEG", progressive=True)
    scans = data.split(b"\xff\xda")
    repeated = scans[2].rsplit(b"\xff\xc4", 1)[0]  # without the table of the next scan
    return b"\xff\xda".join([*scans[:2], *[repeated] * 20_000]) + b"\xff\xd9"


def bomb():
    """Make a small file that says that it has far more pixels than any decoder may unpack."""
    data = encoded(Image.new("1", (9, 9)), "PNG")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


BAD_FILES = {
    "empty": b"",
    "text": b"GIF89a is not taken",
    "cut off": encoded(Image.new("RGB", (300, 300)), "JPEG")[:700],
    "bomb": bomb(),
    "animated": encoded(Image.new("L", (9, 9)), "PNG", save_all=True, append_images=[Image.new("L", (9, 9), 255)]),
}


def test_decoders_give_what_decode_photo_gives(decoders):
    """Many photos of all kinds, several at once: size and scaled pixels are those of the whole photo, to the bit."""
    chance = np.random.default_rng(5)
    files = [drawn_photo(chance) for _ in range(NUM_PHOTOS)]

    def stage(data):
        return decoders.stage(data, lambda height, width: [SMALL, (height, width), (width, 96)])

    with ThreadPoolExecutor(3) as pool:
        staged = list(pool.map(stage, files))
        assert len(decoders.for_photos.pids) == 2  # those that a thread of the pool has started end with it

    for photo, data in zip(staged, files, strict=True):
        whole = decode_photo(data, max_pixels=MAX_PIXELS)
        assert photo.size == whole.size
        for height, width in (SMALL, (whole.height, whole.width), (whole.width, 96)):
            pictures = [one.resize((width, height), Image.Resampling.LANCZOS) for one in (photo, whole)]
            assert pictures[0].mode == "RGB"
            assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_files_are_refused_in_the_same_words(decoders, name):
    """What `decode_photo` says of a bad file reaches the job as it is, and costs no process."""
    pids = decoders.for_photos.pids
    with pytest.raises(BadInput) as expected:
        decode_photo(BAD_FILES[name], max_pixels=MAX_PIXELS)

    with pytest.raises(BadInput) as refused:
        decoders.stage(BAD_FILES[name], one_size)

    assert str(refused.value) == str(expected.value)
    assert decoders.for_photos.pids == pids


def test_photo_outlives_a_decoder_that_is_killed(wait_until):
    """A decoder killed with a photo in it is replaced, and the photo decoded again; one killed idle costs nothing."""
    data = encoded(Image.new("RGB", (300, 200), "red"), "PNG")
    with make() as decoders:
        decoders.stage(data, one_size)
        first = decoders.for_photos.pids[0]
        os.kill(first, signal.SIGSTOP)  # so that it surely has the photo when it is killed
        staged = []
        thread = threading.Thread(target=lambda: staged.append(decoders.stage(data, one_size)))
        thread.start()
        wait_until(lambda: decoders.for_photos.num_idle == 0)
        os.kill(first, signal.SIGKILL)
        thread.join()
        assert staged[0].size == (300, 200)
        assert first not in decoders.for_photos.pids

        # That thread's end was the end of the second decoder too, which then was idle.
        wait_until(lambda: not decoders.for_photos.pids)
        assert decoders.stage(data, one_size).size == (300, 200)


@pytest.mark.parametrize(
    ("signum", "error", "text"),
    [
        (signal.SIGSEGV, BadInput, r"^the image could not be decoded: the decoder crashed$"),
        (signal.SIGKILL, DecoderFailed, r"^the decoder was killed: its exit status is -9$"),
    ],
)
def test_photo_is_to_blame_for_two_crashes_but_not_for_two_kills(is_gone, signum, error, text):
    """It is tried twice and no more; what only a full machine does is our error, and the job is retried."""
    data = encoded(Image.new("RGB", (300, 200), "red"), "PNG")
    ended = []
    with make() as decoders:

        def end(_height, _width):
            ended.extend(decoders.for_photos.pids)
            os.kill(ended[-1], signum)
            return [SMALL]

        with capture_logs() as logs, pytest.raises(error, match=text) as raised:
            decoders.stage(data, end)
        rests = [line["rest_seconds"] for line in logs if line["event"] == "decoder.failed"]
        assert rests == ([] if error is BadInput else pytest.approx([0.1, 0.2]))
        assert final_code(raised.value) == ("invalid_input" if error is BadInput else None)
        assert is_expected(raised.value) == (error is BadInput)
        assert len(set(ended)) == 2
        assert all(is_gone(pid) for pid in ended)
        assert decoders.stage(data, one_size).size == (300, 200)


def test_no_photo_is_to_blame_for_a_decoder_that_cannot_start(monkeypatch, tmp_path):
    """One that cannot be spawned, or ends before its hello, is tried ever less often, and takes photos once it can."""
    data = encoded(Image.new("L", (64, 64)), "PNG")
    (tmp_path / "PIL.py").write_text("raise ImportError('broken')")
    with capture_logs() as logs:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", str(tmp_path / "python"))
            decoders = Decoders(1, max_pixels=MAX_PIXELS, max_file_bytes=10**8)
        with closing(decoders):
            with monkeypatch.context() as broken:
                broken.setenv("PYTHONPATH", str(tmp_path))
                started = time.monotonic()
                with pytest.raises(DecoderFailed, match="the decoder did not start: its exit status is 1") as raised:
                    decoders.stage(data, one_size)
            assert time.monotonic() - started > 0.2
            assert final_code(raised.value) is None
            assert decoders.for_photos.pids == []
            assert decoders.stage(data, one_size).size == (64, 64)
    rests = [line["rest_seconds"] for line in logs if line["event"] == "decoder.failed"]
    assert rests == pytest.approx([0.1, 0.2, 0.4])


def test_endless_photo_is_refused_at_once():
    """A file that is small, but made to take for ever, is given up when its time on the processor is over, once."""
    with make(cpu_seconds=1) as decoders:
        with capture_logs() as logs, pytest.raises(BadInput, match="took more than 1 s of the processor's time"):
            decoders.stage(endless_photo(), one_size)
        assert [line["event"] for line in logs] == ["decoder.replaced"]
        assert decoders.stage(encoded(Image.new("L", (64, 64)), "PNG"), one_size).size == (64, 64)


def test_results_do_not_wait_for_photos(wait_until):
    """While photos have all their processes, results are encoded, in one that no photo has been in."""
    image = Image.new("RGB", (64, 48), "red")
    data = encoded(image, "PNG")
    with make() as decoders:
        assert decoders.for_results.pids == []  # until there is a result
        decoders.stage(data, one_size)
        (slow,) = decoders.for_photos.pids
        os.kill(slow, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as pool:
            staged = pool.submit(decoders.stage, data, one_size)
            wait_until(lambda: decoders.for_photos.num_idle == 0)
            made = pool.submit(decoders.encode, image, Encoding("RGB", 48, 64, 48, 64, "png", 80, None))
            try:
                assert made.result(60) == encode_photo(image, "png")
                assert not staged.done()
            finally:
                os.kill(slow, signal.SIGCONT)
            assert staged.result().size == (64, 48)
            assert decoders.for_photos.pids == [slow]
            assert len(decoders.for_results.pids) == 1


def test_decoder_that_does_nothing_is_given_up():
    """Not even the processor's time passes for a process that is stopped: the worker's own patience ends it."""
    with make(patience_seconds=1) as decoders:

        def stop(_height, _width):
            os.kill(decoders.for_photos.pids[0], signal.SIGSTOP)
            return [SMALL]

        with pytest.raises(DecoderFailed, match="the decoder took more than 1 s"):
            decoders.stage(encoded(Image.new("L", (64, 64)), "PNG"), stop)
        assert decoders.for_photos.pids == []


def test_photo_that_needs_too_much_memory_is_refused():
    """A small file of many pixels meets the decoder's limit, not the machine's; others are decoded."""
    large = encoded(Image.new("RGBA", (5000, 5000)), "PNG")
    assert len(large) < 10**6
    with make(memory_bytes=100 * 2**20) as decoders:
        with pytest.raises(BadInput, match="the decoder ran out of memory"):
            decoders.stage(large, one_size)
        assert decoders.stage(encoded(Image.new("L", (64, 64)), "PNG"), one_size).size == (64, 64)


RECORD = {"job_id": "a", "prompt": "hell\ud800é 🪑", "params": {"seed": 7, "guidance_scale": 2.5}, "loras": []}


@pytest.mark.parametrize(
    ("image_format", "mode"), [("webp", "RGB"), ("webp", "RGBA"), ("png", "RGB"), ("png", "RGBA"), ("jpeg", "RGB")]
)
def test_results_are_encoded_as_encode_photo_does(decoders, image_format, mode):
    """At their own size and scaled, with a record and without: the file is the same to the byte."""
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, len(mode)), dtype=np.uint8)
    image = Image.fromarray(noise)
    for height, width, record in ((48, 64, RECORD), (100, 80, None)):
        encoding = Encoding(mode, 48, 64, height, width, image_format, 77, record)
        expected = image.resize((width, height), Image.Resampling.LANCZOS)
        assert decoders.encode(image, encoding) == encode_photo(expected, image_format, 77, record)


def test_result_outlives_a_decoder_that_is_killed_and_a_format_that_cannot_hold_it_is_told(wait_until):
    """An encoder killed in the midst costs nothing the first time, and is an error of ours the second."""
    image = Image.new("RGB", (64, 48), "red")
    encoding = Encoding("RGB", 48, 64, 48, 64, "png", 80, None)
    made = []
    with make() as decoders:
        decoders.encode(image, encoding)
        first = decoders.for_results.pids[0]
        os.kill(first, signal.SIGSTOP)  # so that it surely has the picture when it is killed
        thread = threading.Thread(target=lambda: made.append(decoders.encode(image, encoding)))
        thread.start()
        wait_until(lambda: decoders.for_results.num_idle == 0)
        os.kill(first, signal.SIGKILL)
        thread.join()
        assert made == [encode_photo(image, "png")]
        with pytest.raises(BadInput, match="webp holds at most 16383 pixels a side"):
            decoders.encode(image, Encoding("RGB", 48, 64, 8, 20_000, "webp", 80, None))

    large = Image.new("RGB", (2000, 1500), "red")  # more than a socket holds
    with make(patience_seconds=1e-6) as decoders, pytest.raises(DecoderFailed, match="the decoder took more than"):
        decoders.encode(large, Encoding("RGB", 1500, 2000, 1500, 2000, "png", 80, None))


def test_refusal_while_a_photo_is_in_the_decoder_costs_no_process():
    """Where the photo's size is what refuses the job, the same decoder takes the next photo."""
    data = encoded(Image.new("RGB", (300, 200), "red"), "PNG")

    def refuse(height, width):
        raise BadInput(f"{width} x {height} is not wanted")

    with make() as decoders:
        pids = decoders.for_photos.pids
        with pytest.raises(BadInput, match="300 x 200 is not wanted"):
            decoders.stage(data, refuse)
        assert decoders.stage(data, one_size).size == (300, 200)
        assert decoders.for_photos.pids == pids


def test_decoder_ends_with_its_worker_and_not_before(is_gone, wait_until, monkeypatch):
    """It has a session of its own, no secret of the worker's, and goes when the worker does, however it is killed."""
    code = "import time; from server.worker.decoding import *\n"
    code += "made = Decoders(1, max_pixels=10**6, max_file_bytes=10**6)\n"
    code += "print(made.for_photos.pids[0], flush=True)\ntime.sleep(999)"
    monkeypatch.setenv("RESTAGE__STORE__SECRET_KEY", "a-secret")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        wait_until(lambda: b"decoding_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
        assert os.getsid(pid) == pid
        assert b"a-secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        worker.kill()
    wait_until(lambda: is_gone(pid))


def test_frames_are_answered_one_by_one_until_the_worker_closes():
    """The loop of the process, here in a thread: a refusal leaves it ready for the next photo, and a close ends it."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs,), kwargs={"max_pixels": 10**4, "cpu_seconds": None})
    thread.start()
    with ours, theirs:
        send_frame(ours, DECODE, encoded(Image.new("L", (200, 200)), "PNG"))
        kind, text = answer(ours, 1000)
        assert (kind, b"at most 10000" in text) == (REFUSED, True)
        send_frame(ours, DECODE, encoded(Image.new("L", (70, 50)), "PNG"))
        kind, size = answer(ours, 8)
        assert (kind, unpack_size(size)) == (SIZE, (50, 70))
        send_frame(ours, b"S", pack_size(16, 32))
        _, pixels = answer(ours, 16 * 32 * 3)
        assert bytes(pixels) == bytes(16 * 32 * 3)
        ours.shutdown(socket.SHUT_WR)
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"P" + (2**60).to_bytes(8, "big"), "more than the 10 that it may have"),
        (b"P" + (9).to_bytes(8, "big") + b"1234", "cut off"),
        (b"P" + (9).to_bytes(8, "big"), "ends after its header"),
        (b"P\0\0", "cut off"),
    ],
)
def test_frames_of_a_peer_that_lies_or_dies_are_refused(sent, error):
    """No memory is taken for a length that cannot be, and half a frame is none."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(sent)
        with pytest.raises(ConnectionError, match=error):
            receive_frame(ours, max_bytes=10)
