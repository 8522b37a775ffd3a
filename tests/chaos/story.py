"""A history put in order: what was promised for each batch, and what the final reads say became of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.history import Entry

ENDS = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Promise:
    """A batch that a client was told is accepted.

    Attributes:
        roles: of the jobs, by their ids: what the client has made of each (`honest`, `flaky`, `hostile`, `poison`).
    """

    batch_id: str
    owner: str
    key: str
    at: float
    roles: Mapping[str, str]
    has_webhook: bool


@dataclass
class Story:
    """What a history tells.

    Attributes:
        promises: by the batch's id; what was answered first.
        answers: all accepted answers, by owner and idempotency key: the ids of the batches that they named.
        finals: the batches as they were read in the end, by id.
        events: what the ledger has told of each batch, from its beginning: `(id, type, data)`.
        objects: the digest of each result in the store, by job; None: there is none.
        final_lists: what an owner's lists show in the end: ids of batches, ids of jobs.
        seen: ids of batches and jobs in all that an owner was ever shown.
        successes: when workers have said that a job is committed, by job.
        followed: what each stream of events brought, by its number: the batch, then type and id of each event.
        webhooks: by batch: the id of each webhook that arrived, and what it was answered.
        cancels: jobs that were to be cancelled, by a call that may have arrived.
        faults: that befell the run.
        ends: of processes, as they were noticed.
        odd_answers: statuses that no client should ever get.
        clients: how each ended: `done`, why it gave up, or "" where it has not ended.
    """

    promises: dict[str, Promise] = field(default_factory=dict)
    answers: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    finals: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    events: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = field(default_factory=dict)
    objects: dict[str, str | None] = field(default_factory=dict)
    final_lists: dict[str, tuple[set[str], set[str]]] = field(default_factory=dict)
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    successes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    followed: dict[str, tuple[str, list[tuple[str, str]]]] = field(default_factory=dict)
    webhooks: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    cancels: set[str] = field(default_factory=set)
    faults: list[tuple[float, float, str]] = field(default_factory=list)
    ends: list[Entry] = field(default_factory=list)
    odd_answers: list[Entry] = field(default_factory=list)
    clients: dict[str, str] = field(default_factory=dict)

    def statuses(self, batch_id: str) -> dict[str, str]:
        """Return the final status of each job of a batch."""
        return {job["id"]: job["status"] for job in self.finals[batch_id]["jobs"]}


def tell_story(entries: Iterable[Entry]) -> Story:
    """Put a history in order."""
    story = Story()
    begun: dict[int, Entry] = {}
    for entry in entries:
        kind: str = entry["kind"]
        if kind == "fault.begun":
            begun[entry["number"]] = entry
        elif kind == "fault.ended" and entry["did_harm"]:
            begin = begun[entry["number"]]
            story.faults.append((begin["at"], entry["at"], begin["fault"]))
        elif (read := _READERS.get(kind)) is not None:
            read(story, entry)
    return story


def _read_accepted(story: Story, entry: Entry) -> None:
    story.answers[entry["owner"], entry["key"]].add(entry["batch_id"])
    story.seen[entry["owner"]] |= {entry["batch_id"], *entry["roles"]}
    promise = Promise(
        entry["batch_id"], entry["owner"], entry["key"], entry["at"], entry["roles"], entry["has_webhook"]
    )
    story.promises.setdefault(promise.batch_id, promise)


def _read_listed(story: Story, entry: Entry) -> None:
    story.seen[entry["owner"]] |= {*entry["batch_ids"], *entry["job_ids"]}


def _read_final_list(story: Story, entry: Entry) -> None:
    _read_listed(story, entry)
    story.final_lists[entry["owner"]] = ({*entry["batch_ids"]}, {*entry["job_ids"]})


def _read_final_batch(story: Story, entry: Entry) -> None:
    story.finals[entry["batch"]["id"]] = entry["batch"]


def _read_final_events(story: Story, entry: Entry) -> None:
    story.events[entry["batch_id"]] = [(event_id, kind, data) for event_id, kind, data in entry["events"]]


def _read_final_object(story: Story, entry: Entry) -> None:
    story.objects[entry["job_id"]] = entry["sha256"]


def _read_worker_log(story: Story, entry: Entry) -> None:
    if entry["event"] == "job.succeeded":
        story.successes[entry["job_id"]].append(entry["at"])


def _read_followed(story: Story, entry: Entry) -> None:
    story.followed.setdefault(entry["stream"], (entry["batch_id"], []))[1].append((entry["type"], entry["event_id"]))


def _read_webhook(story: Story, entry: Entry) -> None:
    story.webhooks[entry["batch_id"]].append((entry["webhook_id"], entry["status"]))


def _read_client(story: Story, entry: Entry) -> None:
    ends = {"client.begun": "", "client.done": "done", "client.gave_up": entry.get("reason", "")}
    story.clients[entry["client"]] = ends[entry["kind"]]


_READERS = {
    "submit.accepted": _read_accepted,
    "listed": _read_listed,
    "final.list": _read_final_list,
    "final.batch": _read_final_batch,
    "final.events": _read_final_events,
    "final.object": _read_final_object,
    "worker.log": _read_worker_log,
    "followed": _read_followed,
    "webhook": _read_webhook,
    "client.begun": _read_client,
    "client.done": _read_client,
    "client.gave_up": _read_client,
    "cancel.sent": lambda story, entry: story.cancels.update(entry["job_ids"]),
    "process.ended": lambda story, entry: story.ends.append(entry),
    "answer.odd": lambda story, entry: story.odd_answers.append(entry),
}
