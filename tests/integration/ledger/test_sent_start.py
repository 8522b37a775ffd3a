"""A START whose answer is read later: what Redis has got counts, whatever becomes of the answer or of the process."""

import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from server.errors import LedgerUnavailable
from server.jobs import Job
from server.ledger.worker_side import HeldJob, WorkerLedger, connect
from server.settings import RedisSettings
from tests.chaos.proxy import Proxy, script_needle

# Sends a START and is gone before it could have read the answer.
SEND_AND_DIE = """
import os, sys
from server.ledger.worker_side import WorkerLedger, connect
from server.settings import RedisSettings
url, prefix, job_id, fence = sys.argv[1:]
ledger = WorkerLedger(connect(RedisSettings(url=url)), worker_id="w1", key_prefix=prefix, lease_seconds=60)
assert ledger.send_start(job_id, int(fence)).is_sent
os._exit(9)
"""


def claimed(ledger: Any, worker: WorkerLedger, batch_id: str = "b1") -> Job:
    """Have a job accepted and claimed."""
    ledger.accept(batch_id, ["qwen"])
    job = worker.claim(["qwen"], num_held=0)
    assert isinstance(job, Job)
    return job


def held(job: Job) -> HeldJob:
    """Return a job as calls name it."""
    return HeldJob(job.id, job.fence)


def on_device(ledger: Any, job: Job) -> bool:
    """Tell whether the ledger holds the job for being on a device."""
    return ledger.client.hget(f"{ledger.prefix}:job:{job.id}", "on_device") == "1"


def test_start_is_answered_as_a_call_that_waits(ledger: Any) -> None:
    """The reply says what became of the job, and the job before has left the device in the same moment."""
    worker = ledger.worker()
    first, second = claimed(ledger, worker), claimed(ledger, worker, "b2")
    start = worker.send_start(first.id, first.fence)
    assert start.reply() == "ok"
    assert on_device(ledger, first)
    start = worker.send_start(second.id, second.fence, instead_of=held(first))
    assert start.reply() == "ok"
    assert (on_device(ledger, first), on_device(ledger, second)) == (False, True)
    ledger.run(ledger.api.cancel("ana", [first.id]))
    assert worker.send_start(first.id, first.fence).reply() == "cancelled"
    assert worker.send_start(second.id, second.fence + 1).reply() == "lost"


def test_answers_do_not_get_mixed_up_with_other_calls(ledger: Any) -> None:
    """While an answer is on its way, the client's other calls use other connections."""
    worker = ledger.worker()
    job = claimed(ledger, worker)
    start = worker.send_start(job.id, job.fence)
    assert worker.renew([held(job)]) == ["ok"]
    assert worker.backlog(["qwen"]).models["qwen"].num_ready == 0
    assert start.is_sent
    assert start.reply() == "ok"
    assert not start.is_sent


def test_redis_that_has_forgotten_the_script_gets_it_again(ledger: Any) -> None:
    """A restart or a flush costs a second call, not the job."""
    worker = ledger.worker()
    job = claimed(ledger, worker)
    assert worker.send_start(job.id, job.fence).reply() == "ok"
    worker.start(job.id, job.fence, on_device=False)
    ledger.client.script_flush()
    start = worker.send_start(job.id, job.fence)
    assert start.is_sent
    assert start.reply() == "ok"
    assert on_device(ledger, job)


def test_process_that_dies_after_sending_has_said_it(ledger: Any, wait_until: Any) -> None:
    """A job that ends its process in the first moment of its first step is suspected all the same."""
    job = claimed(ledger, ledger.worker())
    arguments = (ledger.url, ledger.prefix, job.id, str(job.fence))
    done = subprocess.run([sys.executable, "-c", SEND_AND_DIE, *arguments], check=False, timeout=60)
    assert done.returncode == 9
    wait_until(lambda: on_device(ledger, job))


def test_lost_answers_cost_a_second_call(ledger: Any) -> None:
    """A reply that is lost raises once, and the next look says it again; a reset that is seen first raises nothing.

    The latter is a Redis that was killed with the call unread: from such a connection nothing can even be read.
    """
    port = int(ledger.url.rpartition(":")[2].partition("/")[0])
    with Proxy(port) as proxy, closing(connect(RedisSettings(url=f"redis://{proxy.address}"))) as client:
        worker = WorkerLedger(client, worker_id="w1", key_prefix=ledger.prefix, lease_seconds=60)
        job = claimed(ledger, worker)
        assert worker.send_start(job.id, job.fence).reply() == "ok"

        proxy.lose_replies(script_needle("start"))
        start = worker.send_start(job.id, job.fence)
        with pytest.raises(LedgerUnavailable):
            start.reply()
        assert not start.is_sent
        assert start.reply() == "ok"

        worker.start(job.id, job.fence, on_device=False)
        proxy.black_hole()
        start = worker.send_start(job.id, job.fence)
        assert start.is_sent
        proxy.cut()
        proxy.heal()
        assert not start.is_answered
        assert not start.is_sent
        assert start.reply() == "ok"
        assert on_device(ledger, job)
