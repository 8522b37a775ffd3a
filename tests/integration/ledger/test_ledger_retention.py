"""Stories of what goes: photos, results and records after their time, a deleted batch at once, and the trash."""

from collections.abc import Callable
from typing import Any

import pytest

from server.jobs import BatchStatus, Job, JobStatus
from tests.integration.ledger.kit import ORPHANS_SECONDS, record


def end_by_failing(ledger: Any, job: Job) -> None:
    """Let the worker give the job up."""
    ledger.fail(job)


def end_by_giving_back(ledger: Any, job: Job) -> None:
    """Let the worker stop."""
    answer = ledger.worker().retry(
        job.id, job.fence, delay_seconds=0, counts=False, max_errors=1, code="shutdown", detail=""
    )
    assert answer == "ok"


def end_by_cancelling(ledger: Any, job: Job) -> None:
    """Let the user cancel the job before the worker hands in its result."""
    assert ledger.run(ledger.api.cancel("ana", [job.id])) == ["requested"]
    assert ledger.commit(job) == "cancelled"


def end_by_dying(ledger: Any, job: Job) -> None:
    """Let the lease run out."""
    ledger.sweep_for_a_lease()
    assert ledger.job(job.id).status == JobStatus.QUEUED


def end_by_poisoning(ledger: Any, job: Job) -> None:
    """Let the worker die while the job is on its device, for the third time."""
    ledger.client.hset(f"{ledger.prefix}:job:{job.id}", "device_deaths", 2)
    ledger.worker().start(job.id, job.fence, on_device=True)
    ledger.sweep_for_a_lease()
    assert ledger.job(job.id).error.code == "poisoned"


def test_photos_results_and_records_go_in_turn(ledger: Any) -> None:
    """Each goes after its own time, counted from the end of the batch, and its object with it."""
    ledger.finish("b1", ["qwen", "qwen"])
    ledger.pass_time(300)
    assert ledger.expire() == {}
    ledger.pass_time(100)
    assert ledger.expire() == {"inputs": 1, "uploads": 2}
    assert ledger.trash() == {"uploads/key of b1-upload-0", "uploads/key of b1-upload-1"}
    assert ledger.job("b1-0").output is not None

    ledger.pass_time(100)
    assert ledger.expire() == {"outputs": 1}
    objects = ("1/output.webp", "done.json")
    assert ledger.trash() == {f"outputs/b1-{index}/{name}" for index in (0, 1) for name in objects}
    batch = ledger.read("b1")
    assert batch.status == BatchStatus.FINISHED
    assert [(job.status, job.output) for job in batch.jobs] == [(JobStatus.SUCCEEDED, None)] * 2
    # What the batch waits for next is the end of its records; nothing goes twice.
    assert ledger.expire() == {}

    ledger.pass_time(400)
    assert ledger.expire() == {}
    ledger.pass_time(100)
    assert ledger.expire() == {"records": 1}
    assert ledger.run(ledger.api.read_batch("b1")) is None
    assert ledger.run(ledger.api.read_job("b1-0")) is None
    assert ledger.keys() == ["changes", "control", "models", "schema", "speed:qwen"]


def test_after_a_long_outage_all_goes_at_once(ledger: Any) -> None:
    """A janitor that comes when everything is due takes it in one call."""
    ledger.finish("b1", ["qwen"])
    ledger.pass_time(2000)
    assert ledger.expire() == {"inputs": 1, "outputs": 1, "records": 1, "uploads": 1}
    assert ledger.trash() == {"uploads/key of b1-upload-0", "outputs/b1-0/1/output.webp", "outputs/b1-0/done.json"}
    assert ledger.expire() == {}


def test_a_retry_after_the_photos_have_gone_is_refused(ledger: Any) -> None:
    """The job stays as it was, and so does its batch."""
    ledger.accept("b1", ["qwen"])
    ledger.fail(ledger.claim(["qwen"]))
    ledger.pass_time(400)
    assert ledger.expire() == {"inputs": 1, "uploads": 1}
    before = ledger.read("b1")
    assert ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99)) == ["expired"]
    assert ledger.read("b1") == before
    assert ledger.worker().claim(["qwen"], num_held=0) is None


def test_a_retry_before_that_keeps_everything(ledger: Any) -> None:
    """An open batch expires in no way; when it has ended again, all times begin anew."""
    ledger.accept("b1", ["qwen", "qwen"])
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    ledger.fail(ledger.claim(["qwen"]))
    ledger.pass_time(300)
    assert ledger.run(ledger.api.reopen("ana", ["b1-1"], max_open_jobs=99)) == ["queued"]
    ledger.pass_time(2000)
    assert ledger.expire() == {}
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    ledger.pass_time(300)
    assert ledger.expire() == {}
    ledger.pass_time(200)
    assert ledger.expire() == {"inputs": 1, "outputs": 1, "uploads": 2}
    assert {"outputs/b1-0/1/output.webp", "outputs/b1-1/2/output.webp"} <= ledger.trash()


def test_nothing_is_left_of_a_batch(ledger: Any) -> None:
    """Of jobs that ended in every way, of two rounds, and of a webhook, no key stays."""
    ledger.accept("b1", ["qwen"] * 3, hook=True)
    assert ledger.run(ledger.api.cancel("ana", ["b1-2"])) == ["cancelled"]
    ledger.fail(ledger.claim(["qwen"]))
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    assert ledger.run(ledger.api.reopen("ana", ["b1-0"], max_open_jobs=99)) == ["queued"]
    ledger.fail(ledger.claim(["qwen"]))
    ledger.run(ledger.api.take_webhooks(limit=1, lease_seconds=60))
    outcome = {"outcome": "gave_up", "http_status": 404, "detail": None, "delay_seconds": None}
    ledger.run(ledger.api.note_delivery("b1", 1, 1, **outcome))
    ledger.pass_time(1000)
    assert ledger.expire() == {"inputs": 1, "outputs": 1, "records": 1, "uploads": 3}
    assert len(ledger.trash()) == 7
    assert ledger.keys() == ["changes", "control", "models", "schema", "speed:qwen"]


def test_a_finished_batch_is_deleted_at_once(ledger: Any) -> None:
    """Records and results go, a follower is woken, and the photo goes with its last batch."""
    ledger.finish("b1", ["qwen"])
    position = ledger.run(ledger.api.changes_position())
    ledger.pass_time(300)  # the form is over
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "deleted"
    assert ledger.run(ledger.api.read_batch("b1")) is None
    assert ledger.run(ledger.api.wait_for_changes(position, block_seconds=1))[1] == {"b1"}
    assert ledger.expire() == {"uploads": 1}
    assert ledger.trash() == {"uploads/key of b1-upload-0", "outputs/b1-0/1/output.webp", "outputs/b1-0/done.json"}
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "unknown"
    # Nothing is left that would be due later.
    ledger.pass_time(3000)
    assert ledger.expire() == {}


def test_only_a_finished_batch_of_ones_own_is_deleted(ledger: Any) -> None:
    """An open batch stays; what is somebody else's looks as if it were not there; an admin may delete any."""
    ledger.accept("b1", ["qwen"])
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "open"
    job = ledger.claim(["qwen"])
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "open"
    ledger.commit(job)
    assert ledger.run(ledger.api.delete_batch("bo", "b1")) == "unknown"
    assert ledger.run(ledger.api.delete_batch("ana", "b-none")) == "unknown"
    assert ledger.read("b1").status == BatchStatus.FINISHED
    assert ledger.run(ledger.api.delete_batch("", "b1")) == "deleted"


def test_deleting_leaves_what_another_batch_needs(ledger: Any) -> None:
    """A shared photo stays, and the other batch runs on."""
    ledger.finish("b1", ["qwen"])
    other = ledger.with_uploads(ledger.batch("b2", ["qwen"]), [["b1-upload-0"]])
    assert ledger.submit(other).kind == "accepted"
    ledger.pass_time(300)
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "deleted"
    assert ledger.expire() == {}
    assert ledger.upload("b1-upload-0").references == 1
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"


def test_a_form_that_outlives_its_batch_does_not_outlive_its_record(ledger: Any) -> None:
    """A photo sent after its batch was deleted is still known, and goes when no form can bring it back."""
    ledger.finish("b1", ["qwen"])
    assert ledger.run(ledger.api.delete_batch("ana", "b1")) == "deleted"
    ledger.pass_time(200)
    assert ledger.expire() == {}
    assert ledger.upload("b1-upload-0").references == 0
    ledger.pass_time(100)
    assert ledger.expire() == {"uploads": 1}
    assert "uploads/key of b1-upload-0" in ledger.trash()


def test_one_call_does_a_bounded_amount(ledger: Any) -> None:
    """A hundred uploads and batches of each kind go in a call, those that were due first before the others."""
    for number in range(102):
        ledger.accept(f"b{number}", ["qwen"])
        assert ledger.run(ledger.api.cancel("ana", [f"b{number}-0"])) == ["cancelled"]
        if number == 99:
            ledger.pass_time(1)
    ledger.announce([record(f"u{number}") for number in range(5)])
    ledger.pass_time(2000)
    assert ledger.expire() == {"inputs": 100, "outputs": 100, "records": 100, "uploads": 100}
    assert ledger.run(ledger.api.read_batch("b99")) is None
    assert ledger.read("b100").id == "b100"
    assert ledger.expire() == {"inputs": 2, "outputs": 2, "records": 2, "uploads": 7}


def test_large_batches_go_a_few_at_a_time(ledger: Any) -> None:
    """Some five hundred jobs of each kind a call, so that Redis serves the others in between."""
    for number in range(12):
        batch = ledger.accept(f"b{number}", ["qwen"] * 50)
        ledger.run(ledger.api.cancel("ana", [job.id for job in batch.jobs]))
    ledger.pass_time(2000)
    assert ledger.expire() == {"inputs": 10, "outputs": 10, "records": 10, "uploads": 100}
    assert ledger.expire() == {"inputs": 2, "outputs": 2, "records": 2, "uploads": 100}
    assert ledger.expire() == {"uploads": 100}


@pytest.mark.parametrize(
    "end",
    [end_by_failing, end_by_giving_back, end_by_cancelling, end_by_dying, end_by_poisoning],
    ids=lambda end: end.__name__.removeprefix("end_by_"),
)
def test_what_a_try_left_is_cleared_away(ledger: Any, end: Callable[[Any, Job], None]) -> None:
    """A try that ends without a result may have written one: all under its name goes, a while after its end."""
    ledger.accept("b1", ["qwen"])
    job = ledger.claim(["qwen"])
    end(ledger, job)
    ledger.pass_time(ORPHANS_SECONDS - 50)
    assert ledger.trash() == set()
    ledger.pass_time(50)
    assert ledger.trash() == {f"outputs/{job.id}/{job.fence}/"}


def test_a_try_with_a_result_is_not_cleared_away(ledger: Any) -> None:
    """The committed result stays, those of the tries before it go."""
    ledger.accept("b1", ["qwen"])
    end_by_giving_back(ledger, ledger.claim(["qwen"]))
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"
    ledger.pass_time(200)
    assert ledger.trash() == {"outputs/b1-0/1/"}
    assert ledger.job("b1-0").output.key == "b1-0/2/output.webp"


def test_a_job_that_never_ran_leaves_nothing(ledger: Any) -> None:
    """Cancelling a queued job puts nothing into the trash."""
    ledger.accept("b1", ["qwen"])
    assert ledger.run(ledger.api.cancel("ana", ["b1-0"])) == ["cancelled"]
    ledger.pass_time(200)
    assert ledger.trash() == set()


def test_trash_is_given_out_again_until_it_is_dropped(ledger: Any) -> None:
    """A janitor that dies with names in its hand loses none; what is due first comes first."""
    for number in range(3):
        ledger.announce([record(f"u{number}")], form_seconds=0, unused_seconds=10 * number)
    ledger.pass_time(100)
    assert ledger.expire() == {"uploads": 3}
    api = ledger.api
    ledger.client.zincrby(f"{ledger.prefix}:trash", -1000, "uploads/key of u1")
    assert ledger.run(api.take_trash(limit=1, lease_seconds=50)) == ["uploads/key of u1"]
    assert set(ledger.run(api.take_trash(limit=9, lease_seconds=50))) == {"uploads/key of u0", "uploads/key of u2"}
    assert ledger.run(api.take_trash(limit=9, lease_seconds=50)) == []
    ledger.run(api.drop_trash(["uploads/key of u0", "outputs/never/there"]))
    ledger.run(api.drop_trash([]))
    ledger.pass_time(51)
    assert set(ledger.run(api.take_trash(limit=9, lease_seconds=50))) == {"uploads/key of u1", "uploads/key of u2"}
