"""Dramatiq alone, at the same faults, before the same checker: it loses a job and does one twice, and that is found."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker

from server.child import Child
from tests.chaos.checker import check
from tests.chaos.history import History, read_history
from tests.chaos.proxy import Proxy
from tests.chaos.story import tell_story
from tests.conftest import REPOSITORY, untraced

# The actor's module wants a Redis when it is imported; its names are repeated here.
QUEUE, UNLUCKY, HEARTBEAT_SECONDS = "stage", "unlucky", 2.0


class Stock:
    """A producer, a worker behind a fault proxy, and what each job has come to."""

    def __init__(self, valkey: Any, folder: Any, proxy: Proxy) -> None:
        self.client = valkey.client(decode_responses=True)
        self.history = History(folder / "history.jsonl")
        self.broker = RedisBroker(url=valkey.url)
        self.broker.declare_queue(QUEUE)
        self.environment = untraced() | {
            "STOCK_REDIS_URL": f"redis://{proxy.address}/0",
            "STOCK_HISTORY": str(self.history.path),
            "dramatiq_queue_prefetch": "1",
        }
        self.folder = folder
        self.worker: Child | None = None

    def send(self, job_id: str) -> None:
        """Enqueue a job; from now on it is accepted."""
        self.broker.enqueue(dramatiq.Message(queue_name=QUEUE, actor_name=QUEUE, args=(job_id,), kwargs={}, options={}))
        roles, batch_id = {job_id: "honest"}, f"batch-{job_id}"
        accepted = {"owner": "ana", "key": job_id, "batch_id": batch_id, "roles": roles, "has_webhook": False}
        self.history.add("submit.accepted", **accepted)

    def start_worker(self) -> None:
        """Start a worker, in place of one that has died."""
        if self.worker is not None:
            self.worker.kill_group()
        command = [sys.executable, "-m", "dramatiq", "tests.chaos.stock_actor", "--processes", "1", "--threads", "1"]
        self.worker = Child("stock", command, log_file=self.folder / "stock.log", cwd=REPOSITORY)
        self.worker.start(self.environment)

    @property
    def is_worker_dead(self) -> bool:
        """Whether the worker has ended."""
        return self.worker is not None and not self.worker.is_running

    def tries(self, job_id: str) -> int:
        """How often a job was done."""
        return int(self.client.hget("stock:tries", job_id) or 0)

    def read_ends(self, job_ids: list[str]) -> None:
        """Note what has become of each job in the end."""
        for job_id in job_ids:
            status = self.client.hget("stock:ends", job_id) or "queued"
            jobs = [{"id": job_id, "status": status, "attempts": self.tries(job_id), "error": None, "output": None}]
            batch = {"id": f"batch-{job_id}", "status": "finished", "counts": {}, "jobs": jobs}
            self.history.add("final.batch", owner="ana", batch=batch)

    def close(self) -> None:
        """End everything."""
        if self.worker is not None:
            self.worker.kill_group()
        self.broker.close()
        self.history.close()


@pytest.fixture
def proxy(valkey: Any) -> Iterator[Proxy]:
    """Give a fault proxy before Valkey."""
    with Proxy(valkey.server.ports[0]) as started:
        yield started


@pytest.fixture
def stock(valkey: Any, proxy: Proxy, tmp_path: Any) -> Iterator[Stock]:
    """Give a producer; the test starts the worker."""
    made = Stock(valkey, tmp_path, proxy)
    yield made
    made.close()


def test_dramatiq_alone_loses_a_job_and_does_one_twice(
    stock: Stock, proxy: Proxy, wait_until: Callable[..., Any]
) -> None:
    """A kill between commit and acknowledgement does a job twice; a fetch whose reply is lost loses one for good."""
    stock.send(UNLUCKY)
    stock.start_worker()
    wait_until(lambda: stock.tries(UNLUCKY) == 1, 60)
    wait_until(lambda: stock.is_worker_dead, 60)
    stock.send("fetched")
    proxy.lose_replies(f"\r\n{QUEUE}\r\n".encode())
    stock.start_worker()
    wait_until(lambda: proxy.num_lost == 1, 60)
    stock.send("lucky")
    wait_until(lambda: stock.tries("lucky") == 1 and stock.tries(UNLUCKY) == 2, 60)
    # Long enough for its upkeep to find whatever it ever finds: it ran when the unlucky one was found.
    time.sleep(2 * HEARTBEAT_SECONDS)
    stock.read_ends([UNLUCKY, "fetched", "lucky"])

    problems = check(tell_story(read_history(stock.history.path)))
    found = {(one.rule, one.subject) for one in problems}
    assert ("committed_twice", UNLUCKY) in found
    assert ("lost", "fetched") in found
    assert not {("lost", UNLUCKY), ("lost", "lucky"), ("committed_twice", "lucky")} & found
