"""Redis is set back to an older copy of its file: what was done since is done again, as the store remembers it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from server.embedded import EmbeddedValkey
from server.jobs import BatchStatus, JobStatus
from server.marker import marker_key
from server.reconcile.command import Wanted, reconcile
from server.store import Store
from tests.integration.worker.runner_kit import RunnerKit

BUCKETS = {"RESTAGE__STORE__UPLOADS_BUCKET": "set-back-uploads", "RESTAGE__STORE__OUTPUTS_BUCKET": "set-back-outputs"}


@pytest.fixture
def own_valkey(tmp_path):
    """Give a Valkey that is stopped, set back and started again."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    server.wait_ready()
    yield server
    server.kill()


@pytest.fixture
def kit(own_valkey, new_workers, decoders):
    """Give the stage threads of a worker on this Valkey, and two buckets of their own."""
    workers = new_workers(own_valkey.url, **BUCKETS)
    workers.store = Store(workers.settings.store)
    workers.store.ensure_buckets()
    workers.wait(workers.api.check_schema())
    kit = RunnerKit(workers, workers.store, decoders)
    yield kit
    kit.pool.shutdown()
    workers.store.close()
    assert kit.bugs == []


def claim(kit):
    """Claim and stage the next job."""
    in_hand = kit.hand.take(kit.ledger.claim(kit.workers.registry.ids, num_held=0))
    kit.stage(in_hand)
    return in_hand


def finish(kit, in_hand):
    """Hand in a picture of no special kind."""
    picture = Image.effect_noise((in_hand.params["width"], in_hand.params["height"]), 50).convert("RGB")
    kit.runner.finish(in_hand, picture)
    assert kit.hand.wait_empty(60)


def submit(kit, count):
    """Have a batch accepted; returns its id and those of its jobs."""
    photos = [kit.workers.upload(kit.workers.picture(seed=seed)) for seed in range(count)]
    return kit.workers.submit(*[kit.workers.job(photo) for photo in photos])


def run_reconcile(kit):
    """Run the command as an operator does; returns its exit status and what it found."""
    command = [sys.executable, "-m", "server.cli", "reconcile", "--json"]
    done = subprocess.run(command, env=os.environ | kit.workers.environment | BUCKETS, capture_output=True, check=False)
    assert done.stderr == b""
    *findings, last = map(json.loads, done.stdout.splitlines())
    assert last["summary"]["is_complete"]
    return done.returncode, sorted((one["kind"], one["outcome"], one["job_id"]) for one in findings)


def test_what_was_done_since_is_done_again(kit, own_valkey, tmp_path, pass_time):
    """Finished jobs are what they were, each once, with exact counters and one end; what was not done runs."""
    workers = kit.workers
    batch_id, first, second, third, fourth = submit(kit, 4)
    finish(kit, claim(kit))
    running = claim(kit)
    client = workers._client
    client.bgrewriteaof()
    workers.until("the rewriting", lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    shutil.copytree(own_valkey.data_dir, tmp_path / "copy")

    finish(kit, running)
    finish(kit, claim(kit))
    _, unknown = submit(kit, 1)
    later = claim(kit)  # the fourth of the first batch, older than the new one
    assert later.job.id == fourth
    kit.hand.release(later)
    finish(kit, claim(kit))
    before = {job_id: workers.read(job_id) for job_id in (first, second, third)}
    assert {job.status for job in before.values()} == {JobStatus.SUCCEEDED}
    assert workers.read(unknown).status is JobStatus.SUCCEEDED

    own_valkey.kill()
    shutil.rmtree(own_valkey.data_dir)
    shutil.copytree(tmp_path / "copy", own_valkey.data_dir)
    own_valkey.start()
    own_valkey.wait_ready()
    assert [workers.field(job_id, "status") for job_id in (second, third, fourth)] == ["running", "queued", "queued"]
    # The sweep takes back what nobody holds, and puts all that the try has written into the trash.
    pass_time(client, 200)
    workers.until("the sweep", lambda: workers.read(second).status is JobStatus.QUEUED)
    assert client.zscore("restage:trash", f"outputs/{second}/1/")

    assert reconcile(workers.settings, Wanted(is_dry=True, reads_bytes=True, grace_seconds=0, as_json=True)) == 1
    assert workers.read(second).status is JobStatus.QUEUED
    repaired = [("unfinished_job", "repaired", job_id) for job_id in sorted((second, third))]
    assert run_reconcile(kit) == (1, [*repaired, ("unknown_job", "left", unknown)])
    assert run_reconcile(kit) == (1, [("unknown_job", "left", unknown)])

    assert {job_id: workers.read(job_id) for job_id in before} == before
    assert client.zrange("restage:trash", 0, -1) == []
    batch = workers.wait(workers.api.read_batch(batch_id))
    assert (batch.status, batch.counts) == (BatchStatus.RUNNING, expected_counts(queued=1, succeeded=3))

    last = claim(kit)
    assert last.job.id == fourth
    finish(kit, last)
    batch = workers.wait(workers.api.read_batch(batch_id))
    assert (batch.status, batch.counts) == (BatchStatus.FINISHED, expected_counts(succeeded=4))
    events = Counter(workers.events(batch_id))
    assert (events["job.succeeded"], events["batch.finished"]) == (4, 1)
    for job_id in (first, second, third, fourth):
        workers.image(workers.read(job_id))
        assert workers.store.inventory.has_output(marker_key(job_id))
    assert kit.ledger.claim(workers.registry.ids, num_held=0) is None


def expected_counts(**counts):
    names = ("queued", "running", "succeeded", "failed", "cancelled")
    return {"total": 4} | dict.fromkeys(names, 0) | counts
