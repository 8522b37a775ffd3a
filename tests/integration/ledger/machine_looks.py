"""What is due and what is read, by a real ledger and by its model side by side."""

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from server.eta import estimate_seconds
from server.jobs import Batch, BatchStatus, JobStatus
from server.ledger import reading
from server.ledger.reading import JobProgress
from tests.integration.ledger.expected_keys import SOME
from tests.integration.ledger.kit import LEASE_SECONDS, STEP_SECONDS
from tests.integration.ledger.machine_calls import MODELS, LedgerCalls
from tests.integration.ledger.model import Place
from tests.integration.ledger.model_records import ModelBatch

TRASH_LEASE_SECONDS = 150
WEBHOOK_LEASE_SECONDS = 150


@dataclass(frozen=True)
class Walk:
    """A list that is being read page by page: its kind and filters, and where the next page begins."""

    kind: str
    filters: tuple[str | None, str | None, str | None]
    limit: int
    most_looks: int
    cursor: str | None = None
    behind: Place | None = None


class LedgerLooks(LedgerCalls):
    """Goes on with the calls of what runs by itself and of readers."""

    # Webhooks.

    def take_webhooks(self, limit: int) -> list[tuple[ModelBatch, int, int]]:
        """Take deliveries that are due; check what is to be told."""
        self.check_overdue(webhooks=[f"{batch.id}:{round_}" for batch, round_ in self.model.due_webhooks()])
        taken = self.kit.run(self.kit.api.take_webhooks(limit=limit, lease_seconds=WEBHOOK_LEASE_SECONDS))
        expected = self.model.take_webhooks(limit, WEBHOOK_LEASE_SECONDS)
        assert [(one.batch.id, one.round, one.attempt) for one in taken] == [
            (batch.id, round_, attempt) for batch, round_, attempt in expected
        ]
        for due, (batch, round_, _) in zip(taken, expected, strict=True):
            self.check_batch(due.batch, batch)
            since = self.kit.client.hget(f"{self.kit.prefix}:batch:{batch.id}", f"webhook_since:{round_}")
            assert str(due.due_since_ms) == since
            if batch.status == "finished" and batch.round == round_:
                assert due.due_since_ms == due.batch.finished_at_ms
            self.reached["take webhook"] += 1
        return expected

    def note_delivery(
        self, batch_id: str, round_: int, attempt: int, outcome: Any, delay_seconds: float | None
    ) -> None:
        """Note how a delivery went."""
        fields = {"outcome": outcome, "http_status": 500 if outcome == "retrying" else None, "detail": None}
        self.kit.run(self.kit.api.note_delivery(batch_id, round_, attempt, delay_seconds=delay_seconds, **fields))
        delivery = {"round": round_, "attempt": attempt, "at_ms": SOME} | fields
        self.model.note_delivery(batch_id, round_, delivery, delay_seconds)

    # What is due.

    def sweep(self, models: list[str]) -> None:
        """Sweep and check the report."""
        self.check_overdue(
            leases=[job.id for job in self.model.expired_leases()],
            delayed=[job.id for job in self.model.delays_over()],
        )
        report = self.kit.sweep(models)
        promised = self.model.sweep(models)
        assert vars(report) == promised
        self.reached.update(f"sweep {name}" for name, count in promised.items() if count)

    def sweep_for_a_lease(self) -> None:
        """Sweep in time for longer than a lease: what nobody renews is taken back."""
        for _ in range(LEASE_SECONDS // (2 * STEP_SECONDS) + 1):
            self.sweep(list(MODELS))
            self.pass_time(2 * STEP_SECONDS)
        self.sweep(list(MODELS))

    def expire(self) -> None:
        """Let what is due go, and check the report."""
        self.check_overdue(
            inputs_due=[batch.id for batch in self.model.overdue("inputs_due")],
            outputs_due=[batch.id for batch in self.model.overdue("outputs_due")],
            forget=[batch.id for batch in self.model.overdue("forget_at")],
            unused=[upload.id for upload in self.model.overdue_uploads()],
        )
        report = vars(self.kit.run(self.kit.api.expire()))
        promised = self.model.expire()
        assert report == promised
        self.reached.update(f"expire {name}" for name, count in promised.items() if count)

    def take_trash(self, limit: int) -> list[str]:
        """Take names out of the trash."""
        self.check_overdue(trash=self.model.overdue_trash())
        names = self.kit.run(self.kit.api.take_trash(limit=limit, lease_seconds=TRASH_LEASE_SECONDS))
        assert names == self.model.take_trash(limit, TRASH_LEASE_SECONDS)
        return names

    def drop_trash(self, names: list[str]) -> None:
        """Say that objects are gone."""
        self.kit.run(self.kit.api.drop_trash(names))
        for name in names:
            self.model.trash.pop(name, None)
        self.deleted |= set(names)
        self.reached["drop trash"] += bool(names)

    # What is read.

    def check_batch(self, batch: Batch, twin: ModelBatch) -> None:
        """Compare a batch as clients read it: each job's place in its owner's line and the estimate included."""
        assert (batch.id, batch.status.value, batch.round) == (twin.id, twin.status, twin.round)
        counts = {status.value: twin.count(status) for status in JobStatus}
        assert batch.counts == counts | {"total": len(twin.jobs)}
        assert (batch.webhook is not None) == twin.hook
        if batch.webhook:
            told = [(one.round, one.attempt, one.outcome, one.http_status) for one in batch.webhook.deliveries]
            names = ("round", "attempt", "outcome", "http_status")
            assert told == [tuple(one[name] for name in names) for one in twin.deliveries]
        for job, expected in zip(batch.jobs, twin.jobs, strict=True):
            line = self.model.ready(twin.owner, expected.model, twin.priority)
            place = line.index(expected) + 1 if expected.is_ready else None
            assert (job.id, job.status.value, job.queue_position) == (expected.id, expected.status, place)
            assert (job.error and (job.error.code, job.error.detail), job.step) == (expected.error, expected.step)
            assert (job.output and job.output.key) == expected.output
        # How the estimate follows from the loads is tested elsewhere; here the loads are found in another way.
        assert batch.eta_seconds == estimate_seconds(batch, self.model.loads(twin))
        self.reached["estimate"] += batch.eta_seconds is not None

    def read_batch(self, twin: ModelBatch) -> None:
        """Read a batch, and its jobs by themselves, and compare."""
        batch = self.kit.read(twin.id)
        self.check_batch(batch, twin)
        ids = [job.id for job in batch.jobs]
        assert self.kit.run(self.kit.api.read_jobs([ids[-1], "j-none", *ids])) == [batch.jobs[-1], *batch.jobs]

    def read_page(self, walk: Walk) -> Walk | None:
        """Read a page of a list, compare it, and return where the next one begins."""
        first, second, third = walk.filters
        where: Any = {"limit": walk.limit, "cursor": walk.cursor}
        behind = walk.limit, walk.behind, walk.most_looks
        with mock.patch.object(reading, "MOST_LOOKS", walk.most_looks):
            if walk.kind == "batches":
                assert first
                status = BatchStatus(second) if second else None
                page: Any = self.kit.run(self.kit.api.list_batches(first, status=status, label=third, **where))
                expected: Any = self.model.list_batches(first, second, third, *behind)
            else:
                status = JobStatus(second) if second else None
                page = self.kit.run(self.kit.api.list_jobs(first, status=status, model=third, **where))
                expected = self.model.list_jobs(first, second, third, *behind)
        assert [one.id for one in page.items] == [one.id for one in expected[0]]
        assert [one.status for one in page.items] == [one.status for one in expected[0]]
        assert (page.next_cursor is None) == (expected[1] is None)
        self.reached.update(
            {f"list {walk.kind}": len(page.items), f"list {walk.kind} on": page.next_cursor is not None}
        )
        return None if page.next_cursor is None else replace(walk, cursor=page.next_cursor, behind=expected[1])

    def check_events(self, twin: ModelBatch, place: int | None) -> None:
        """Read what happened behind the event at a place; -1 is the beginning, None an event that there is not."""
        entries: Any = self.kit.client.xrange(f"{self.kit.prefix}:batch:{twin.id}:events")
        ids = [event_id for event_id, _ in entries]
        after = "0-0" if place == -1 else "12-34" if place is None else ids[place]
        found = self.kit.run(self.kit.api.read_events(twin.id, after))
        assert found
        assert (found.status.value, found.is_known) == (twin.status, place is not None)
        told = [] if place is None else twin.told[place + 1 :]
        assert [(one.type, one.data) for one in found.events] == told
        assert [one.id for one in found.events] == ids[len(ids) - len(told) :]
        running = [job for job in twin.jobs if job.status == "running" and job.step is not None and place is not None]
        assert found.progress == [JobProgress(one.id, one.index, one.step or 0, 9, one.attempts) for one in running]
        snapshot = self.kit.run(self.kit.api.read_batch_and_event(twin.id))
        assert snapshot
        assert snapshot.last_event_id == (ids[-1] if ids else "0-0")
        self.reached.update({"events": len(told), "progress": len(running)})
