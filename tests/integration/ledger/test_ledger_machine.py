"""Random lives of a ledger on a real Valkey, compared after every call with a plain Python model of its promises."""

import os
import sys
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from server.queue import create_broker, queue_name
from tests.integration.ledger.kit import FORM_SECONDS, RECORDS_SECONDS, STEP_SECONDS, UNUSED_SECONDS
from tests.integration.ledger.machine_calls import MODELS, OWNERS, WORKERS
from tests.integration.ledger.machine_looks import Walk
from tests.integration.ledger.machine_user_rules import LABELS, UserRules
from tests.integration.ledger.machine_worker_rules import DELAY_SECONDS
from tests.integration.ledger.model_workers import SPEED_SECONDS

# Some 35 s. For a long run: LEDGER_MACHINE_EXAMPLES=5000 pytest tests/integration/ledger/test_ledger_machine.py
EXAMPLES = int(os.environ.get("LEDGER_MACHINE_EXAMPLES", "200"))

JOB_STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")


class LedgerMachine(UserRules):
    """Calls the ledger at random and checks every answer, and every key after every call."""

    def __init__(self, new_ledger: Any, reached: Counter[str]) -> None:
        super().__init__(new_ledger, reached)
        # What somebody has in hand: lists not read to their end, webhooks, names from the trash, and where the stream
        # of changes was read to.
        self.walks: list[Walk] = []
        self.taken: list[tuple[str, int, int]] = []
        self.trash_in_hand: list[str] = []
        self.position = "0-0"
        self.num_seen = 0

    # What is due.

    @rule(models=st.sampled_from((MODELS, MODELS, MODELS[:1])))
    def ledger_is_swept(self, models: tuple[str, ...]) -> None:
        """An API process sweeps."""
        self.sweep(list(models))

    @rule(steps=st.sampled_from((1, 1, 2, 3, 4, 7, 13)), expires=st.booleans())
    def time_passes(self, steps: int, expires: bool) -> None:
        """Nothing happens for a while; then a janitor comes."""
        self.pass_time(steps * STEP_SECONDS)
        if expires:
            self.expire()

    @precondition(lambda self: self.model.jobs)
    @rule()
    def sweeps_go_on_for_a_lease(self) -> None:
        """Sweeps come in time for longer than a lease, so every lease that is not renewed is taken back."""
        self.sweep_for_a_lease()

    @rule()
    def ledger_expires(self) -> None:
        """A janitor takes what is due out of the ledger."""
        self.expire()

    @precondition(lambda self: self.model.trash)
    @rule(data=st.data(), limit=st.sampled_from((1, 2, 3, 100)))
    def trash_is_emptied(self, data: st.DataObject, limit: int) -> None:
        """A janitor takes names and deletes some of the objects, this time's and earlier ones'."""
        self.trash_in_hand += self.take_trash(limit)
        if self.trash_in_hand:
            gone = data.draw(st.lists(st.sampled_from(self.trash_in_hand), unique=True, max_size=4))
            self.drop_trash(gone)
            self.trash_in_hand = [name for name in self.trash_in_hand if name not in gone]

    @precondition(lambda self: self.taken or self.model.due_webhooks())
    @rule(
        data=st.data(),
        limit=st.sampled_from((1, 2, 9)),
        outcome=st.sampled_from(("delivered", "retrying", "retrying", "gave_up", None)),
    )
    def webhooks_are_delivered(self, data: st.DataObject, limit: int, outcome: str | None) -> None:
        """A sender takes what is due and says how one of its deliveries went, perhaps an old one, or dies."""
        self.taken += [(batch.id, round_, attempt) for batch, round_, attempt in self.take_webhooks(limit)]
        if self.taken and outcome:
            delay_seconds = DELAY_SECONDS if outcome == "retrying" else None
            self.note_delivery(*data.draw(st.sampled_from(self.taken[-4:])), outcome, delay_seconds)

    @rule(model=st.sampled_from(MODELS))
    def bells_are_lost(self, model: str) -> None:
        """A worker answers all bells of a model, or a queue is flushed."""
        queue = f"dramatiq:{queue_name(self.kit.prefix, model)}"
        self.kit.client.delete(queue, f"{queue}.msgs")
        del self.model.bells[model]

    # What is read.

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data(), worker=st.sampled_from((None, *WORKERS)))
    def batch_is_read(self, data: st.DataObject, worker: str | None) -> None:
        """What clients read is what the model says, as a batch and job by job."""
        if worker:
            self.announce_worker(worker, dict.fromkeys(MODELS, True))
        self.read_batch(self.model.batches[data.draw(st.sampled_from(sorted(self.model.batches)))])

    @rule(
        kind=st.sampled_from(("batches", "jobs")),
        owner=st.sampled_from(OWNERS),
        data=st.data(),
        limit=st.sampled_from((1, 2, 3, 50)),
        most_looks=st.sampled_from((1, 3, 2000, 2000)),
        is_left=st.booleans(),
    )
    def list_is_walked(
        self, kind: str, owner: str, data: st.DataObject, limit: int, most_looks: int, is_left: bool
    ) -> None:
        """A user reads a list page by page to its end, or stops at some page."""
        if kind == "batches":
            status = data.draw(st.sampled_from((None, "queued", "running", "finished")))
            filters = (owner, status, data.draw(st.sampled_from((None, None, *LABELS))))
        else:
            status = data.draw(st.sampled_from((None, *JOB_STATUSES)))
            filters = (data.draw(st.sampled_from((owner, None))), status, data.draw(st.sampled_from((None, *MODELS))))
        walk = self.read_page(Walk(kind, filters, limit, most_looks))
        if walk and is_left:
            self.walks.append(walk)
        else:
            self.walk_list(walk)

    @precondition(lambda self: self.walks)
    @rule(data=st.data())
    def list_goes_on(self, data: st.DataObject) -> None:
        """A user asks for the next page of a list, after no matter what has happened in between."""
        walk = data.draw(st.sampled_from(self.walks))
        self.walks.remove(walk)
        if walk := self.read_page(walk):
            self.walks.append(walk)

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data())
    def events_are_read(self, data: st.DataObject) -> None:
        """A follower comes back with an event it knows, with none, or with one that nobody knows."""
        twin = self.model.batches[data.draw(st.sampled_from(sorted(self.model.batches)))]
        self.check_events(twin, data.draw(st.one_of(st.none(), st.integers(-1, len(twin.told) - 1))))
        assert self.kit.run(self.kit.api.read_events("b-none", "0-0")) is None

    @precondition(lambda self: len(self.model.changes) > self.num_seen)
    @rule()
    def changes_are_read(self) -> None:
        """A reader of the stream of changes hears of each batch that has changed since it last looked."""
        position, batch_ids = self.kit.run(self.kit.api.wait_for_changes(self.position, block_seconds=0.001))
        assert batch_ids == set(self.model.changes[self.num_seen :])
        assert position == self.kit.run(self.kit.api.changes_position())
        self.position, self.num_seen = position, len(self.model.changes)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; a stream that nobody writes to for long begins anew."""
        super().pass_time(seconds)
        self.num_seen = min(self.num_seen, len(self.model.changes))

    # What must always be so.

    @invariant()
    def redis_holds_what_was_promised(self) -> None:
        """Every key, and nothing but those, with exactly the promised content."""
        self.check_keys()

    @invariant()
    def history_is_sane(self) -> None:
        """No two hands hold one job, nothing is committed twice, a batch finishes at most once a round."""
        live = self.live_hands()
        assert len({job_id for job_id, _ in live}) == len(live)
        for batch in self.model.batches.values():
            told = Counter((kind, data.get("job_id"), data.get("round")) for kind, data in batch.told)
            assert all(
                count == 1 for (kind, _, _), count in told.items() if kind in {"job.succeeded", "batch.finished"}
            )
            assert told["batch.finished", None, batch.round] == (batch.status == "finished")

    @invariant()
    def nothing_that_is_needed_is_in_the_trash(self) -> None:
        """No photo of an open job, no result that is shown, and nothing that a holder is about to write, goes."""
        jobs = self.model.jobs.values()
        needed = {f"uploads/{self.model.uploads[one].key}" for job in jobs if job.is_open for one in job.upload_ids}
        needed |= {f"outputs/{job.output}" for job in jobs if job.output}
        needed |= {job.try_name for job in jobs if job.status == "running"}
        assert not needed & self.model.trash.keys()

    # The end.

    def teardown(self) -> None:
        """Everything ends and expires; no key is left, and no object is forgotten in the store."""
        try:
            # A life that has already shown a mistake need not end well too.
            if sys.exception() is None:
                self.everything_is_read()
                self.everything_ends()
        finally:
            self.kit.close()

    def everything_is_read(self) -> None:
        """Read each batch and its events from several places, and some lists to their end."""
        for worker in WORKERS[:2]:
            self.announce_worker(worker, dict.fromkeys(MODELS, True))
        self.announce_worker(WORKERS[2], dict.fromkeys(MODELS, False))
        # Without a measured run of each model nothing is estimated.
        for model in MODELS:
            if any(job.is_ready and job.model == model for job in self.model.jobs.values()):
                self.claim(WORKERS[0], [model], 0, self.new_id("token"))
                self.commit(self.hands[-1], {"run": 1.5})
        for batch in self.model.batches.values():
            self.read_batch(batch)
            for place in {None, -1, 0, len(batch.told) // 2}:
                if place is None or place < len(batch.told):
                    self.check_events(batch, place)
        for owner in OWNERS:
            for status in (None, "running", "finished"):
                self.walk_list(Walk("batches", (owner, status, None if status else LABELS[0]), 2, 2000))
            self.walk_list(Walk("batches", (owner, None, LABELS[1]), 2, 1))
            self.walk_list(Walk("jobs", (owner, None, "flux"), 2, 2))
        for status in (None, *JOB_STATUSES):
            self.walk_list(Walk("jobs", (None if status else "ana", status, None if status else "qwen"), 3, 2000))

    def walk_list(self, walk: Walk | None) -> None:
        """Read a list to its end."""
        while walk:
            walk = self.read_page(walk)

    def everything_ends(self) -> None:
        """End every job, let every record expire, empty the trash, answer every bell."""
        for hand in self.live_hands():
            self.commit(hand)
        queued = [job.id for job in self.model.jobs.values() if job.status == "queued"]
        if queued:
            self.cancel(self.new_id("token"), "", queued)
        self.check_keys()
        assert all(batch.status == "finished" for batch in self.model.batches.values())
        self.take_webhooks(100)
        self.pass_time(RECORDS_SECONDS)
        while self.model.batches:
            self.expire()
        self.check_keys()
        self.pass_time(UNUSED_SECONDS)
        while self.model.overdue_uploads():
            self.expire()
        self.pass_time(FORM_SECONDS * 2)
        self.drop_trash(self.take_trash(1000))
        self.check_keys()
        self.pass_time(SPEED_SECONDS)
        self.answer_bells()
        self.check_keys()
        assert self.kit.client.keys(f"*{self.kit.prefix}*") == [f"{self.kit.prefix}:schema"]
        folders = {f"{name.rpartition('/')[0]}/" for name in self.objects}
        kept = {name for name in self.objects if f"{name.rpartition('/')[0]}/" not in folders & self.deleted}
        assert kept <= self.deleted

    def answer_bells(self) -> None:
        """Answer every bell as Dramatiq does."""
        broker = create_broker(self.kit.raw_client)
        for model in MODELS:
            queue = queue_name(self.kit.prefix, model)
            broker.declare_queue(queue)
            consumer = broker.consume(queue, prefetch=100, timeout=10)
            for _ in range(self.model.bells.pop(model, 0)):
                message: Any = next(consumer)
                assert message.args == (model,)
                consumer.ack(message)
            consumer.close()


# What happens many times in every run; the rest depends on the draw.
MUST_BE_REACHED = {
    *(
        "announce new",
        "announce same",
        "submit accepted",
        "submit unserved",
        "claim job",
        "claim None",
        "start ok",
        "commit ok",
        "fail ok",
    ),
    *("place True", "place False", "finish marked finished"),
    *("retry ok", "cancel cancelled", "cancel requested", "cancel finished", "reopen queued", "reopen open"),
    *("delete unknown", "sweep requeued", "expire inputs", "expire outputs", "expire records", "expire uploads"),
    *("drop trash", "take webhook", "estimate", "events", "list batches", "list jobs", "list jobs on"),
}


@pytest.mark.timeout(60 + EXAMPLES * 2)
def test_the_ledger_keeps_its_promises(new_ledger: Any) -> None:
    """Whatever is called in whatever order, every script does what the model says, and nothing is left at the end."""
    reached: Counter[str] = Counter()
    run_state_machine_as_test(
        cast("Any", lambda: LedgerMachine(new_ledger, reached)),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=cast("Any", list(HealthCheck)),
            print_blob=True,
        ),
    )
    # Lives in which little happens would prove little.
    assert EXAMPLES < 200 or (+reached).keys() >= MUST_BE_REACHED, sorted(reached.items())
