"""Our bells are what Dramatiq itself would send, and a real Dramatiq worker answers them."""

import json
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker

from server.ledger.worker_side import connect
from server.queue import ACTOR_NAME, create_broker, declare_ring, queue_name
from server.settings import RedisSettings
from tests.chaos.proxy import Proxy

QUEUE = "restage.qwen"


@contextmanager
def running_worker(broker: RedisBroker, queues: set[str]) -> Iterator[dramatiq.Worker]:
    """Run a Dramatiq worker in this process."""
    worker = dramatiq.Worker(broker, queues=queues, worker_threads=1, worker_timeout=50)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


@pytest.fixture
def rung() -> queue.SimpleQueue[str]:
    """Give a place where the actor notes which models were rung for."""
    return queue.SimpleQueue()


def stored_message(client: Any, name: str) -> tuple[bytes, dict[str, Any]]:
    """Read the only message of a queue: its id in the list, and its content."""
    (message_id,) = client.lrange(f"dramatiq:{name}", 0, -1)
    ((field, message),) = client.hgetall(f"dramatiq:{name}.msgs").items()
    assert field == message_id
    return message_id, json.loads(message)


def test_our_message_is_the_one_that_dramatiq_writes(ledger: Any) -> None:
    """SUBMIT leaves the same keys of the same types, and a message with the same fields, as `broker.enqueue`."""
    client = ledger.raw_client
    ledger.accept("b1", ["qwen"])
    our_id, ours = stored_message(client, QUEUE)
    # Workers of other ledgers may listen beside this one.
    pattern = f"dramatiq:*{QUEUE}*"
    our_types = {key: client.type(key) for key in client.keys(pattern)}
    client.delete(*our_types)

    broker = create_broker(client)
    declare_ring(broker, lambda _model: None, QUEUE)
    broker.enqueue(broker.get_actor(ACTOR_NAME).message("qwen"))
    their_id, theirs = stored_message(client, QUEUE)
    # An enqueueing Dramatiq also notes its own heartbeat, under another name: a bell of ours comes from no worker.
    assert {key: client.type(key) for key in client.keys(pattern)} == our_types

    assert ours["options"] == {"redis_message_id": our_id.decode()}
    assert theirs["options"] == {"redis_message_id": their_id.decode()}
    told_apart = ("message_id", "message_timestamp", "options")
    assert {name: type(ours[name]) for name in ours} == {name: type(theirs[name]) for name in theirs}
    assert {name: value for name, value in ours.items() if name not in told_apart} == {
        name: value for name, value in theirs.items() if name not in told_apart
    }
    assert abs(theirs["message_timestamp"] - ours["message_timestamp"]) < 60_000
    decoded = dramatiq.Message.decode(json.dumps(ours).encode())
    assert json.loads(decoded.encode()) == ours


def test_every_bell_of_a_batch_has_an_id_of_its_own(ledger: Any) -> None:
    """Fifty jobs accepted in one script are fifty messages."""
    ledger.client.sadd(f"{ledger.prefix}:workers", *(f"w{number}" for number in range(50)))
    ledger.accept("b1", ["qwen"] * 50)
    ids = ledger.raw_client.lrange(f"dramatiq:{QUEUE}", 0, -1)
    assert len(set(ids)) == ledger.raw_client.hlen(f"dramatiq:{QUEUE}.msgs") == 50


def test_no_more_bells_are_rung_than_there_are_workers(ledger: Any) -> None:
    """Each worker claims until nothing is ready; where none is known, one bell waits for the first."""
    ledger.accept("b1", ["qwen"] * 20)
    assert ledger.client.llen(f"dramatiq:{QUEUE}") == 1
    ledger.client.sadd(f"{ledger.prefix}:workers", "w1", "w2", "w3")
    ledger.accept("b2", ["qwen"] * 20)
    assert ledger.client.llen(f"dramatiq:{QUEUE}") == 1 + 3
    ledger.accept("b3", ["qwen"] * 2)
    assert ledger.client.llen(f"dramatiq:{QUEUE}") == 1 + 3 + 2


def test_a_retry_rings_for_each_job(ledger: Any) -> None:
    """What a user queues again wakes workers as what was just submitted does."""
    ledger.accept("b1", ["qwen", "flux"])
    ledger.run(ledger.api.cancel("ana", ["b1-0", "b1-1"]))
    ledger.client.delete(*ledger.client.keys("dramatiq:*"))
    assert ledger.run(ledger.api.reopen("ana", ["b1-0", "b1-1"], max_open_jobs=9)) == ["queued", "queued"]
    for model in ("qwen", "flux"):
        _, message = stored_message(ledger.raw_client, f"restage.{model}")
        assert message["args"] == [model]


def test_a_dramatiq_worker_answers_the_bells(
    ledger: Any, rung: queue.SimpleQueue[str], wait_until: Callable[..., None]
) -> None:
    """The actor hears of each job's model, and every message is acknowledged: neither list nor dead letter is left."""
    broker = create_broker(ledger.raw_client)
    queues = {queue_name(ledger.prefix, model) for model in ("flux", "qwen")}
    for name in sorted(queues):
        declare_ring(broker, rung.put, name)
    assert broker.get_declared_queues() == queues
    ledger.accept("before", ["qwen", "flux"])
    with running_worker(broker, queues):
        assert {rung.get(timeout=10), rung.get(timeout=10)} == {"qwen", "flux"}
        ledger.accept("after", ["qwen"])
        assert rung.get(timeout=10) == "qwen"
        wait_until(lambda: ledger.client.keys("dramatiq:*") == ["dramatiq:__heartbeats__"])
    assert rung.empty()


def test_bells_of_another_models_queue_are_left_alone(ledger: Any, rung: queue.SimpleQueue[str]) -> None:
    """A worker takes bells of the queues it listens to and of no other."""
    ledger.accept("b1", ["flux", "qwen"])
    broker = create_broker(ledger.raw_client)
    declare_ring(broker, rung.put, QUEUE)
    with running_worker(broker, {QUEUE}):
        assert rung.get(timeout=10) == "qwen"
    assert ledger.client.llen("dramatiq:restage.flux") == 1


def test_the_bell_of_a_dead_worker_rings_elsewhere(ledger: Any, rung: queue.SimpleQueue[str]) -> None:
    """A message that a worker died with is not waited for: the sweep rings again, and another worker answers."""
    ledger.accept("b1", ["qwen"])
    dead = create_broker(ledger.raw_client)
    dead.declare_queue(QUEUE)
    assert next(dead.consume(QUEUE, timeout=100)) is not None
    assert ledger.client.llen(f"dramatiq:{QUEUE}") == 0

    assert ledger.sweep(["qwen"]).rung == 1

    broker = create_broker(ledger.raw_client)
    declare_ring(broker, rung.put, QUEUE)
    with running_worker(broker, {QUEUE}):
        assert rung.get(timeout=10) == "qwen"


def test_bells_that_were_flushed_or_torn_ring_again(
    ledger: Any, rung: queue.SimpleQueue[str], wait_until: Callable[..., None]
) -> None:
    """A bell without its content, and all of Dramatiq's keys deleted under a worker, cost a sweep and no job."""
    client = ledger.raw_client
    ledger.client.sadd(f"{ledger.prefix}:workers", "w1", "w2")
    ledger.accept("b1", ["qwen", "qwen"])
    torn, _ = client.lrange(f"dramatiq:{QUEUE}", 0, -1)
    assert client.hdel(f"dramatiq:{QUEUE}.msgs", torn) == 1
    broker = create_broker(client)
    declare_ring(broker, rung.put, QUEUE)
    with running_worker(broker, {QUEUE}):
        assert rung.get(timeout=10) == "qwen"
        wait_until(lambda: client.hlen(f"dramatiq:{QUEUE}.msgs") == 0)
        client.delete(*client.keys("dramatiq:*"))
        assert ledger.sweep(["qwen"]).rung == 1
        assert rung.get(timeout=10) == "qwen"
    assert rung.empty()
    assert [ledger.claim(["qwen"]).id for _ in range(2)] == ["b1-0", "b1-1"]


def test_a_full_redis_stills_the_bells_for_as_long_as_it_is_full(
    ledger: Any, rung: queue.SimpleQueue[str], wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dramatiq's own scripts are refused then, acknowledgements too; its worker lives on and hears what rings later."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
    before = ledger.client.config_get("maxmemory")["maxmemory"]
    broker = create_broker(ledger.raw_client)
    declare_ring(broker, rung.put, QUEUE)
    with running_worker(broker, {QUEUE}):
        ledger.accept("b1", ["qwen"])
        assert rung.get(timeout=10) == "qwen"
        ledger.client.config_set("maxmemory", 1)
        try:
            num_refused = ledger.client.info("stats")["total_error_replies"]
            wait_until(lambda: ledger.client.info("stats")["total_error_replies"] > num_refused + 2)
            assert ledger.commit(ledger.claim(["qwen"])) == "ok"
        finally:
            ledger.client.config_set("maxmemory", before)
        ledger.accept("b2", ["qwen"])
        assert rung.get(timeout=10) == "qwen"


def test_a_bell_whose_fetch_or_acknowledgement_is_never_answered_costs_a_sweep(
    ledger: Any, rung: queue.SimpleQueue[str], wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dramatiq leaves such a bell in the hands of a worker that lives, for ever: the sweep rings another."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.05)
    ledger.accept("b1", ["qwen"])
    with Proxy(urlsplit(ledger.url).port or 0) as proxy:
        settings = RedisSettings(url=f"redis://{proxy.address}/0")
        with closing(connect(settings, decode=False)) as client:
            broker = create_broker(client)
            declare_ring(broker, rung.put, QUEUE)
            ledger.raw_client.script_load(broker.scripts["dispatch"].script)
            proxy.lose_replies(b"\r\nfetch\r\n", times=4)
            with running_worker(broker, {QUEUE}):
                wait_until(lambda: proxy.num_to_lose == 0)
                assert ledger.client.llen(f"dramatiq:{QUEUE}") == 0
                assert rung.empty()
                proxy.lose_replies(b"\r\nack\r\n", times=4)
                assert ledger.sweep(["qwen"]).rung == 1
                assert rung.get(timeout=10) == "qwen"
                wait_until(lambda: proxy.num_to_lose == 0)
                ledger.client.delete(f"dramatiq:{QUEUE}")
                assert ledger.sweep(["qwen"]).rung == 1
                assert rung.get(timeout=10) == "qwen"
    assert rung.empty()


def test_the_actor_has_neither_retries_nor_a_time_limit(ledger: Any) -> None:
    """Dramatiq's own retries and time limit are off: the one loses messages, the other strikes in mid-commit."""
    broker = create_broker(ledger.raw_client)
    declare_ring(broker, lambda _model: None, QUEUE)
    declare_ring(broker, lambda _model: None, "restage.flux")
    actor = broker.get_actor(ACTOR_NAME)
    assert (actor.options["max_retries"], actor.options["time_limit"]) == (0, float("inf"))
    assert set(broker.actors) == {ACTOR_NAME}


def test_a_worker_holds_one_bell_of_a_queue() -> None:
    """Importing the queue is enough for Dramatiq to prefetch one message only."""
    code = "import server.queue, dramatiq.worker; print(dramatiq.worker.QUEUE_PREFETCH)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"
