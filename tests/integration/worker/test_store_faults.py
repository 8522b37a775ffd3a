"""The store misbehaves under a job, in every way that a line or a server can: the job waits, goes on, and ends once."""

import hashlib
import io
import threading
import time
from contextlib import ExitStack

import psutil
import pytest
from PIL import Image

from server.jobs import JobStatus
from server.store import Store
from tests.chaos.proxy import Proxy
from tests.integration.worker.runner_kit import RunnerKit

READ_TIMEOUT_SECONDS = 0.3
GET, PUT = b"GET /restage-uploads/", b"PUT /restage-outputs/"
# A call is tried three times: so often that one is not enough.
TIMES = 4


def refusal(status, code):
    """Write an answer of S3's that refuses."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Retry-After: 600\r\nConnection: close\r\n\r\n".encode() + body


def forged(data, etag):
    """Write an answer of S3's with any bytes under any ETag."""
    head = f'HTTP/1.1 200 OK\r\nETag: "{etag}"\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n'
    return f"{head}Connection: close\r\n\r\n".encode() + data


def spoil(proxy, fault, call):
    """Let the line or the store misbehave, for calls of one kind."""
    match fault:
        case "500" | "503":
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            proxy.answer_instead(call, answer=refusal(fault, code), times=TIMES)
        case "reset":
            proxy.lose_replies(call, times=TIMES)
        case "reset in its midst":
            proxy.lose_replies(call, times=2, after_bytes=300 if call == GET else 5)
        case "silence":
            proxy.black_hole()
            # All that was sent arrives then, though nobody waits for the answers any more.
            threading.Timer(2.5 * READ_TIMEOUT_SECONDS, proxy.pass_again).start()
        case "slow":
            proxy.slow(10_000)


@pytest.fixture
def spoil_store(s3, workers, decoders):
    """Give a function that makes a proxy before the shared store, and a runner whose store is behind it."""
    with ExitStack() as opened:

        def make(**changes):
            proxy = opened.enter_context(Proxy(s3.server.ports[0]))
            store = Store(s3.settings.model_copy(update={"endpoint": proxy.address} | changes))
            opened.callback(store.close)
            kit = RunnerKit(workers, store, decoders)
            opened.callback(kit.pool.shutdown)
            opened.callback(proxy.heal)
            return proxy, kit

        yield make


@pytest.fixture
def spoiled(spoil_store):
    """Give a proxy, and a runner whose store is behind it; jobs and what became of them are seen directly."""
    proxy, kit = spoil_store(read_timeout_seconds=READ_TIMEOUT_SECONDS)
    yield proxy, kit
    assert kit.bugs == []


def noisy_photo():
    """Return a photo of some ten thousand bytes."""
    buffer = io.BytesIO()
    Image.effect_noise((128, 96), 100).save(buffer, "PNG")
    return buffer.getvalue()


def check_succeeded(kit, job_id):
    """A result is committed once, is the only object, and holds the very bytes that its record tells."""
    job = kit.workers.read(job_id)
    assert (job.status, job.attempts, job.error) == (JobStatus.SUCCEEDED, 1, None)
    assert kit.workers.field(job_id, "errors") == "0"
    assert kit.workers.events(job.batch_id).count("job.succeeded") == 1
    assert kit.workers.outputs(job_id) == [job.output.key]
    data = kit.workers.store.read_output(job.output.key)
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (job.output.sha256, job.output.size_bytes)


def test_job_outlives_every_trouble_with_the_store(spoiled):
    """Refusals, resets, silence, a slow line, on the way in and on the way out: one try, one result, nothing else.

    No connection and no thread stays behind.
    """
    proxy, kit = spoiled
    troubles = [
        ("500", "503"),
        ("reset", "reset in its midst"),
        ("reset in its midst", "reset"),
        ("silence", "silence"),
        ("slow", "slow"),
    ]
    held = []
    for on_way_in, on_way_out in troubles:
        in_hand = kit.claim(data=noisy_photo())
        began = time.monotonic()
        spoil(proxy, on_way_in, GET)
        kit.stage(in_hand)
        spoil(proxy, on_way_out, PUT)
        kit.finish(in_hand)
        print(f"{on_way_in}, {on_way_out}: {time.monotonic() - began:.1f} s")  # noqa: T201
        assert proxy.num_to_lose == 0
        proxy.heal()
        check_succeeded(kit, in_hand.job.id)
        held.append((psutil.Process().num_fds(), threading.active_count()))
    assert held[-1][0] <= held[0][0] + 4, held  # a connection or two more may be kept for the next call
    assert held[-1][1] <= held[0][1] + 1, held


def test_line_that_is_too_slow_for_a_photo_fails_the_job_by_name(spoil_store):
    """Bytes come, but too few: the try ends in time, costs an error, and after the last one the job says why."""
    proxy, kit = spoil_store(read_timeout_seconds=10, transfer_timeout_seconds=0.5)
    kit.runner._settings = kit.runner._settings.model_copy(update={"job_timeout_seconds": 0.3, "max_errors": 1})
    in_hand = kit.claim(data=noisy_photo())
    began = time.monotonic()
    proxy.slow(1000)
    kit.runner.begin(in_hand, kit.staged.put)
    assert kit.hand.wait_empty(60)

    assert time.monotonic() - began < 10 * (0.5 + 0.3)
    job = kit.workers.read(in_hand.job.id)
    assert (job.status, job.error.code, job.output) == (JobStatus.FAILED, "store_unavailable", None)
    assert kit.bugs == []


def test_wrong_bytes_never_become_a_result(spoiled):
    """A photo of another ETag, or of its ETag and other bytes, fails the job by name, and leaves no object."""
    proxy, kit = spoiled
    other = kit.workers.picture(seed=5)
    for etag in ("0" * 32, None):
        in_hand = kit.claim(has_digest=True)
        photo = in_hand.job.inputs[0]
        proxy.answer_instead(GET, answer=forged(other, etag or photo.etag), times=50)
        kit.runner.begin(in_hand, kit.staged.put)
        assert kit.hand.wait_empty(60)
        proxy.heal()

        job = kit.workers.read(in_hand.job.id)
        assert (job.status, job.error.code, job.output) == (JobStatus.FAILED, "input_changed", None)
        assert kit.workers.outputs(job.id) == []
