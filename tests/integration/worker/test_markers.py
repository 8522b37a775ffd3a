"""What stage threads leave in the store beside a result, and what a store that is too slow costs a job."""

from contextlib import contextmanager

import pytest

from server.errors import ObjectNotFound
from server.jobs import JobOutput, JobStatus
from server.marker import MAX_MARKER_BYTES, decode_marker, marker_key
from server.store import Store
from server.worker.marking import leave_marker
from tests.chaos.proxy import Proxy
from tests.integration.worker.runner_kit import RunnerKit

REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture
def open_runner(workers, decoders):
    """Give a function that makes a runner on a store."""
    opened = []

    def make(store):
        opened.append(RunnerKit(workers, store, decoders))
        return opened[-1]

    yield make
    for kit in opened:
        kit.pool.shutdown()
        assert kit.bugs == []


@contextmanager
def behind_proxy(s3, **changes):
    """Yield a proxy before the shared store, and a Store that goes through it."""
    with Proxy(s3.server.ports[0]) as proxy:
        store = Store(s3.settings.model_copy(update={"endpoint": proxy.address, **changes}))
        try:
            yield proxy, store
        finally:
            store.close()


def run(kit):
    """Take a job through the stage threads; returns how it stands then."""
    in_hand = kit.claim(has_digest=True)
    kit.stage(in_hand)
    in_hand.weights_sha256, in_hand.optimizations = "a" * 64, {"quantization": "int8"}
    kit.finish(in_hand)
    return kit.workers.read(in_hand.job.id)


def read_marker(workers, job_id):
    """Return a job's marker, or None."""
    try:
        return decode_marker(job_id, workers.store.read_marker(marker_key(job_id), MAX_MARKER_BYTES))
    except ObjectNotFound:
        return None


def test_a_result_is_marked_as_the_ledger_recorded_it(open_runner, workers):
    """The marker tells the same as the job's record, to the millisecond."""
    job = run(open_runner(workers.store))
    marker = read_marker(workers, job.id)
    assert marker is not None
    assert (marker.job_id, marker.batch_id, marker.index, marker.owner) == (job.id, job.batch_id, 0, job.owner)
    assert (marker.fence, marker.attempts, marker.worker) == (job.fence, job.attempts, job.worker)
    assert (marker.started_at_ms, marker.finished_at_ms) == (job.started_at_ms, job.finished_at_ms)
    assert marker.output.model_dump() == vars(job.output)
    assert [one.model_dump() for one in marker.inputs] == [vars(one) for one in job.inputs]
    assert (marker.params, marker.timings) == (job.params, job.timings)
    assert (marker.weights_sha256, marker.optimizations) == (job.weights_sha256, job.optimizations)


def test_a_marker_that_cannot_be_written_costs_the_job_nothing(open_runner, workers, s3, capfd):
    """The job is done, its result is there, and the log says what is missing."""
    with behind_proxy(s3) as (proxy, store):
        proxy.answer_instead(b"/done.json HTTP", answer=REFUSAL, times=10)
        job = run(open_runner(store))
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert workers.outputs(job.id) == [job.output.key]
    assert read_marker(workers, job.id) is None
    assert "marker.left_out" in "".join(capfd.readouterr())


def test_no_marker_outlives_its_batch(open_runner, workers, s3):
    """A batch that is deleted between commit and marker, or just before the marker is there, leaves none."""

    class DeletingStore(Store):
        def put_marker(self, key, data):
            job = workers.read(key.partition("/")[0])
            assert workers.wait(workers.api.delete_batch("", job.batch_id)) == "deleted"
            super().put_marker(key, data)

    store = DeletingStore(s3.settings)
    kit = open_runner(store)
    in_hand = kit.claim()
    kit.stage(in_hand)
    kit.finish(in_hand)
    assert workers.read(in_hand.job.id) is None
    assert read_marker(workers, in_hand.job.id) is None
    # It looks before it writes, too: this store would have no batch to delete.
    leave_marker(
        kit.ledger, store, in_hand, JobOutput(f"{in_hand.job.id}/1/output.png", "a" * 64, "image/png", 1, 1, 1)
    )
    assert read_marker(workers, in_hand.job.id) is None
    store.close()


def test_a_job_whose_photo_never_gets_through_ends_with_a_reason(open_runner, workers, s3):
    """A store that is there and too slow costs a job its tries, each bounded in time; then it fails and says why."""
    with behind_proxy(s3, transfer_timeout_seconds=0.3) as (proxy, store):
        kit = open_runner(store)
        kit.runner._settings = kit.runner._settings.model_copy(
            update={"job_timeout_seconds": 0.2, "max_errors": 2, "retry_base_seconds": 0.01}
        )
        in_hand = kit.claim(data=workers.picture(400, 400))
        proxy.slow(1000)
        for error_count in ("1", "2"):
            kit.runner.begin(in_hand, kit.staged.put)
            assert kit.hand.wait_empty(60)
            assert workers.field(in_hand.job.id, "errors") == error_count
            if error_count == "1":
                job = workers.until("the next try", lambda: kit.ledger.claim(workers.registry.ids, num_held=0))
                in_hand = kit.hand.take(job)
    job = workers.read(in_hand.job.id)
    assert (job.status, job.error.code) == (JobStatus.FAILED, "store_unavailable")
    assert "too slow" in job.error.detail
