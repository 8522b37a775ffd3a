"""What users do at random: uploads, submissions, cancellations, retries, deletions."""

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.integration.ledger.kit import FORM_SECONDS, GRACE_SECONDS, OFFER_SECONDS, STEP_SECONDS, UNUSED_SECONDS
from tests.integration.ledger.machine_calls import MAX_OPEN, MODELS, OWNERS, WORKERS
from tests.integration.ledger.machine_worker_rules import WorkerRules
from tests.integration.ledger.model_moves import PRIORITIES
from tests.integration.ledger.model_records import ModelUpload

LABELS = ("12 Oak St", "7 Elm St")
DIGESTS = ("d1", "d2")

announcements = st.tuples(
    st.sampled_from((None, *DIGESTS, *DIGESTS)),
    st.sampled_from((9, 9, 9, 10)),
    st.sampled_from(("image/jpeg",) * 3 + ("image/png",)),
)


class UserRules(WorkerRules):
    """The rules of users."""

    def __init__(self, new_ledger: Any, reached: Counter[str]) -> None:
        super().__init__(new_ledger, reached)
        self.submissions: list[tuple[Any, int, int | None, tuple[str, str, str] | None]] = []

    @initialize(
        batches=st.lists(
            st.tuples(
                st.sampled_from(OWNERS),
                st.sampled_from(PRIORITIES),
                st.lists(st.sampled_from(MODELS), min_size=1, max_size=3),
            ),
            min_size=1,
            max_size=3,
        ),
        hook=st.sampled_from((True, True, False)),
    )
    def batches_are_there(self, batches: list[tuple[str, str, list[str]]], hook: bool) -> None:
        """A ledger in which nothing waits shows little."""
        for owner, priority, models in batches:
            ids = self.announce_uploads(owner, [("d1", 9, "image/jpeg"), (None, 9, "image/jpeg")], FORM_SECONDS)
            named = [[ids[place % 2]] for place, _ in enumerate(models)]
            batch = self.describe_batch(owner, priority, models, named, hook=hook, label=LABELS[0])
            self.submissions.append((batch, MAX_OPEN, None, None))
            self.submit(batch, MAX_OPEN, None, None)

    # Uploads and submissions.

    @rule(
        owner=st.sampled_from(OWNERS),
        announced=st.lists(announcements, min_size=1, max_size=3),
        form_seconds=st.sampled_from((FORM_SECONDS, FORM_SECONDS, 0)),
        unused_seconds=st.sampled_from((UNUSED_SECONDS, UNUSED_SECONDS, 550, 150)),
    )
    def uploads_are_announced(
        self, owner: str, announced: list[tuple[str | None, int, str]], form_seconds: float, unused_seconds: float
    ) -> None:
        """Forms are handed out that may never be used, some for longer than their uploads are kept; and known ids."""
        self.announce_uploads(owner, announced, form_seconds, unused_seconds)
        if unused_seconds < form_seconds:
            self.pass_time(2 * STEP_SECONDS)
            self.expire()

    @precondition(lambda self: self.digests_known())
    @rule(
        data=st.data(),
        other=st.sampled_from((None, None, None, "size", "type")),
        steps=st.sampled_from((0, 3, 3)),
        offer_seconds=st.sampled_from((OFFER_SECONDS, OFFER_SECONDS, 250)),
        unused_seconds=st.lists(st.sampled_from((UNUSED_SECONDS, 550)), min_size=1, max_size=2),
    )
    def photo_is_sent_again(
        self, data: st.DataObject, other: str | None, steps: int, offer_seconds: float, unused_seconds: list[float]
    ) -> None:
        """An owner has the same photo again, or says so, while the first form can be used or later."""
        upload = data.draw(st.sampled_from(self.digests_known()))
        self.pass_time(steps * STEP_SECONDS)
        size_bytes = 11 if other == "size" else upload.size_bytes
        content_type = "image/webp" if other == "type" else upload.content_type
        photos = [(upload.sha256, size_bytes, content_type)] * 2
        for seconds in unused_seconds:
            self.announce_uploads(upload.owner, photos, FORM_SECONDS, seconds, offer_seconds)

    @precondition(lambda self: self.model.uploads)
    @rule(data=st.data())
    def photo_is_lost(self, data: st.DataObject) -> None:
        """The object of some upload is not in the store."""
        upload = self.model.uploads[data.draw(st.sampled_from(sorted(self.model.uploads)))]
        self.note_lost_upload(upload.owner, upload.id)

    def digests_known(self) -> list[ModelUpload]:
        """List the uploads whose bytes a batch has named."""
        return [one for one in self.model.uploads.values() if one.sha256 and one.etag]

    @rule(
        data=st.data(),
        owner=st.sampled_from(OWNERS),
        priority=st.sampled_from(PRIORITIES),
        models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3),
        trouble=st.sampled_from((*[None] * 7, "missing", "foreign", "full", "owner_full")),
        key=st.sampled_from((None, None, None, "k1", "k2")),
        body=st.sampled_from(("body-a", "body-b")),
        hook=st.booleans(),
        label=st.sampled_from((None, *LABELS)),
    )
    def batch_is_submitted(
        self,
        data: st.DataObject,
        owner: str,
        priority: str,
        models: list[str],
        trouble: str | None,
        key: str | None,
        body: str,
        hook: bool,
        label: str | None,
    ) -> None:
        """A batch comes, sometimes under a used key, with an upload that is not there, or one too many."""
        mine = [name for name, one in self.model.uploads.items() if one.owner == owner]
        mine = mine or self.announce_uploads(owner, [("d1", 9, "image/jpeg")], FORM_SECONDS)
        foreign = [name for name, one in self.model.uploads.items() if one.owner != owner]
        chosen = [data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=2)) for _ in models]
        if trouble == "missing":
            chosen[-1] = ["u-none"]
        if trouble == "foreign" and foreign:
            chosen[-1] = [data.draw(st.sampled_from(foreign))]
        batch = self.describe_batch(owner, priority, models, chosen, hook=hook, label=label)
        max_open = 0 if trouble == "full" else MAX_OPEN
        room = len(models) - (trouble == "owner_full")
        max_owner_open = self.model.num_open(owner) + room if trouble in {"missing", "owner_full"} else None
        idempotency = (key, body, f"answer of {batch.id}") if key else None
        self.submissions.append((batch, max_open, max_owner_open, idempotency))
        self.submit(*self.submissions[-1])

    @rule(
        owner=st.sampled_from(OWNERS),
        models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3),
        served=st.sets(st.sampled_from(MODELS)),
        steps=st.sampled_from((0, 5, 12)),
    )
    def batch_needs_workers(self, owner: str, models: list[str], served: set[str], steps: int) -> None:
        """A batch comes for models that a worker was ready for just now, long ago, or never."""
        self.announce_worker(WORKERS[0], {model: model in served for model in MODELS})
        self.pass_time(steps * STEP_SECONDS)
        ids = self.announce_uploads(owner, [(None, 9, "image/jpeg")], FORM_SECONDS)
        batch = self.describe_batch(owner, "normal", models, [ids for _ in models], hook=False, label=None)
        self.submit(batch, MAX_OPEN, None, None, GRACE_SECONDS)

    @precondition(lambda self: self.submissions)
    @rule(data=st.data())
    def submission_is_repeated(self, data: st.DataObject) -> None:
        """The reply to a submission was lost, so the API sends it again, word for word."""
        submission = data.draw(st.sampled_from(self.submissions[-3:]))
        # Once its records have gone, a batch's id is not used again.
        if submission[0].id in self.model.batches:
            self.submit(*submission)

    # Users.

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data(), owner=st.sampled_from(("", "", "", "", "ana")))
    def jobs_are_cancelled(self, data: st.DataObject, owner: str) -> None:
        """Somebody cancels jobs, own and foreign, in any state."""
        ids = [*self.model.jobs, "j-none"]
        self.change(data, self.cancel, owner, data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=2)))

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), act=st.sampled_from(("renew", "commit", "fail", "retry", "die")))
    def running_job_is_cancelled(self, data: st.DataObject, act: str) -> None:
        """A user cancels a running job, and its worker learns of it in one way or another, or dies before."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        self.change(data, self.cancel, "", [hand[0]])
        if act == "die":
            self.sweep_for_a_lease()
        else:
            self.act(act, hand)

    @precondition(lambda self: self.ended_jobs())
    @rule(
        data=st.data(),
        owner=st.sampled_from(("", "", "", "", "ana")),
        room=st.sampled_from((MAX_OPEN, MAX_OPEN, 0, 1)),
        limited=st.sampled_from((None, None, *OWNERS)),
        limited_room=st.sampled_from((0, 1, 2)),
    )
    def jobs_are_reopened(
        self, data: st.DataObject, owner: str, room: int, limited: str | None, limited_room: int
    ) -> None:
        """A user asks for another round of some jobs, those that can have one and others, of any batches."""
        ids = data.draw(st.lists(st.sampled_from(self.ended_jobs()), min_size=1, max_size=3))
        ids += data.draw(st.lists(st.sampled_from([*self.model.jobs, "j-none"]), max_size=2))
        most = MAX_OPEN if room == MAX_OPEN else self.model.num_open() + room
        self.change(
            data,
            self.reopen,
            owner,
            ids,
            most,
            limited and (limited, self.model.num_open(limited) + limited_room),
        )

    def ended_jobs(self) -> list[str]:
        """List the jobs that a user may want to have done again."""
        return [job.id for job in self.model.jobs.values() if job.status in {"failed", "cancelled"}]

    @precondition(lambda self: self.ended_jobs())
    @rule(data=st.data(), steps=st.sampled_from((4, 5)))
    def retry_comes_late(self, data: st.DataObject, steps: int) -> None:
        """A user asks for another round when the photos, and perhaps the results, have gone."""
        ids = self.ended_jobs()
        self.pass_time(steps * STEP_SECONDS)
        self.expire()
        self.change(data, self.reopen, "", [data.draw(st.sampled_from(ids))])

    @precondition(lambda self: self.model.batches)
    @rule(data=st.data(), owner=st.sampled_from(("", "", "", "", "ana")))
    def batch_is_deleted(self, data: st.DataObject, owner: str) -> None:
        """A user deletes a batch, one that has finished if there is one."""
        ids = [batch.id for batch in self.model.batches.values() if batch.status == "finished"]
        self.change(data, self.delete, owner, data.draw(st.sampled_from([*(ids or self.model.batches), "b-none"])))

    @precondition(lambda self: self.changes)
    @rule(data=st.data())
    def change_is_repeated(self, data: st.DataObject) -> None:
        """The reply to a change was lost, and it is repeated after others were made, perhaps much later."""
        call, *args = data.draw(st.sampled_from(self.changes[-4:]))
        call(*args)
