"""What is too old goes out of the ledger and the store together, whatever goes away in between."""

import asyncio
import contextlib
import io
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest
from redis.asyncio import Redis

from server.errors import LedgerUnavailable, ObjectNotFound, StoreUnavailable
from server.janitor import Janitor
from server.jobs import Job
from server.ledger.api_side import ApiLedger
from server.periodic import Periodic
from server.store import Store
from tests.integration.ledger.kit import (
    FORM_SECONDS,
    FORM_USABLE_SECONDS,
    INPUTS_SECONDS,
    ORPHANS_SECONDS,
    OUTPUTS_SECONDS,
    RECORDS_SECONDS,
    UNUSED_SECONDS,
    LedgerKit,
    record,
)

LEASE_OF_NAMES_SECONDS = 61
PATIENCE_SECONDS = 20


class House:
    """A ledger and a store with things in them, and what is in the store of them."""

    def __init__(self, ledger: LedgerKit, store: Store) -> None:
        self.ledger = ledger
        self.store = store
        # Objects of other tests are in the same store.
        self.name = secrets.token_hex(4)

    def photos(self, count: int) -> list[str]:
        """Let photos be sent that no batch names."""
        ids = [f"{self.name}-{secrets.token_hex(4)}" for _ in range(count)]
        self.ledger.announce([replace(record(upload_id), key=upload_id) for upload_id in ids])
        for upload_id in ids:
            self.store.put_upload(upload_id, io.BytesIO(b"photo"), 5, "image/jpeg")
        return ids

    def batch(self, *photos: str) -> str:
        """Have a batch accepted with one job for each of these photos; returns its id."""
        batch_id = f"{self.name}-{secrets.token_hex(4)}"
        batch = self.ledger.with_uploads(self.ledger.batch(batch_id, ["qwen"] * len(photos)), [[one] for one in photos])
        assert self.ledger.submit(batch).kind == "accepted"
        return batch_id

    def write(self, job: Job, name: str = "output.webp") -> str:
        """Store what an attempt writes before its commit; returns the key."""
        key = f"{job.id}/{job.fence}/{name}"
        self.store.put_output(key, b"result", "image/webp")
        return key

    def finish(self, batch_id: str) -> list[str]:
        """Do the next jobs, all of this batch; returns the keys of its results."""
        keys: list[str] = []
        while job := self.ledger.worker().claim(["qwen"], num_held=0):
            assert isinstance(job, Job)
            assert job.batch_id == batch_id
            keys.append(self.write(job))
            assert self.ledger.commit(job) == "ok"
        return keys

    def janitor(self, store: Store | None = None, *, interval_seconds: float = 0.02) -> Janitor:
        """Make the janitor of an API process."""
        threads = anyio.CapacityLimiter(4)
        return Janitor(self.ledger.api, store or self.store, threads=threads, interval_seconds=interval_seconds)

    def clean(self) -> None:
        """Let a janitor do all that is due now."""
        self.ledger.run(self.janitor().clean())

    def trash(self) -> list[str]:
        """List what waits to be deleted, due or not."""
        names: Any = self.ledger.client.zrange("restage:trash", 0, -1)
        return names

    def has_photo(self, upload_id: str) -> bool:
        """Whether the photo is in the store."""
        try:
            return bool(self.store.read_start(upload_id, 1))
        except ObjectNotFound:
            return False

    def has_output(self, key: str) -> bool:
        """Whether the object is in the store."""
        try:
            return bool(self.store.read_output(key))
        except ObjectNotFound:
            return False


@pytest.fixture
def ledger(valkey: Any) -> Iterator[LedgerKit]:
    """Give a ledger on an empty Valkey."""
    kit = LedgerKit(valkey.url)
    kit.run(kit.api.check_schema())
    yield kit
    kit.close()


@pytest.fixture
def house(ledger: LedgerKit, s3: Any) -> House:
    """Give a ledger and a store."""
    return House(ledger, s3.store)


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Callable[[str], int]:
    """Give a function that counts an event in what was logged so far."""
    lines: list[str] = []

    def count(event: str) -> int:
        lines.extend(capfd.readouterr())
        return "".join(lines).count(event)

    return count


@contextlib.asynccontextmanager
async def another_ledger(house: House) -> AsyncIterator[ApiLedger]:
    """Open the same ledger as another process does."""
    ledger = ApiLedger(Redis.from_url(house.ledger.url, decode_responses=True), key_prefix="restage")
    try:
        yield ledger
    finally:
        await ledger.close()


@contextlib.contextmanager
def silent(pid: int) -> Iterator[None]:
    """Let a process answer nothing for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_photos_results_and_records_go_one_after_another(house: House) -> None:
    """Each goes when its own time is over, and nothing goes before."""
    photos = house.photos(2)
    batch_id = house.batch(*photos)
    results = house.finish(batch_id)
    house.clean()
    assert all(map(house.has_photo, photos))
    house.ledger.pass_time(INPUTS_SECONDS - 50)
    house.clean()
    assert all(map(house.has_photo, photos))
    house.ledger.pass_time(60)
    house.clean()
    assert not any(map(house.has_photo, photos))
    assert all(map(house.has_output, results))
    house.ledger.pass_time(OUTPUTS_SECONDS - INPUTS_SECONDS)
    house.clean()
    assert not any(map(house.has_output, results))
    assert house.ledger.read(batch_id).counts["succeeded"] == 2
    house.ledger.pass_time(RECORDS_SECONDS - OUTPUTS_SECONDS)
    house.clean()
    assert house.ledger.run(house.ledger.api.read_batch(batch_id)) is None
    assert house.trash() == []


def test_unused_photos_go_with_their_records(house: House) -> None:
    """A photo that no batch has named goes a while after its form was given out, sent or not."""
    [sent] = house.photos(1)
    house.ledger.announce([replace(record("never-sent"), key=f"{house.name}-never-sent")])
    house.ledger.pass_time(UNUSED_SECONDS - 50)
    house.clean()
    assert house.has_photo(sent)
    house.ledger.pass_time(100)
    house.clean()
    assert not house.has_photo(sent)
    assert house.ledger.client.keys("restage:upload:*") == []
    assert house.trash() == []


def test_more_than_one_step_goes_in_one_look(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is due, one look takes it all, in steps that leave room for others."""
    monkeypatch.setattr("server.janitor._TRASH_LIMIT", 4)
    monkeypatch.setattr("server.ledger.expiring._EXPIRE_LIMIT", 5)
    photos = house.photos(23)
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    house.clean()
    assert not any(map(house.has_photo, photos))
    assert house.trash() == []


def test_a_photo_is_deleted_only_when_its_form_is_over(house: House) -> None:
    """What could still be sent again stays in the trash until it could not."""
    [photo] = house.photos(1)
    batch_id = house.batch(photo)
    house.finish(batch_id)
    assert house.ledger.run(house.ledger.api.delete_batch("", batch_id)) == "deleted"
    house.clean()
    assert house.has_photo(photo)
    house.store.put_upload(photo, io.BytesIO(b"again"), 5, "image/jpeg")
    house.ledger.pass_time(FORM_USABLE_SECONDS + 10)
    house.clean()
    assert not house.has_photo(photo)
    assert house.trash() == []


def test_a_form_that_outlives_its_upload_keeps_the_name_in_the_trash(house: House) -> None:
    """Where an upload is forgotten as its form ends, the slack for clocks is waited for all the same."""
    photo = f"{house.name}-late"
    house.ledger.announce([replace(record(photo), key=photo)], unused_seconds=FORM_SECONDS)
    house.ledger.pass_time(FORM_SECONDS + 10)
    house.clean()
    assert house.ledger.client.keys("restage:upload:*") == []
    house.store.put_upload(photo, io.BytesIO(b"at the last moment"), 18, "image/jpeg")
    house.clean()
    assert house.trash() == [f"uploads/{photo}"]
    house.ledger.pass_time(FORM_USABLE_SECONDS - FORM_SECONDS)
    house.clean()
    assert not house.has_photo(photo)
    assert house.trash() == []


def test_what_could_not_be_deleted_stays_in_the_trash(house: House) -> None:
    """A name that the store does not confirm is kept, holds up no other, and is tried again a lease later."""
    [photo] = house.photos(1)
    refused = "uploads/no such kind of key"
    house.ledger.client.zadd("restage:trash", {refused: 0})
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    house.clean()
    assert not house.has_photo(photo)
    assert house.trash() == [refused]
    assert house.ledger.run(house.ledger.api.take_trash(limit=10, lease_seconds=60)) == []
    house.ledger.pass_time(LEASE_OF_NAMES_SECONDS)
    assert house.ledger.run(house.ledger.api.take_trash(limit=10, lease_seconds=60)) == [refused]


def test_names_of_a_process_that_died_come_back(house: House) -> None:
    """Whether it died before it deleted or after, another process brings the work to its end, a lease later."""
    photos = house.photos(2)
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    house.ledger.run(house.ledger.api.expire())
    taken = house.ledger.run(house.ledger.api.take_trash(limit=100, lease_seconds=60))
    assert taken == [f"uploads/{photo}" for photo in sorted(photos)]
    assert house.store.delete(taken[:1]) == taken[:1]
    house.clean()
    assert house.has_photo(taken[1].removeprefix("uploads/")), "it is leased to the one that died"
    house.ledger.pass_time(LEASE_OF_NAMES_SECONDS)
    house.clean()
    assert not any(map(house.has_photo, photos))
    assert house.trash() == []


def test_what_dead_attempts_wrote_goes_and_the_result_stays(house: House) -> None:
    """All that lies under the fence of an attempt without a commit goes, and nothing under another fence or job."""
    [photo] = house.photos(1)
    batch_id = house.batch(photo)
    first = house.ledger.claim(["qwen"])
    orphans = [house.write(first), house.write(first, "half.tmp")]
    worker = house.ledger.worker()
    assert (
        worker.retry(first.id, first.fence, delay_seconds=0, counts=False, max_errors=3, code="x", detail="x") == "ok"
    )
    neighbours = [f"{first.id}/10/output.webp", f"{first.id}/1.webp", f"{first.id}1/1/output.webp"]
    for key in neighbours:
        house.store.put_output(key, b"result", "image/webp")
    [result] = house.finish(batch_id)
    late = house.write(first, "late.webp")
    house.ledger.pass_time(ORPHANS_SECONDS - 50)
    house.clean()
    assert all(map(house.has_output, [*orphans, late, result]))
    house.ledger.pass_time(100)
    house.clean()
    assert not any(map(house.has_output, [*orphans, late]))
    assert all(map(house.has_output, [result, *neighbours]))
    assert house.ledger.read(batch_id).jobs[0].output is not None
    assert house.trash() == []


def test_what_failed_and_cancelled_attempts_wrote_goes_too(house: House) -> None:
    """An attempt may have written before it failed, or before it heard that nobody wants it any more."""
    house.batch(*house.photos(2))
    failed = house.ledger.claim(["qwen"])
    cancelled = house.ledger.claim(["qwen"])
    keys = [house.write(failed), house.write(cancelled)]
    worker = house.ledger.worker()
    assert worker.fail(failed.id, failed.fence, code="x", detail="x", timings={}) == "ok"
    house.ledger.run(house.ledger.api.cancel("", [cancelled.id]))
    assert house.ledger.commit(cancelled) == "cancelled"
    house.ledger.pass_time(ORPHANS_SECONDS + 10)
    house.clean()
    assert not any(map(house.has_output, keys))


class WatchedStore(Store):
    """A store that remembers what it was asked to delete."""

    deleted: tuple[str, ...] = ()

    def delete(self, names: Sequence[str]) -> list[str]:
        self.deleted += tuple(names)
        return super().delete(names)


def test_janitors_share_the_work(house: House, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes at once delete everything, and no name twice."""
    monkeypatch.setattr("server.janitor._TRASH_LIMIT", 3)
    photos = house.photos(20)
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    store = WatchedStore(s3.settings)

    async def clean_at_once() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ledgers = [await stack.enter_async_context(another_ledger(house)) for _ in range(3)]
            threads = anyio.CapacityLimiter(4)
            janitors = [Janitor(ledger, store, threads=threads, interval_seconds=60) for ledger in ledgers]
            await asyncio.gather(*[janitor.clean() for janitor in janitors])

    asyncio.run(clean_at_once())
    store.close()
    assert not any(map(house.has_photo, photos))
    assert sorted(store.deleted) == sorted(f"uploads/{photo}" for photo in photos)
    assert house.trash() == []


def test_nothing_is_forgotten_while_the_store_is_away(
    house: House, s3: Any, log: Callable[[str], int], wait_until: Callable[..., None]
) -> None:
    """An outage of the store is logged once and costs no name; when it is back the work is done at once."""
    photos = house.photos(3)
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    impatient = Store(s3.settings.model_copy(update={"read_timeout_seconds": 0.3}))

    async def story() -> None:
        async with another_ledger(house) as ledger:
            janitor = Janitor(ledger, impatient, threads=anyio.CapacityLimiter(4), interval_seconds=0.02)
            running = asyncio.create_task(janitor.run())
            try:
                with silent(s3.server.child.pid):
                    await asyncio.to_thread(wait_until, lambda: log("janitor.failed"))
                    await asyncio.sleep(1)
                    assert (log("janitor.failed"), log("janitor.recovered")) == (1, 0)
                    assert len(house.trash()) == 3
                await asyncio.to_thread(wait_until, lambda: not house.trash())
                await asyncio.to_thread(wait_until, lambda: log("janitor.recovered"))
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    asyncio.run(story())
    impatient.close()
    assert not any(map(house.has_photo, photos))
    assert (log("janitor.failed"), log("janitor.recovered")) == (1, 1)


def test_a_store_that_is_away_is_an_error_of_its_own(house: House, s3: Any) -> None:
    """One look at a store that cannot be reached raises what the store raises; Redis keeps the names."""
    house.photos(1)
    house.ledger.pass_time(UNUSED_SECONDS + 100)
    nowhere = Store(s3.settings.model_copy(update={"endpoint": "127.0.0.1:1"}))
    with pytest.raises(StoreUnavailable):
        house.ledger.run(house.janitor(nowhere).clean())
    nowhere.close()
    assert len(house.trash()) == 1
    # Meanwhile another process, which can reach it, waits for the lease only.
    house.ledger.pass_time(LEASE_OF_NAMES_SECONDS)
    house.clean()
    assert house.trash() == []


def run_until(condition: Callable[[], bool], periodic: Periodic) -> Any:
    """Run work until a condition holds, then cancel it; returns how it ended."""

    async def run() -> Any:
        task = asyncio.create_task(periodic.run())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():  # noqa: ASYNC110 (the work itself tells nobody)
                await asyncio.sleep(0.01)
        task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        return outcome

    return asyncio.run(run())


class Work:
    """Work that goes wrong at some of its times."""

    def __init__(self, outcomes: dict[int, Exception]) -> None:
        self.num_times = 0
        self._outcomes = outcomes

    async def do(self) -> None:
        """Fail as was said for this time, or do nothing."""
        self.num_times += 1
        if outcome := self._outcomes.get(self.num_times):
            raise outcome


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(LedgerUnavailable("Redis is away"), False), (ValueError("Redis is away"), True)]
)
def test_periodic_work_goes_on_after_a_failure(
    log: Callable[[str], int], error: Exception, *, has_traceback: bool
) -> None:
    """A failure is logged once, with a traceback where nobody expected it, and its end once; the work goes on."""
    work = Work({3: error, 4: error, 5: error, 8: error})
    outcome = run_until(lambda: work.num_times > 10, Periodic("dusting", work.do, interval_seconds=0.001))
    assert isinstance(outcome, asyncio.CancelledError)
    assert (log("dusting.failed"), log("dusting.recovered")) == (2, 2)
    assert log("Redis is away") >= 2
    assert (log("Traceback") > 0) == has_traceback


def test_periodic_work_waits_between_two_times_and_runs_at_once_at_first() -> None:
    """The pause is between the end and the next begin, so that slow work does not run without a pause."""
    work = Work({})
    started = time.monotonic()
    run_until(lambda: time.monotonic() > started + 0.3, Periodic("dusting", work.do, interval_seconds=60))
    assert work.num_times == 1


def test_a_cancel_ends_periodic_work_at_any_place(log: Callable[[str], int]) -> None:
    """A cancel passes through the work itself as it does through the pause, and is no failure."""
    was_cancelled: list[bool] = []
    has_begun: list[bool] = []

    async def work() -> None:
        has_begun.append(True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            was_cancelled.append(True)
            raise

    outcome = run_until(lambda: bool(has_begun), Periodic("dusting", work, interval_seconds=0.01))
    assert isinstance(outcome, asyncio.CancelledError)
    assert was_cancelled == [True]
    assert log("dusting.failed") == 0
