"""`restage reconcile` finds what ledger and store do not agree on and repairs it: real Valkey, real store."""

import hashlib
import io
import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from server.errors import StoreUnavailable
from server.jobs import JobStatus
from server.marker import marker_key
from server.reconcile.command import Wanted, reconcile
from server.store import Store
from tests.chaos.proxy import Proxy
from tests.integration.ledger.kit import LedgerKit

RESULT = b"x" * 500
RESULT_SHA256 = hashlib.sha256(RESULT).hexdigest()
LOOK = Wanted(is_dry=True, reads_bytes=False, grace_seconds=0, as_json=True)
REPAIR = replace(LOOK, is_dry=False)


class Sides:
    """A ledger and a store of its own buckets, in which things go wrong."""

    def __init__(self, ledger, store, settings):
        self.ledger = ledger
        self.store = store
        self.settings = settings

    def accept(self, batch_id, num_jobs=1, *, model="qwen", has_photos=True):
        """Have a batch accepted, with its photos in the store: announced, sent, and then submitted."""
        batch = self.ledger.batch(batch_id, [model] * num_jobs)
        self.ledger.announce_uploads(batch)
        for job in batch.jobs:
            for photo in job.inputs if has_photos else ():
                self.store.put_upload(photo.key, io.BytesIO(b"photo"), 5, "image/jpeg")
        assert self.ledger.submit(batch).kind == "accepted"
        return batch

    def write(self, key, data=RESULT):
        """Store something in the outputs bucket."""
        self.store.put_output(key, data, "image/webp")

    def mark(self, job_id, batch_id, *, fence=1, sha256=RESULT_SHA256, owner="ana", photos=()):
        """Leave a marker as a worker does."""
        marker = self.ledger.marker(job_id, batch_id, owner, fence, [*photos] or [f"{batch_id}-upload-0"])
        marker = marker.model_copy(update={"output": marker.output.model_copy(update={"sha256": sha256})})
        self.store.put_marker(marker_key(job_id), marker.encode())
        return marker

    def finish(self, batch_id):
        """Bring a batch of one job to its end, with all that belongs to it; returns the job."""
        self.accept(batch_id)
        job = self.ledger.claim(["qwen"])
        self.write(f"{job.id}/1/output.webp")
        assert self.ledger.commit(job) == "ok"
        self.mark(job.id, batch_id)
        return job


@pytest.fixture
def sides(valkey, s3, settings_for):
    """Give an empty ledger and two empty buckets."""
    name = secrets.token_hex(4)
    buckets = {"UPLOADS_BUCKET": f"up-{name}", "OUTPUTS_BUCKET": f"out-{name}"}
    settings = settings_for(valkey=valkey, s3=s3, **{f"RESTAGE__STORE__{key}": value for key, value in buckets.items()})
    store = Store(settings.store)
    store.ensure_buckets()
    kit = LedgerKit(valkey.url)
    kit.run(kit.api.check_schema())
    yield Sides(kit, store, settings)
    kit.close()
    store.close()


@pytest.fixture
def compare(sides, capsys):
    """Give a function that compares; it returns the exit status, {(kind, outcome, subject)} and the summary."""

    def run(wanted, settings=None):
        status = reconcile(settings or sides.settings, wanted)
        *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = {(one["kind"], one["outcome"], one.get("job_id") or one["key"]) for one in lines}
        assert len(found) == len(lines)
        return status, found, last["summary"]

    return run


@pytest.fixture
def no_marker_grace(monkeypatch):
    """Let a job count as one that was finished long ago."""
    monkeypatch.setattr("server.reconcile.jobs._MARKER_GRACE_MS", -(10**9))


def test_nothing_is_found_where_all_is_well(sides, compare):
    """Done jobs, running and queued ones, photos that wait, and what is in the trash: status 0, and no finding."""
    for batch_id in ("b1", "b2"):
        sides.finish(batch_id)
    sides.accept("b3", 2)
    running = sides.ledger.claim(["qwen"])
    sides.write(f"{running.id}/{running.fence}/output.webp")
    names = ("outputs/old-1/3/", "uploads/old-2", "outputs/old-3/1/a")
    sides.ledger.client.zadd("restage:trash", dict.fromkeys(names, 9e15))
    for key in ("old-1/3/output.webp", "old-1/3/half.tmp", "old-3/1/a"):
        sides.write(key)
    sides.store.put_upload("old-2", io.BytesIO(b"photo"), 5, "image/jpeg")
    for wanted in (LOOK, REPAIR):
        status, found, summary = compare(wanted)
        assert (status, found) == (0, set())
        assert summary["compared"] == {"jobs": 4, "outputs": 8, "uploads": 5}
        assert (summary["is_complete"], summary["too_young"]) == (True, 0)


def break_jobs(sides):
    """Let jobs name what is not there; returns what can be repaired of it, and what is left."""
    for batch_id in ("b1", "b2", "b3"):
        sides.finish(batch_id)
    sides.store.delete_output("b1-0/1/output.webp")
    sides.write("b2-0/1/output.webp", b"short")
    sides.store.delete_output(marker_key("b3-0"))
    sides.accept("b8", has_photos=False)
    return {("missing_marker", "b3-0"), ("lost_photo", "b8-0")}, {("lost_result", "b1-0"), ("changed_result", "b2-0")}


def leave_strays(sides):
    """Store what nobody names; returns the same."""
    for key in ("b3-0/7/output.webp", "nobody/1/output.webp", "not of ours"):
        sides.write(key)
    sides.store.put_upload("nobody", io.BytesIO(b"photo"), 5, "image/jpeg")
    strays = {("stray_output", "b3-0"), ("stray_output", "nobody"), ("stray_upload", "nobody")}
    return strays, {("foreign_object", "not of ours")}


def leave_markers(sides):
    """Mark as done what the ledger knows otherwise, or not at all; returns the same."""
    for batch_id in ("b4", "b5", "b6", "b7"):
        sides.accept(batch_id)
    sides.write("lost/1/output.webp")
    sides.mark("lost", "lost-batch")
    sides.ledger.run(sides.ledger.api.cancel("ana", ["b4-0"]))
    sides.write("b4-0/1/output.webp")
    sides.mark("b4-0", "b4")
    sides.store.put_marker(marker_key("b5-0"), b'{"version": 1, "job_id"')
    sides.write("b6-0/2/output.webp")
    sides.mark("b6-0", "b6", fence=2)
    sides.write("b7-0/1/output.webp", b"y" * 500)
    sides.mark("b7-0", "b7")
    left = {("unknown_job", "lost"), ("settled_job", "b4-0"), ("bad_marker", "b5-0"), ("unfinished_job", "b7-0")}
    return {("unfinished_job", "b6-0")}, left


def test_every_kind_is_found_and_what_can_be_is_repaired(sides, compare, no_marker_grace, monkeypatch):
    """A dry run changes nothing; then the same is repaired, a second time finds only what is left, pages or not."""
    monkeypatch.setattr("server.store_inventory.PAGE_OBJECTS", 3)
    monkeypatch.setattr("server.ledger.reconciling._BATCHES_A_PAGE", 2)
    repairable, left = map(set.union, break_jobs(sides), leave_strays(sides), leave_markers(sides))

    def expected(outcome):
        return {(kind, outcome, subject) for kind, subject in repairable} | {
            (kind, "left", subject) for kind, subject in left
        }

    keys = sides.ledger.keys()
    for _ in range(2):
        status, found, _ = compare(LOOK)
        assert (status, found) == (1, expected("would_repair"))
        assert sides.ledger.keys() == keys
    status, found, summary = compare(REPAIR)
    assert (status, found) == (1, expected("repaired"))
    assert (summary["repaired"], summary["left"]) == (len(repairable), len(left))
    status, found, _ = compare(REPAIR)
    assert (status, found) == (1, expected("left") - {(kind, "left", subject) for kind, subject in repairable})

    assert sides.ledger.job("b6-0").output.key == "b6-0/2/output.webp"
    assert sides.ledger.events("b6") == ["job.succeeded", "batch.finished"]
    assert sides.ledger.job("b8-0").error.code == "input_missing"
    sides.ledger.pass_time(4000)
    names = sides.ledger.trash()
    assert {"outputs/b3-0/7/output.webp", "outputs/nobody/1/output.webp", "uploads/nobody"} <= names
    assert not {name for name in names if "lost" in name or "b4-0/1" in name or "b6-0" in name}


def test_young_and_unsure_objects_are_left_alone(sides, compare):
    """What may be on its way is no finding, and a ledger that knows no batch at all is no reason to discard it."""
    sides.write("nobody/1/output.webp")
    status, found, summary = compare(replace(REPAIR, grace_seconds=3600))
    assert (status, found, summary["too_young"]) == (0, set(), 1)
    assert compare(REPAIR)[:2] == (1, {("stray_output", "left", "nobody")})
    sides.finish("b1")
    assert compare(REPAIR)[:2] == (0, {("stray_output", "repaired", "nobody")})


def test_bytes_are_compared_where_that_is_wanted(sides, compare):
    """A result of the right size and other bytes is found by reading it."""
    sides.finish("b1")
    assert compare(LOOK)[:2] == (0, set())
    # The ledger of these tests records a digest that no bytes have.
    assert compare(replace(LOOK, reads_bytes=True))[:2] == (1, {("changed_result", "left", "b1-0")})


def claim(sides, batch_id, times=1):
    """Let a worker claim the job of a batch, and give it back before it claims it again."""
    worker = sides.ledger.worker()
    for left in reversed(range(times)):
        job = sides.ledger.claim([f"model of {batch_id}"])
        if left:
            worker.retry(job.id, job.fence, delay_seconds=0, counts=False, max_errors=3, code="x", detail="x")


def cancel_running(sides, batch_id):
    claim(sides, batch_id)
    assert sides.ledger.run(sides.ledger.api.cancel("ana", [f"{batch_id}-0"])) == ["requested"]


def let_lapse(sides, batch_id, worker_id="w1"):
    """Let a worker claim the job of a batch and be cut off for longer than its lease."""
    job = sides.ledger.claim([f"model of {batch_id}"], worker_id)
    sides.ledger.client.zadd("restage:leases", {job.id: 1})


def doom(sides, name):
    """Let the janitor have a name in hand."""
    sides.ledger.client.zadd("restage:trash", {name: int(time.time() * 1000) + 30_000})


MISFITS = {
    "batch": (lambda sides, _: sides.mark("batch-0", "b0"), "another batch"),
    "owner": (lambda sides, _: sides.mark("owner-0", "owner", owner="bo"), "another batch"),
    "photo": (lambda sides, _: sides.mark("photo-0", "photo", photos=["b0-upload-0"]), "another batch"),
    "held": (lambda sides, _: (sides.mark("held-0", "held"), claim(sides, "held")), "just now"),
    "lapsed": (lambda sides, _: (sides.mark("lapsed-0", "lapsed"), let_lapse(sides, "lapsed")), "just now"),
    "doomed": (lambda sides, _: (sides.mark("doomed-0", "doomed"), doom(sides, "outputs/doomed-0/1/")), "just now"),
    "newer": (lambda sides, _: (sides.mark("newer-0", "newer"), claim(sides, "newer", 2)), "more often"),
    "cancelled": (lambda sides, name: (sides.mark(f"{name}-0", name, fence=5), cancel_running(sides, name)), "cancel"),
    "lost": (lambda sides, _: sides.mark("lost-0", "lost", fence=3), "not in the store"),
}


def test_a_marker_that_does_not_fit_finishes_nothing(sides, capsys):
    """Whatever the ledger knows better stays as it is, and the reason is told."""
    for name, (spoil, _) in MISFITS.items():
        sides.accept(name, model=f"model of {name}")
        spoil(sides, name)
        for fence in (1, 2, 5):
            sides.write(f"{name}-0/{fence}/output.webp")
    before = {name: sides.ledger.job(f"{name}-0") for name in MISFITS}
    assert reconcile(sides.settings, REPAIR) == 1
    found = {one["job_id"]: one for one in map(json.loads, capsys.readouterr().out.splitlines()[:-1])}
    assert found.keys() == {f"{name}-0" for name in MISFITS}
    for name, (_, reason) in MISFITS.items():
        assert reason in found[f"{name}-0"]["detail"]
        assert sides.ledger.job(f"{name}-0") == before[name], name


def test_a_worker_that_held_a_finished_job_has_lost_it(sides, compare):
    """A job that was claimed anew under an earlier fence is finished; its worker loses the commit."""
    sides.accept("b1")
    sides.write("b1-0/3/output.webp")
    sides.mark("b1-0", "b1", fence=3)
    job = sides.ledger.claim(["qwen"])
    assert compare(REPAIR)[:2] == (0, {("unfinished_job", "repaired", "b1-0")})
    assert sides.ledger.commit(job) == "lost"
    found = sides.ledger.job("b1-0")
    assert (found.status, found.fence, found.output.key) == (JobStatus.SUCCEEDED, 3, "b1-0/3/output.webp")
    assert sides.ledger.read("b1").counts["succeeded"] == 1
    assert sides.ledger.events("b1") == ["job.started", "job.succeeded", "batch.finished"]


def test_the_worker_that_left_the_mark_does_not_hold_its_job(sides, compare):
    """A job that the copy has as claimed, by the worker that has finished it since, is finished after its lease."""
    sides.accept("b1", model="model of b1")
    sides.write("b1-0/1/output.webp")
    sides.mark("b1-0", "b1")
    let_lapse(sides, "b1", "w9")
    assert compare(REPAIR)[:2] == (0, {("unfinished_job", "repaired", "b1-0")})


def test_what_the_next_try_will_write_to_is_no_stray(sides, compare):
    """After a set-back fences are handed out again: a result is never thrown away by what stood there before."""
    for batch_id in ("b1", "b2"):
        sides.accept(batch_id, model=f"model of {batch_id}")
        sides.write(f"{batch_id}-0/1/output.webp")
    sides.ledger.run(sides.ledger.api.cancel("ana", ["b2-0"]))
    for wanted in (LOOK, REPAIR):
        assert compare(wanted)[:2] == (0, set())
    name = "outputs/b1-0/1/output.webp"
    assert not sides.ledger.run(sides.ledger.reconciler.discard_stray("try", name, "b1-0", "1", delay_seconds=0))
    # What an earlier version has thrown away is taken out by the commit.
    sides.ledger.client.zadd("restage:trash", dict.fromkeys((name, "outputs/b1-0/1/"), 1))
    assert sides.ledger.commit(sides.ledger.claim(["model of b1"])) == "ok"
    assert sides.ledger.trash() == set()


def test_another_ledger_in_the_same_redis_may_name_what_this_one_does_not(sides, compare, valkey):
    """Nothing is thrown away beside another key prefix; names that users chose are not taken for one."""
    sides.finish("b1")
    sides.write("nobody/1/output.webp")
    sides.ledger.client.set("restage:served:schema", "1764000000000")
    other = LedgerKit(valkey.url, prefix="other")
    other.run(other.api.check_schema())
    other.close()
    assert compare(REPAIR)[:2] == (1, {("stray_output", "left", "nobody")})
    sides.ledger.client.delete("other:schema")
    assert compare(REPAIR)[:2] == (0, {("stray_output", "repaired", "nobody")})


def test_a_photo_is_missed_only_where_the_store_says_so(sides, compare, s3):
    """Without its bucket no photo is taken for lost, and a proxy's 404 is no word of the store."""
    sides.accept("b1")
    away = sides.settings.store.model_copy(update={"uploads_bucket": "away"})
    status, found, summary = compare(REPAIR, sides.settings.model_copy(update={"store": away}))
    assert (status, found) == (3, set())
    assert "has no bucket away" in summary["error"]
    store = Store(away)
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        store.inventory.has_upload("b1-upload-0")
    store.close()
    with Proxy(s3.server.ports[0]) as proxy:
        behind = sides.settings.store.model_copy(update={"endpoint": proxy.address})
        nothing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        trap = proxy.answer_instead(b"/b1-upload-0", answer=nothing)
        assert compare(REPAIR, sides.settings.model_copy(update={"store": behind}))[:2] == (0, set())
        assert trap.times_left == 0
    assert sides.ledger.job("b1-0").status is JobStatus.QUEUED


def work_on(sides, kit, num_batches):
    """Let batches come, be done and be deleted, as API, worker and janitor do it."""
    other = Sides(kit, sides.store, sides.settings)
    for number in range(num_batches):
        job = other.finish(f"busy-{number}")
        other.accept(f"waiting-{number}", model="nobody's")
        if number % 2:
            assert kit.run(kit.api.delete_batch("ana", job.batch_id)) == "deleted"
            names = kit.run(kit.api.take_trash(limit=100, lease_seconds=60))
            kit.run(kit.api.drop_trash(sides.store.delete(names)))


def test_what_is_going_on_is_not_taken_for_a_mistake(sides, compare, valkey):
    """While jobs come, are done, and are deleted, every look finds all in order, however young it is."""
    other = LedgerKit(valkey.url)
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work_on, sides, other, 20)
        looks = [compare(REPAIR)]
        while not working.done():
            looks.append(compare(REPAIR))
        working.result()
    other.close()
    assert {(status, *found) for status, found, _ in looks} == {(0,)}
    assert len(looks) > 3
    assert compare(REPAIR)[2]["compared"]["jobs"] == 30


def test_text_tells_counts_and_the_first_of_each_kind(sides, capsys):
    """Whoever reads it learns how many, which, and what was done; there is no more of a kind than fits on a screen."""
    sides.finish("b1")
    for number in range(12):
        sides.write(f"nobody-{number}/1/output.webp")
    assert reconcile(sides.settings, replace(LOOK, as_json=False)) == 1
    text = capsys.readouterr().out
    assert "compared: 1 jobs, 14 objects of outputs, 1 uploads (dry run: nothing is changed)" in text
    assert "12  results in the store that no job names: would be repaired" in text
    assert text.count("job nobody-") == 10
    assert "and 2 more" in text
    assert reconcile(sides.settings, replace(REPAIR, as_json=False)) == 0
    assert reconcile(sides.settings, replace(REPAIR, as_json=False)) == 0
    assert capsys.readouterr().out.endswith("ledger and store agree\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store": {"endpoint": "127.0.0.1:1"}}, "no connection"),
        ({"redis": {"url": "redis://127.0.0.1:1/0"}}, "Redis"),
        ({"redis": {"key_prefix": "another"}}, "there is no ledger under 'another'"),
    ],
    ids=["store", "redis", "ledger"],
)
def test_what_cannot_be_compared_ends_with_a_status_of_its_own(sides, capsys, changes, words):
    """A side that is away, or not the right one, is told, and is no agreement."""
    sides.finish("b1")
    sections = {name: getattr(sides.settings, name).model_copy(update=change) for name, change in changes.items()}
    settings = sides.settings.model_copy(update=sections)
    assert reconcile(settings, REPAIR) == 3
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert summary["is_complete"] is False
    assert words in summary["error"]
    assert reconcile(settings, replace(REPAIR, as_json=False)) == 3
    assert words in capsys.readouterr().err
