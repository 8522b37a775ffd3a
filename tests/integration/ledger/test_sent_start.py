"""A START whose answer is read later: what Redis has got counts, whatever becomes of the answer or of the process."""

import subprocess
import sys
from typing import Any

import pytest

from server.errors import LedgerUnavailable
from server.jobs import Job
from server.ledger.worker_side import HeldJob, WorkerLedger

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


def test_lost_answer_is_asked_for_again(ledger: Any) -> None:
    """Where the connection breaks before the answer, the first look raises, and the next says it once more."""
    worker = ledger.worker()
    job = claimed(ledger, worker)
    assert worker.send_start(job.id, job.fence).reply() == "ok"
    ledger.client.client_pause(timeout=500)  # no answer before the connection is cut
    start = worker.send_start(job.id, job.fence)
    assert not start.is_answered
    start._sent._connection._sock.shutdown(2)
    assert start.is_answered  # with its end
    with pytest.raises(LedgerUnavailable):
        start.reply()
    assert not start.is_sent
    assert start.reply() == "ok"
    assert on_device(ledger, job)


def test_process_that_dies_after_sending_has_said_it(ledger: Any, wait_until: Any) -> None:
    """A job that ends its process in the first moment of its first step is suspected all the same."""
    job = claimed(ledger, ledger.worker())
    arguments = (ledger.url, ledger.prefix, job.id, str(job.fence))
    done = subprocess.run([sys.executable, "-c", SEND_AND_DIE, *arguments], check=False, timeout=60)
    assert done.returncode == 9
    wait_until(lambda: on_device(ledger, job))
