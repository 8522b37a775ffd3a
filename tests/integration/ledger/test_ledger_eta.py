"""How long a batch will take, as the ledger tells it: jobs that come first, live workers, measured speeds."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.jobs import Job
from server.ledger.status import WorkerModel, WorkerStatus
from tests.integration.ledger.kit import LedgerKit

MONTH_SECONDS = 30 * 24 * 3600

submissions = st.lists(
    st.tuples(st.sampled_from(("ana", "bo", "cy")), st.sampled_from(("high", "normal", "low")), st.integers(1, 4)),
    min_size=1,
    max_size=6,
)


def announce(ledger: Any, worker_id: str = "w1", *, ready: bool = True) -> None:
    """Let a worker say that it serves qwen."""
    models = {"qwen": WorkerModel(ready=ready), "flux": WorkerModel(ready=False)}
    ledger.worker(worker_id).announce(WorkerStatus(worker_id, "cpu", 1, models))


def measure(ledger: Any, *seconds: float, model: str = "qwen", **steps: float) -> None:
    """Let runs of a model take so long."""
    for number, run_seconds in enumerate(seconds):
        ledger.accept(f"{model}-{run_seconds}-{number}", [model], priority="high")
        speeds = {"run": run_seconds} | {name.replace("_", ":"): one for name, one in steps.items()}
        assert ledger.commit(ledger.claim([model]), speeds=speeds) == "ok"


@given(batches=submissions, num_claimed=st.integers(0, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_estimate_counts_the_claims_that_come_first(
    new_ledger: Callable[[str], LedgerKit], batches: list[tuple[str, str, int]], num_claimed: int
) -> None:
    """For any owners and priorities, one worker claims just as many jobs before a batch's last as were foretold."""
    ledger = new_ledger(f"e{uuid4().hex[:12]}")
    measure(ledger, 1)
    announce(ledger)
    for number, (owner, priority, num_jobs) in enumerate(batches):
        ledger.accept(f"b{number}", ["qwen"] * num_jobs, owner=owner, priority=priority)
    worker = ledger.worker()
    # The line has moved: whoever was served stands at its end.
    running = [job for _ in range(num_claimed) if isinstance(job := worker.claim(["qwen"], num_held=0), Job)]
    told = {f"b{number}": ledger.read(f"b{number}").eta_seconds for number in range(len(batches))}

    claimed: list[str] = []
    while isinstance(job := worker.claim(["qwen"], num_held=0), Job):
        claimed.append(job.batch_id)
    for batch_id, seconds in told.items():
        num_until_last = max((place for place, one in enumerate(claimed, 1) if one == batch_id), default=0)
        # A run takes 1 s, and of those that are under way only the batch's own count.
        assert seconds == num_until_last + sum(job.batch_id == batch_id for job in running), f"{batch_id}: {claimed}"
    ledger.close()


def test_nothing_is_foretold_where_something_is_unknown(ledger: Any) -> None:
    """Without a measured run, a live worker that is ready, or an open job, there is no estimate."""
    ledger.accept("b1", ["qwen"])
    announce(ledger)
    assert ledger.read("b1").eta_seconds is None
    measure(ledger, 3, model="flux")
    assert ledger.read("b1").eta_seconds is None
    measure(ledger, 3)
    assert ledger.read("b1").eta_seconds == 3
    announce(ledger, ready=False)
    assert ledger.read("b1").eta_seconds is None
    announce(ledger)
    ledger.pass_time(31)
    assert ledger.read("b1").eta_seconds is None
    announce(ledger)
    assert ledger.read("b1").eta_seconds == 3
    ledger.fail(ledger.claim(["qwen"]))
    assert ledger.read("b1").eta_seconds is None


def test_an_estimate_needs_every_model_of_the_batch(ledger: Any) -> None:
    """Where nobody serves one of its models, a batch's end is unknown; once those jobs have ended, it is known."""
    measure(ledger, 2)
    measure(ledger, 2, model="flux")
    announce(ledger)
    ledger.accept("b1", ["qwen", "flux"])
    assert ledger.read("b1").eta_seconds is None
    ledger.fail(ledger.claim(["flux"]))
    assert ledger.read("b1").eta_seconds == 2


def test_workers_share_what_waits(ledger: Any) -> None:
    """Two workers are through in half the time."""
    measure(ledger, 2)
    announce(ledger)
    ledger.accept("b1", ["qwen"] * 4)
    assert ledger.read("b1").eta_seconds == 8
    announce(ledger, "w2")
    announce(ledger, "w3", ready=False)
    assert ledger.read("b1").eta_seconds == 4


def test_each_run_counts_a_fifth(ledger: Any) -> None:
    """The first measure is taken as it is, the next ones move it; a result that is handed in twice counts once."""
    announce(ledger)
    measure(ledger, 10)
    ledger.accept("b1", ["qwen", "qwen"])
    assert ledger.read("b1").eta_seconds == 20
    job = ledger.claim(["qwen"])
    for _ in range(2):
        assert ledger.commit(job, speeds={"run": 20.0}) == "ok"
    assert ledger.client.hgetall(f"{ledger.prefix}:speed:qwen") == {"run": "12"}
    assert ledger.read("b1").eta_seconds == 12
    ledger.accept("b2", ["flux"])
    assert ledger.read("b2").eta_seconds is None


def test_sizes_that_were_measured_are_used(ledger: Any) -> None:
    """A job of a known size and number of steps is foretold by its steps."""
    announce(ledger)
    measure(ledger, 10, step_20=0.5)
    params = {"num_inference_steps": 8, "height": 1024, "width": 1024}
    ledger.accept("b1", ["qwen"], params=params)
    assert ledger.read("b1").eta_seconds == 4


def test_a_job_that_waits_for_another_try_is_not_in_the_line(ledger: Any) -> None:
    """It still has to be done, and nobody else's job stands before it there."""
    announce(ledger)
    measure(ledger, 1)
    ledger.accept("b1", ["qwen", "qwen"])
    ledger.accept("b2", ["qwen"] * 3, owner="bo")
    job = ledger.claim(["qwen"])
    later = {"delay_seconds": 250, "counts": True, "max_errors": 3, "code": "x", "detail": ""}
    assert ledger.worker().retry(job.id, 1, **later) == "ok"
    # One job of its own is ready, behind one of the other owner's; the other one waits.
    assert ledger.read("b1").eta_seconds == 3
    for batch_id in ("b2", "b1"):
        job = ledger.claim(["qwen"])
        assert job.batch_id == batch_id
        ledger.commit(job, speeds={"run": 1})
    assert ledger.read("b1").eta_seconds == 1


@pytest.mark.parametrize(("days", "is_known"), [(29, True), (31, False)])
def test_a_model_that_was_not_used_for_long_is_measured_anew(ledger: Any, days: int, is_known: bool) -> None:
    """What was measured more than a month ago says nothing."""
    measure(ledger, 2)
    ledger.pass_time(MONTH_SECONDS * days / 30)
    announce(ledger)
    ledger.accept("b1", ["qwen"])
    assert (ledger.read("b1").eta_seconds is not None) == is_known
