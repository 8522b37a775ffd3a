"""What must hold of every run, whatever befell it; each rule looks at the story alone and says what broke it.

python -m tests.chaos.checker history.jsonl
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.chaos.history import read_history
from tests.chaos.story import ENDS, Story, tell_story

# A job's own errors, or deaths on the device, that end it; so many tries a round may be its own fault.
MAX_OWN_TRIES: Final = 3
# Beside `succeeded`: with which codes jobs may fail that were made so. Any job may be on the device when its worker is
# killed, and after the third time it is taken for poison.
_CODES: Final = {"honest": set[str](), "flaky": {"internal_error"}, "hostile": {"invalid_input"}, "poison": set[str]()}


@dataclass(frozen=True)
class Problem:
    """One thing that should not be.

    Attributes:
        rule: that is broken: `lost`, `committed_twice`, …
        subject: the id of the batch, job or process.
    """

    rule: str
    subject: str
    detail: str


def check(story: Story) -> list[Problem]:
    """Return all that is wrong with a run; nothing is good."""
    return [problem for rule in RULES for problem in rule(story)]


def check_all_end(story: Story) -> Iterator[Problem]:
    """Every accepted batch is there with the jobs that were promised, and every job has ended."""
    for promise in story.promises.values():
        final = story.finals.get(promise.batch_id)
        if final is None:
            yield Problem("lost", promise.batch_id, f"was accepted for {promise.owner} and is not known any more")
            continue
        statuses = story.statuses(promise.batch_id)
        if statuses.keys() != promise.roles.keys():
            yield Problem("lost", promise.batch_id, f"has {len(statuses)} jobs; promised were {len(promise.roles)}")
        for job_id, status in statuses.items():
            if status not in ENDS:
                yield Problem("lost", job_id, f"is still {status}")
        if final["status"] != "finished":
            yield Problem("lost", promise.batch_id, f"is still {final['status']}")


def check_committed_once(story: Story) -> Iterator[Problem]:
    """No job is committed twice, by what the workers say or by what the ledger has told; what was committed stays."""
    ends = {job_id: status for batch_id in story.finals for job_id, status in story.statuses(batch_id).items()}
    for job_id, times in story.successes.items():
        if len(times) > 1:
            yield Problem("committed_twice", job_id, f"workers have committed it {len(times)} times")
        if ends.get(job_id) != "succeeded":
            yield Problem("commit_lost", job_id, f"was committed by a worker and is {ends.get(job_id, 'unknown')}")
    for events in story.events.values():
        told = Counter(data["job_id"] for _, kind, data in events if kind == "job.succeeded")
        for job_id, count in told.items():
            if count > 1:
                yield Problem("committed_twice", job_id, f"the ledger has told {count} times that it succeeded")


def check_objects(story: Story) -> Iterator[Problem]:
    """The result of every job that succeeded is in the store, with its digest."""
    for final in story.finals.values():
        for job in final["jobs"]:
            if job["status"] != "succeeded":
                continue
            found, promised = story.objects.get(job["id"]), (job["output"] or {}).get("sha256")
            if promised is None or found != promised:
                yield Problem("wrong_object", job["id"], f"the store has {found}; the record says {promised}")


def check_counters(story: Story) -> Iterator[Problem]:
    """A batch's counts are those of its jobs."""
    for batch_id, final in story.finals.items():
        counted = Counter(story.statuses(batch_id).values())
        expected = {name: counted.get(name, 0) for name in ("queued", "running", *ENDS)}
        expected["total"] = len(final["jobs"])
        if final["counts"] != expected:
            yield Problem("wrong_counter", batch_id, f"counts {final['counts']}; its jobs are {expected}")


def check_events(story: Story) -> Iterator[Problem]:
    """The ledger's events lead to the final states, one `batch.finished` stands behind each end, and nowhere else."""
    for batch_id in story.finals:
        events = story.events.get(batch_id)
        if events is None:
            yield Problem("wrong_events", batch_id, "its events could not be read")
            continue
        yield from _replay(story, batch_id, [(kind, data.get("job_id"), data["status"]) for _, kind, data in events])


def _replay(story: Story, batch_id: str, events: list[tuple[str, str | None, str]]) -> Iterator[Problem]:
    final = story.statuses(batch_id)
    statuses = dict.fromkeys(final, "queued")
    is_finish_due = False
    for kind, job_id, status in events:
        if (kind == "batch.finished") != is_finish_due:
            yield Problem("wrong_finish", batch_id, f"{kind} came where all jobs had ended: {is_finish_due}")
        if job_id is None:
            is_finish_due = False
            continue
        if statuses.get(job_id) == "succeeded" or (statuses.get(job_id) in ENDS and kind != "job.retrying"):
            yield Problem("wrong_events", job_id, f"was {statuses[job_id]} when {kind} came")
        statuses[job_id] = status
        is_finish_due = all(one in ENDS for one in statuses.values())
    if statuses != final:
        yield Problem("wrong_events", batch_id, "its events lead elsewhere than to the states of its jobs")
    if is_finish_due:
        yield Problem("wrong_finish", batch_id, "its end was never told")


def check_webhooks(story: Story) -> Iterator[Problem]:
    """Each end of a batch with a webhook is told under one id, and taken at least once; no other batch is told."""
    for batch_id in story.finals.keys() | story.webhooks.keys():
        promise = story.promises.get(batch_id)
        ends = sum(kind == "batch.finished" for _, kind, _ in story.events.get(batch_id, ()))
        expected = ends if promise is not None and promise.has_webhook else 0
        sent = story.webhooks.get(batch_id, [])
        taken = {webhook_id for webhook_id, status in sent if status < 300}
        if len({webhook_id for webhook_id, _ in sent}) != expected or len(taken) != expected:
            yield Problem("wrong_webhook", batch_id, f"ended {expected} times; sent were {sent}")


def check_owners(story: Story) -> Iterator[Problem]:
    """An owner is shown its own alone, all of it, and a key of idempotency always leads to the same batch."""
    own = {promise.batch_id: promise.owner for promise in story.promises.values()}
    own |= {job_id: promise.owner for promise in story.promises.values() for job_id in promise.roles}
    for owner, ids in story.seen.items():
        for one in ids:
            if own.get(one) != owner:
                yield Problem("stranger", one, f"was shown to {owner}, and was accepted for {own.get(one, 'nobody')}")
    for (owner, key), batch_ids in story.answers.items():
        if len(batch_ids) > 1:
            yield Problem("accepted_twice", key, f"{owner} was answered {len(batch_ids)} batches: {sorted(batch_ids)}")
    for owner, (batch_ids, job_ids) in story.final_lists.items():
        expected = {one for one, whose in own.items() if whose == owner}
        if missing := expected - batch_ids - job_ids:
            yield Problem("lost", owner, f"is not shown {len(missing)} of what was accepted, such as {min(missing)}")


def check_streams(story: Story) -> Iterator[Problem]:
    """Who followed a batch was told each change once, in order and without a gap, to the end."""
    for number, (batch_id, seen) in story.followed.items():
        kinds = {event_id: kind for event_id, kind, _ in story.events.get(batch_id, ())}
        following = dict(zip(["0-0", *kinds], [*kinds, None], strict=True))
        position = ""
        for kind, event_id in seen:
            # A snapshot of a batch that is over is followed by its end under the same id, or by nothing more.
            is_end = kind in {"batch.finished", "nothing.more"} and event_id == position
            if kind != "snapshot" and not is_end and following.get(position) != event_id:
                yield Problem("gap", batch_id, f"stream {number} went from {position} to {event_id} ({kind})")
            position = event_id
        if kinds.get(position) != "batch.finished":
            yield Problem("gap", batch_id, f"stream {number} ended at {position}: {seen[-1][0]}")


def check_reasons(story: Story) -> Iterator[Problem]:
    """Jobs end as they were made to: cancelled by request alone, failed with reason, after a bounded count of tries."""
    for promise in story.promises.values():
        for job in story.finals.get(promise.batch_id, {"jobs": ()})["jobs"]:
            role, status, code = promise.roles.get(job["id"], "honest"), job["status"], (job["error"] or {}).get("code")
            is_poisoned = code == "poisoned" and job["attempts"] >= MAX_OWN_TRIES
            is_allowed = {
                "succeeded": role in {"honest", "flaky"},
                "cancelled": job["id"] in story.cancels,
                "failed": code in _CODES[role] or is_poisoned,
            }
            if not is_allowed.get(status, True):
                yield Problem("wrong_end", job["id"], f"{role}: {status} {code or ''} after {job['attempts']} tries")
            yield from _check_tries(story, promise.batch_id, job["id"], job["attempts"])


def _check_tries(story: Story, batch_id: str, job_id: str, attempts: int) -> Iterator[Problem]:
    told = [(id_, kind) for id_, kind, data in story.events.get(batch_id, ()) if data.get("job_id") == job_id]
    kinds = [kind for _, kind in told]
    if kinds.count("job.started") != attempts:
        yield Problem("wrong_tries", job_id, f"{attempts} tries; {kinds.count('job.started')} were told")
    if not told:
        return
    num_rounds = 1 + sum(kind in {"job.failed", "job.cancelled"} for kind in kinds[:-1])
    begin_at, end_at = story.promises[batch_id].at, int(told[-1][0].split("-")[0]) / 1000
    num_faults = sum(end >= begin_at and begin <= end_at for begin, end, _ in story.faults)
    num_faults += sum(begin_at <= end["at"] <= end_at for end in story.ends)
    if attempts > num_rounds * MAX_OWN_TRIES + num_faults:
        yield Problem("wrong_tries", job_id, f"{attempts} tries in {num_rounds} rounds with {num_faults} faults")


def check_processes(story: Story) -> Iterator[Problem]:
    """No process ended of itself or could not be stopped in order, and no client was answered what it never should.

    One may refuse to start while what it needs is away: who starts it again need not be a human.
    """
    for end in story.ends:
        # It tries for some seconds before it gives up.
        is_near = any(begin <= end["at"] and over >= end["at"] - 30 for begin, over, _ in story.faults)
        is_refusal = end["cause"] == "start" and end["status"] == 1 and is_near
        is_caused = end["cause"] in {"fault", "poison", "stop.early"} or (end["cause"] == "stop" and end["status"] == 0)
        if not (is_caused or is_refusal):
            yield Problem("process_ended", end["name"], f"with status {end['status']}: {end.get('tail', '')}")
    for answer in story.odd_answers:
        yield Problem("odd_answer", answer["path"], f"{answer['status']}: {answer['text']}")
    for client, end in story.clients.items():
        if end != "done":
            yield Problem("gave_up", client, end or "it has neither ended nor given up")


RULES: Final[tuple[Callable[[Story], Iterator[Problem]], ...]] = (
    check_all_end,
    check_committed_once,
    check_objects,
    check_counters,
    check_events,
    check_webhooks,
    check_owners,
    check_streams,
    check_reasons,
    check_processes,
)


def main() -> int:
    """Check the history that is named; the exit status is 1 where something is wrong."""
    problems = check(tell_story(read_history(Path(sys.argv[1]))))
    for problem in problems:
        sys.stdout.write(f"{problem.rule} {problem.subject}: {problem.detail}\n")
    sys.stdout.write(f"{len(problems)} problems\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
