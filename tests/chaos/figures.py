"""What a run amounts to in figures: jobs, faults, and how soon jobs of killed workers were claimed again."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.chaos.checker import Problem
from tests.chaos.history import Entry
from tests.chaos.story import Story, tell_story

# What a reader looks for first, where the words of the checker's rules stand behind each.
PROMISES: Final[Mapping[str, tuple[str, ...]]] = {
    "lost": ("lost", "commit_lost", "wrong_object"),
    "committed twice": ("committed_twice", "accepted_twice"),
    "wrong counters": ("wrong_counter",),
    "batch.finished wrong": ("wrong_finish", "wrong_webhook", "wrong_events", "gap"),
    "shown to another owner": ("stranger",),
    "anything else": ("wrong_end", "wrong_tries", "process_ended", "odd_answer", "gave_up"),
}


@dataclass(frozen=True)
class Recovery:
    """A job that a killed worker had in hand.

    Attributes:
        at: when the worker was killed, in seconds since 1970.
        queued_seconds: until the sweep had queued the job again.
        seconds: until another worker claimed it, which may have to start first.
        is_alone: whether no other fault was in the way meanwhile.
    """

    job_id: str
    at: float
    queued_seconds: float
    seconds: float
    is_alone: bool


def find_recoveries(entries: Sequence[Entry]) -> list[Recovery]:
    """Find the jobs that killed workers had in hand and that were claimed again."""
    story = tell_story(entries)
    logs = sorted((one for one in entries if one["kind"] == "worker.log"), key=lambda one: one["at"])
    recoveries: list[Recovery] = []
    for end in story.ends:
        if not end["name"].startswith("worker") or end["cause"] not in {"fault", "poison"}:
            continue
        for job_id in _in_hand(logs, end["name"], end["at"]):
            queued = _moments(story, job_id, "job.retrying", end["at"])
            claimed = _moments(story, job_id, "job.started", end["at"])
            if queued and claimed:
                recoveries.append(_recovery(story, job_id, end["at"], queued[0], claimed[0]))
    return recoveries


def _moments(story: Story, job_id: str, kind: str, since: float) -> list[float]:
    """List when something was told of a job, by the ledger's own clock."""
    told = (event for events in story.events.values() for event in events if event[2].get("job_id") == job_id)
    moments = (int(event_id.split("-")[0]) / 1000 for event_id, told_kind, _ in told if told_kind == kind)
    return [at for at in moments if at > since]


def _in_hand(logs: Sequence[Entry], worker: str, at: float) -> set[str]:
    held: set[str] = set()
    for one in logs:
        if one["worker"] == worker and one["at"] <= at:
            (held.add if one["event"] == "job.claimed" else held.discard)(one["job_id"])
    return held


def _recovery(story: Story, job_id: str, killed_at: float, queued_at: float, claimed_at: float) -> Recovery:
    others = sum(begin <= queued_at and end >= killed_at for begin, end, _ in story.faults)
    # Of these the kill itself is one.
    queued_seconds, seconds = round(queued_at - killed_at, 2), round(claimed_at - killed_at, 2)
    return Recovery(job_id, killed_at, queued_seconds, seconds, is_alone=others <= 1)


def summarize(entries: Sequence[Entry], problems: Sequence[Problem]) -> dict[str, Any]:
    """Put a run into figures."""
    story = tell_story(entries)
    jobs = [job for final in story.finals.values() for job in final["jobs"]]
    faults = Counter(kind for _, _, kind in story.faults)
    poisoned = sum(end["cause"] == "poison" for end in story.ends)
    moments = {
        one["kind"]: one["at"] for one in entries if one["kind"] in {"faults.begun", "faults.ended", "clients.ended"}
    }
    num_faults = faults.total() + poisoned
    found = find_recoveries(entries)
    return {
        "accepted_batches": len(story.promises),
        "accepted_jobs": sum(len(promise.roles) for promise in story.promises.values()),
        "ends": dict(Counter(job["status"] for job in jobs)),
        "codes": dict(Counter(job["error"]["code"] for job in jobs if job["error"])),
        "tried_again": sum(job["attempts"] > 1 for job in jobs),
        "faults": num_faults,
        "faults_by_kind": dict(faults) | ({"poison": poisoned} if poisoned else {}),
        "worker_kill_share": round((faults["worker.kill"] + poisoned) / max(1, num_faults), 3),
        "starts_refused": sum(end["cause"] == "start" for end in story.ends),
        "fault_seconds": round(moments["faults.ended"] - moments["faults.begun"], 1),
        "drain_seconds": round(moments["clients.ended"] - moments["faults.ended"], 1),
        "queued_again": _describe([one.queued_seconds for one in found]),
        "queued_again_alone": _describe([one.queued_seconds for one in found if one.is_alone]),
        "claimed_again": _describe([one.seconds for one in found]),
        "recoveries": [asdict(one) for one in found],
        "problems": [asdict(one) for one in problems],
    }


def _describe(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"count": len(seconds), "p50": round(statistics.median(seconds), 2), "max": max(seconds)}


def as_markdown(summary: Mapping[str, Any], *, bound_seconds: float) -> str:
    """Write the figures as a table, as docs/reliability.md has it."""
    broken = Counter(problem["rule"] for problem in summary["problems"])

    def recovery(name: str) -> str:
        found = summary[name]
        return f"{found['p50']:.1f} s / {found['max']:.1f} s, of {found['count']} jobs" if found else "none"

    by_kind = ", ".join(f"{kind} {count}" for kind, count in sorted(summary["faults_by_kind"].items()))
    rows = [
        ("faults that did harm", f"{summary['faults']} in {summary['fault_seconds']:.0f} s: {by_kind}"),
        ("of these, deaths of workers", f"{summary['worker_kill_share']:.0%}"),
        ("accepted", f"{summary['accepted_jobs']} jobs in {summary['accepted_batches']} batches"),
        ("ended", ", ".join(f"{count} {status}" for status, count in sorted(summary["ends"].items()))),
        ("reasons of failures", ", ".join(f"{code} {n}" for code, n in sorted(summary["codes"].items())) or "none"),
        ("tried more than once", str(summary["tried_again"])),
        ("starts refused while Redis or the store was away", str(summary["starts_refused"])),
        *((f"**{promise}**", f"**{sum(broken[rule] for rule in rules)}**") for promise, rules in PROMISES.items()),
        ("all had ended after the last fault", f"{summary['drain_seconds']:.1f} s"),
        (f"kill -9 until queued again, p50 / max (lease + sweep: {bound_seconds:g} s)", recovery("queued_again")),
        ("the same, where no other fault was in the way", recovery("queued_again_alone")),
        ("kill -9 until claimed again, by a worker that may have to start first", recovery("claimed_again")),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])
