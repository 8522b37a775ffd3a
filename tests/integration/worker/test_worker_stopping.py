"""SIGTERM at a moment at which a worker cannot finish what it does, and a ledger that it may not work on."""

import signal
import threading

import pytest

from server.errors import ConfigError
from server.jobs import JobStatus


def test_sigterm_in_a_load_ends_the_worker(workers):
    """A load cannot be interrupted and nobody needs it any more: the process ends, and the job was never claimed."""
    one_model = {"RESTAGE__WORKER__MAX_RESIDENT_MODELS": "1", "LOAD_SECONDS": "600"}
    worker = workers.start(module="tests.integration.worker.slow_worker", **one_model)
    workers.wait_ready()
    batch_id, job_id = workers.submit(workers.job(workers.upload(workers.picture()), workers.FLUX))
    workers.until("the load", lambda: any(one.loading == workers.FLUX for one in workers.statuses()))

    worker.send_signal(signal.SIGTERM)
    workers.until("the end of the worker", lambda: not worker.is_running)

    assert worker.poll() == 0
    assert "worker.left_threads" in worker.tail()
    job = workers.read(job_id)
    assert (job.status, job.attempts, job.suspect) == (JobStatus.QUEUED, 0, False)
    assert workers.events(batch_id) == []
    assert workers.statuses() == []


def test_a_worker_refuses_the_ledger_of_a_later_version(workers):
    """It ends as one with unusable settings, and says why; where Redis came late, its first look ends it."""
    from server.worker.claimer import Claimer
    from server.worker.patience import Outage
    from tests.integration.worker.test_planner import PlannerKit

    kit = PlannerKit(workers, "w1")
    workers.submit(workers.job(workers.upload(workers.picture())))
    workers._client.set(f"{workers.prefix}:schema", "3000")
    worker = workers.start()
    claimer = Claimer(
        kit.ledger,
        Outage("redis"),
        kit.hand,
        kit.residency,
        settings=kit.lane_kit.settings,
        awake=threading.Event(),
        take=lambda job: pytest.fail(f"it has claimed {job.id}"),
        planner=kit.planner,
    )
    with pytest.raises(ConfigError, match="has schema 3000"):
        claimer.run()
    workers.until("the end of the worker", lambda: not worker.is_running)
    assert worker.poll() == 1
    assert "a later version of Restage wrote it" in worker.tail()
