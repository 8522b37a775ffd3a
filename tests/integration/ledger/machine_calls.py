"""Calls of a real ledger and of its model side by side: each answer is compared, and every key after every call."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from server.jobs import Batch, JobStatus, Webhook
from server.ledger import api_side, worker_side
from server.ledger.api_side import Idempotency
from server.ledger.status import WorkerModel, WorkerStatus
from server.ledger.worker_side import Alone, HeldJob
from server.settings import AdmissionSettings
from tests.integration.ledger.expected_keys import ARRANGE, DUMP, expected_keys, observed_keys
from tests.integration.ledger.kit import (
    HOOK_URL,
    LEASE_SECONDS,
    OFFER_SECONDS,
    UNUSED_SECONDS,
    LedgerKit,
    record,
)
from tests.integration.ledger.model import IDEMPOTENCY_SECONDS, LedgerModel
from tests.integration.ledger.model_records import ModelBatch, ModelJob, ModelUpload
from tests.integration.ledger.model_workers import MAX_ERRORS, Hand

OWNERS = ("ana", "bo", "cy")
MODELS = ("flux", "kontext", "qwen")
WORKERS = ("w1", "w2", "w3")
MAX_OPEN = 20
TRASH_LEASE_SECONDS = 150
WEBHOOK_LEASE_SECONDS = 150


class LedgerCalls(RuleBasedStateMachine):
    """Makes each call twice, on a real ledger and on the model, and compares."""

    def __init__(self, new_ledger: Any, reached: Counter[str]) -> None:
        super().__init__()
        self.kit: LedgerKit = new_ledger(f"m{uuid4().hex[:12]}")
        self.kit.run(self.kit.api.check_schema())
        self._dump = self.kit.client.register_script(DUMP)
        self._arrange = self.kit.client.register_script(ARRANGE)
        self.workers = {name: self.kit.worker(name, lease_seconds=LEASE_SECONDS) for name in WORKERS}
        self.model = LedgerModel()
        self.reached = reached
        self.num_ids = 0
        # Every (job, fence) that was ever handed out: late workers come back with theirs.
        self.hands: list[Hand] = []
        self.last_claims: dict[str, tuple[str, list[str]]] = {}
        # The changes of users, each a call, a token and what is to be changed.
        self.changes: list[tuple[Any, ...]] = []
        # Every object that the store may have, and every name that was dropped from the trash.
        self.objects: set[str] = set()
        self.deleted: set[str] = set()

    # What the calls share.

    def check(self, call: str, answer: Any, expected: Any) -> None:
        """Compare an answer with the promised one."""
        assert answer == expected, f"{call}: {answer}, promised: {expected}"
        answers = answer if isinstance(answer, list) else [answer]
        self.reached.update(f"{call} {one}" for one in answers)

    def check_keys(self) -> None:
        """Compare every key, and expect nothing but those, with exactly the promised content."""
        dump: Any = self._dump(args=[self.kit.prefix])
        observed, expected = observed_keys(self.kit.prefix, dump), expected_keys(self.model)
        if observed != expected:
            names = sorted(observed.keys() | expected.keys())
            wrong = [name for name in names if observed.get(name) != expected.get(name)]
            pytest.fail("\n".join(f"{name}: {observed.get(name)}\n  promised: {expected.get(name)}" for name in wrong))

    def check_overdue(self, **expected: list[str]) -> None:
        """Compare what is overdue in some sets, and let the next call meet it in the model's order."""
        args = [part for name, members in expected.items() for part in (name, json.dumps(members))]
        overdue: Any = self._arrange(args=[self.kit.prefix, *args])
        assert [set(one) for one in overdue] == [set(members) for members in expected.values()], f"of {[*expected]}"

    def new_id(self, kind: str) -> str:
        """Draw an id, as the API does."""
        self.num_ids += 1
        return f"{kind}{self.num_ids:03d}"

    def live_hands(self) -> list[Hand]:
        """List the hands that still hold their job."""
        return [hand for hand in self.hands if self.model.held(*hand)]

    def pass_time(self, seconds: float) -> None:
        """Let time pass in Redis and in the model."""
        self.kit.pass_time(seconds)
        self.model.pass_time(seconds)

    # Uploads and submissions.

    def announce_uploads(
        self,
        owner: str,
        photos: Sequence[tuple[str | None, int, str]],
        form_seconds: float,
        unused_seconds: float = UNUSED_SECONDS,
        offer_seconds: float = OFFER_SECONDS,
    ) -> list[str]:
        """Hand out forms for photos of some digest, size and type; returns the ids to use."""
        twins = [
            ModelUpload(one := self.new_id("u"), owner, f"key-{one}", sha256, size, kind, 0, 0, None)
            for sha256, size, kind in photos
        ]
        records = [
            record(
                one.id, owner, key=one.key, sha256=one.sha256, size_bytes=one.size_bytes, content_type=one.content_type
            )
            for one in twins
        ]
        spans = {"form_seconds": form_seconds, "unused_seconds": unused_seconds, "offer_seconds": offer_seconds}
        ids = self.kit.announce(records, **spans)
        assert ids == self.model.announce_uploads(twins, **spans)
        self.reached.update("announce new" if one.id in ids else "announce same" for one in twins)
        self.objects |= {f"uploads/{one.key}" for one in twins if one.id in ids}
        return ids

    def note_lost_upload(self, owner: str, upload_id: str) -> None:
        """Say that a photo is not in the store."""
        self.kit.run(self.kit.api.note_lost_upload(owner, upload_id))
        self.model.note_lost_upload(owner, upload_id)

    def describe_batch(
        self,
        owner: str,
        priority: str,
        models: list[str],
        upload_ids: list[list[str]],
        *,
        hook: bool,
        label: str | None,
    ) -> Batch:
        """Describe a batch under a new id."""
        batch = self.kit.batch(self.new_id("b"), models, owner=owner, priority=priority)
        batch = self.kit.with_uploads(batch, upload_ids)
        return replace(batch, label=label, webhook=Webhook(HOOK_URL) if hook else None)

    def submit(
        self,
        batch: Batch,
        max_open: int,
        max_owner_open: int | None,
        idempotency: tuple[str, str, str] | None,
        grace_seconds: float | None = None,
    ) -> None:
        """Submit and check the answer."""
        twin = ModelBatch(batch.id, batch.owner, batch.priority.value, batch.label, batch.webhook is not None)
        twin.jobs = [
            ModelJob(job.id, twin, job.index, job.model, [one.upload_id for one in job.inputs]) for job in batch.jobs
        ]
        key = Idempotency(*idempotency, ttl_seconds=IDEMPOTENCY_SECONDS) if idempotency else None
        admission = None if grace_seconds is None else AdmissionSettings(worker_grace_seconds=grace_seconds)
        result = self.kit.submit(
            batch, idempotency=key, max_open_jobs=max_open, max_owner_jobs=max_owner_open, admission=admission
        )
        etags = {one.upload_id: one.etag for job in batch.jobs for one in job.inputs}
        promised = self.model.submit(twin, etags, max_open, max_owner_open, idempotency, grace_seconds)
        assert (result.kind, result.text) == promised
        self.reached[f"submit {result.kind}"] += 1

    # Workers.

    def claim(self, worker: str, models: list[str], num_held: int, token: str, *, high_only: bool = False) -> None:
        """Claim and check that exactly the promised job is handed out."""
        ledger = self.workers[worker]
        ledger._claim_token = token
        answer = ledger.claim(models, num_held=num_held, high_only=high_only)
        expected = self.model.claim(worker, token, models, num_held, high_only=high_only)
        self.last_claims[worker] = (token, models)
        if not isinstance(expected, ModelJob):
            self.check("claim", "alone" if isinstance(answer, Alone) else answer, expected)
            return
        assert answer is not None
        assert not isinstance(answer, Alone)
        assert (answer.id, answer.fence, answer.attempts) == (expected.id, expected.fence, expected.attempts)
        assert (answer.worker, answer.suspect, answer.status) == (worker, expected.suspect, JobStatus.RUNNING)
        assert [one.upload_id for one in answer.inputs] == expected.upload_ids
        if (answer.id, answer.fence) not in self.hands:
            self.hands.append((answer.id, answer.fence))
            self.objects.add(f"{expected.try_name}output.webp")
        self.reached["claim job"] += 1

    def claim_again(self, job_id: str, worker: str) -> Hand | None:
        """Claim what comes until it is this job; None when it does not come soon."""
        for _ in range(6):
            if not any(job.is_ready for job in self.model.jobs.values()):
                return None
            self.claim(worker, list(MODELS), 0, self.new_id("token"))
            if self.hands[-1][0] == job_id:
                return self.hands[-1]
        return None

    def start(self, hand: Hand, *, on_device: bool, instead_of: Hand | None = None) -> None:
        """Put a job on the device or take it off, perhaps as another leaves it."""
        leaving = HeldJob(*instead_of) if instead_of else None
        answer = self.workers["w1"].start(*hand, on_device=on_device, instead_of=leaving)
        self.check("start", answer, self.model.start(*hand, on_device=on_device, instead_of=instead_of))

    def commit(self, hand: Hand, speeds: dict[str, float] | None = None) -> None:
        """Hand in a result and check the answer."""
        job, speeds = self.model.jobs.get(hand[0]), speeds or {}
        answer = self.kit.commit_as(self.workers["w1"], *hand, job.upload_ids if job else [], speeds=speeds)
        self.check("commit", answer, self.model.commit(*hand, speeds))
        if answer == "ok":
            self.objects.add(f"outputs/{hand[0]}/done.json")

    def finish_marked(self, job: ModelJob, fence: int) -> None:
        """Finish a job as the store marks it, and check the answer."""
        marker = self.kit.marker(job.id, job.batch.id, job.batch.owner, fence, job.upload_ids)
        answer = self.kit.run(self.kit.reconciler.finish_marked(marker))
        self.check("finish marked", answer, self.model.finish_marked(job.id, fence, marker.attempts, "w9"))
        if answer == "finished":
            self.objects |= {f"outputs/{marker.output.key}", job.marker_name}

    def fail(self, hand: Hand) -> None:
        """Give a job up and check the answer."""
        answer = self.workers["w1"].fail(*hand, code="invalid_input", detail="It is torn.", timings={"run": 1})
        self.check("fail", answer, self.model.fail(*hand, ("invalid_input", "It is torn.")))

    def retry(self, hand: Hand, delay_seconds: int, *, counts: bool) -> None:
        """Give a job back and check the answer."""
        answer = self.workers["w1"].retry(
            *hand, delay_seconds=delay_seconds, counts=counts, max_errors=MAX_ERRORS, code="odd", detail="It is odd."
        )
        expected = self.model.retry(*hand, delay_seconds, ("odd", "It is odd."), counts=counts)
        self.check("retry", answer, expected)

    def renew(self, hands: list[Hand], step: int | None) -> None:
        """Renew leases and check the answers."""
        held = [HeldJob(job_id, fence, step, None if step is None else 9) for job_id, fence in hands]
        expected = self.model.renew([(one.job_id, one.fence, one.step) for one in held])
        self.check("renew", self.workers["w1"].renew(held), expected)

    def act(self, name: str, hand: Hand) -> None:
        """Make one of a holder's calls."""
        if name == "start":
            self.start(hand, on_device=True)
        elif name == "renew":
            self.renew([hand, hand], 3)
        elif name == "commit":
            self.commit(hand)
        elif name == "fail":
            self.fail(hand)
        else:
            self.retry(hand, 0, counts=True)

    def announce_worker(self, worker: str, models: dict[str, bool]) -> None:
        """Say what a worker serves, all of it in memory."""
        served = {model: WorkerModel(ready=is_ready, resident=is_ready) for model, is_ready in models.items()}
        self.workers[worker].announce(WorkerStatus(worker, "cpu", 1, served))
        self.model.announce(worker, models)

    def look_at_backlog(self, worker: str) -> str:
        """Look what waits for each model, and compare; returns the version to place a model with."""
        fleet = self.workers[worker].backlog(MODELS)
        found = [(one.num_ready, one.num_others, one.job_seconds) for one in fleet.models.values()]
        assert found == self.model.backlog(worker, list(MODELS))
        assert fleet.version == str(self.model.num_placed)
        return fleet.version

    def place(self, worker: str, version: str, load: str, evict: list[str], token: str) -> None:
        """Let a worker change its models, and check whether it may."""
        with mock.patch.object(worker_side.uuid, "uuid4", return_value=mock.Mock(hex=token)):
            answer = self.workers[worker].place(version, load, evict)
        self.check("place", answer, self.model.place(token, worker, version, load, evict))

    # Users.

    def _drawing(self, token: str) -> AbstractContextManager[object]:
        """Let the API draw this token, as its client library does when it repeats a call whose reply was lost."""
        return mock.patch.object(api_side.secrets, "token_hex", return_value=token)

    def cancel(self, token: str, owner: str, job_ids: list[str]) -> None:
        """Cancel jobs and check the answers."""
        with self._drawing(token):
            answer = self.kit.run(self.kit.api.cancel(owner, job_ids))
        self.check("cancel", answer, self.model.cancel(token, owner, job_ids))

    def reopen(
        self,
        token: str,
        owner: str,
        job_ids: list[str],
        max_open: int = MAX_OPEN,
        limited: tuple[str, int] | None = None,
    ) -> None:
        """Ask for another round of jobs and check the answers."""
        with self._drawing(token):
            answer = self.kit.run(self.kit.api.reopen(owner, job_ids, max_open_jobs=max_open, limited=limited))
        self.check("reopen", answer, self.model.reopen(token, owner, job_ids, max_open, limited))

    def delete(self, token: str, owner: str, batch_id: str) -> None:
        """Delete a batch and check the answer."""
        with self._drawing(token):
            answer = self.kit.run(self.kit.api.delete_batch(owner, batch_id))
        self.check("delete", answer, self.model.delete(token, owner, batch_id))

    def change(self, data: st.DataObject, call: Any, *args: Any) -> None:
        """Make a change of a user's; sometimes its reply is lost, and the client of Redis repeats it."""
        self.changes.append((call, self.new_id("token"), *args))
        for _ in range(data.draw(st.sampled_from((1, 1, 1, 2)))):
            call(*self.changes[-1][1:])
