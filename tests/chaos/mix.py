"""One run of everything: load, faults, then quiet, and a history of it all that the checker can judge."""

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.chaos.caller import Caller, GaveUp
from tests.chaos.history import Entry, History
from tests.chaos.load import Client, Habits
from tests.chaos.nemesis import Nemesis
from tests.chaos.receiver import Receiver
from tests.chaos.schedule import draw_schedule
from tests.chaos.stack import LEASE_SECONDS, ChaosStack
from tests.conftest import MOVE_CLOCK

_POLL_SECONDS = 0.05
_READING_SECONDS = 1800.0
# How the clock is moved for webhooks that wait for their second, third and fourth try.
_WEBHOOK_PASSES = (60, 300, 1500, 0)
_WEBHOOK_SECONDS = 15.0
_LOGGED = {"job.claimed", "job.succeeded", "job.failed", "job.lost", "job.retrying", "job.cancelled", "job.given_back"}


@dataclass(frozen=True)
class Plan:
    """What one run is.

    Attributes:
        seed: of faults and clients.
        seconds: of faults; the load begins before them and ends with them.
        gap_seconds: between two faults, on average.
        drain_seconds: after which everything must have ended.
        poison_seconds: after the begin of the faults; a job that kills its worker is submitted at each of them.
        habits: of the clients.
    """

    seed: int
    seconds: float
    gap_seconds: float
    drain_seconds: float
    num_apis: int = 1
    num_workers: int = 2
    num_owners: int = 3
    num_clients: int = 6
    poison_seconds: tuple[float, ...] = ()
    habits: Habits = field(default_factory=Habits)


def run_mix(plan: Plan, folder: Path, weights_dir: Path) -> Path:
    """Make one run, and return the file with its history.

    Call it from the main thread. What went wrong is the checker's to find; only a stack that never serves raises.

    Args:
        plan: of the run.
        folder: for the history, data and logs.
        weights_dir: of the tiny twins.

    Raises:
        TimeoutError: the stack did not come up.
    """
    history = History(folder / "history.jsonl")
    stack = ChaosStack(folder, weights_dir, history, num_apis=plan.num_apis, num_workers=plan.num_workers)
    receiver = Receiver(history, trouble=0.05, seed=plan.seed)
    try:
        with stack:
            _Run(plan, stack, history, receiver).go()
    finally:
        receiver.close()
        history.close()
    return history.path


class _Run:
    """The parts of a run that share its stack."""

    def __init__(self, plan: Plan, stack: ChaosStack, history: History, receiver: Receiver) -> None:
        self._plan = plan
        self._stack = stack
        self._history = history
        self._habits = plan.habits
        keys = {f"owner-{number}": stack.keys.add(f"owner-{number}", "user") for number in range(plan.num_owners)}
        owners = [*keys]
        draw = random.Random(plan.seed)

        def of(name: str, owner: str) -> dict[str, Any]:
            return {"name": name, "owner": owner, "key": keys[owner], "urls": stack.api_urls, "history": history}

        def make(name: str, owner: str) -> Client:
            seed = draw.randrange(2**32)
            return Client(webhook_url=receiver.url, habits=plan.habits, seed=seed, **of(name, owner))

        self._clients = [make(f"client-{n}", owners[n % len(owners)]) for n in range(plan.num_clients)]
        self._poisoner = make("poisoner", owners[0])
        self._readers = [Caller(**of(f"reader-{owner}", owner)) for owner in owners]

    def go(self) -> None:
        """Load, faults, quiet, final reads, and an end in order."""
        plan = self._plan
        schedule = draw_schedule(
            plan.seed,
            seconds=plan.seconds,
            gap_seconds=plan.gap_seconds,
            num_apis=plan.num_apis,
            num_workers=plan.num_workers,
            lease_seconds=LEASE_SECONDS,
        )
        self._insist_for(plan.seconds + plan.drain_seconds)
        works = [client.run for client in self._clients] + ([self._poison] if plan.poison_seconds else [])
        threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in threads:
            thread.start()
        self._history.add("faults.begun", seed=plan.seed)
        Nemesis(self._stack, self._history).run(schedule, seconds=plan.seconds)
        self._history.add("faults.ended")
        self._habits.stopping.set()
        self._tend_while(lambda: any(thread.is_alive() for thread in threads))
        self._history.add("clients.ended")
        self._insist_for(_READING_SECONDS)
        reading = threading.Thread(target=self._read_all, daemon=True)
        reading.start()
        self._tend_while(reading.is_alive)
        self._stack.stop()
        for entry in _worker_logs(self._stack):
            self._history.add("worker.log", **entry)
        for client in (*self._clients, self._poisoner, *self._readers):
            client.close()

    def _insist_for(self, seconds: float) -> None:
        for caller in (*self._clients, self._poisoner, *self._readers):
            caller.give_up_at = time.monotonic() + seconds

    def _tend_while(self, goes_on: Any) -> None:
        while goes_on():
            self._stack.tend()
            time.sleep(_POLL_SECONDS)

    def _poison(self) -> None:
        """Submit jobs that kill their workers, one after the other."""
        client, begun_at = self._poisoner, time.monotonic()
        self._history.add("client.begun", client=client.name)
        try:
            for seconds in self._plan.poison_seconds:
                self._habits.stopping.wait(begun_at + seconds - time.monotonic())
                client.see_to_end(client.submit(["poison"])["id"])
        except GaveUp as error:
            self._history.add("client.gave_up", client=client.name, reason=str(error))
            return
        self._history.add("client.done", client=client.name)

    def _read_all(self) -> None:
        """Read everything once more, as each owner, now that all is quiet."""
        try:
            for reader in self._readers:
                batch_ids, job_ids = reader.look_at_lists()
                self._history.add("final.list", owner=reader.owner, batch_ids=batch_ids, job_ids=job_ids)
                for batch_id in batch_ids:
                    self._read_batch(reader, batch_id)
            self._await_webhooks()
        except GaveUp as error:
            self._history.add("client.begun", client="reader")
            self._history.add("client.gave_up", client="reader", reason=str(error))

    def _read_batch(self, reader: Caller, batch_id: str) -> None:
        batch = reader.read(batch_id)
        kept = {name: batch[name] for name in ("id", "status", "counts")}
        of_jobs = ("id", "index", "status", "attempts", "error", "output", "created_at", "finished_at")
        jobs = [{name: job[name] for name in of_jobs} for job in batch["jobs"]]
        for job in jobs:
            if job["output"]:
                data = reader.fetch(job["output"].pop("url"))
                sha256 = None if data is None else Caller.digest(data)
                self._history.add("final.object", job_id=job["id"], sha256=sha256)
        self._history.add("final.batch", owner=reader.owner, batch=kept | {"jobs": jobs})
        if batch["status"] == "finished":  # the stream of any other goes on
            events = [(event_id, kind, _essence(data)) for event_id, kind, data in reader.all_events(batch_id)]
            self._history.add("final.events", batch_id=batch_id, events=events)

    def _await_webhooks(self) -> None:
        """Wait until no webhook is due any more; those that wait for long are helped by moving the clock."""
        with self._stack.redis_client() as client:
            for seconds in _WEBHOOK_PASSES:
                deadline = time.monotonic() + _WEBHOOK_SECONDS
                while client.exists("restage:webhooks") and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                if not client.exists("restage:webhooks"):
                    return
                client.register_script(MOVE_CLOCK)(args=["restage", seconds * 1000])


def _essence(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("status", "job_id") if name in data}


def _worker_logs(stack: ChaosStack) -> Iterator[Mapping[str, Any]]:
    """Yield what workers have said of jobs, of all their lives."""
    for name in stack.workers:
        for line in (stack.folder / f"{name}.log").read_text(errors="replace").splitlines():
            if not line.startswith('{"') or '"job"' not in line:
                continue
            try:
                said: Entry = json.loads(line)
            except ValueError:  # it was killed amid the line
                continue
            if said["event"] in _LOGGED:
                at = datetime.fromisoformat(said["timestamp"]).timestamp()
                yield {
                    "event": said["event"],
                    "worker": name,
                    "job_id": said["job"],
                    "attempt": said["attempt"],
                    "at": at,
                }
