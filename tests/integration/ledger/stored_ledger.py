"""A ledger as an earlier version left it, as text: how such a file is written, and how it becomes a ledger again.

`python -m tests.integration.ledger.stored_ledger FILE` writes one with the code that is here: do that before a change
of what the ledger holds, and never with the code after it.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis

from server.embedded import EmbeddedValkey
from server.ledger.api_side import Idempotency
from server.ledger.scripts import SCHEMA_VERSION
from server.ledger.status import WorkerModel, WorkerStatus
from server.ledger.worker_side import HeldJob
from tests.conftest import MOVE_CLOCK
from tests.integration.ledger.kit import HOOK_URL, LedgerKit, record

FOLDER = Path(__file__).parent / "fixtures"
REPLAYED = Idempotency("oak-street", "5" * 64, '{"batch": "queued"}', 86400)


def fill(ledger: LedgerKit) -> None:
    """Bring batches of two owners into every state that there is.

    `queued` (`high`, with an idempotency key) and `waiting` (`low`), `staged` (claimed, not begun), `running` (one was
    cancelled meanwhile), `delayed` (after an error), `mixed` (finished: one job of each end; its webhook was tried
    once), `told` (finished, webhook due), `old` (its results have gone already).
    """
    ledger.run(ledger.api.check_schema())
    worker = ledger.worker("host-1-old")
    ledger.finish("old", ["flux"], owner="ben")
    ledger.pass_time(500)
    ledger.expire()
    _finish_mixed(ledger)
    ledger.finish("told", ["qwen"], owner="ben", hook=True)

    ledger.accept("delayed", ["flux"])
    job = ledger.claim(["flux"], "host-1-old")
    worker.retry(job.id, job.fence, delay_seconds=100, counts=True, max_errors=3, code="store_error", detail="cut off")
    ledger.accept("running", ["qwen", "qwen"], hook=True)
    for step, job in enumerate([ledger.claim(["qwen"], "host-1-old") for _ in range(2)], 1):
        worker.start(job.id, job.fence, on_device=True)
        worker.renew([HeldJob(job.id, job.fence, step, 8)])
    ledger.run(ledger.api.cancel("ana", ["running-1"]))
    ledger.accept("staged", ["flux"], owner="ben")
    ledger.claim(["flux"], "host-1-old")

    models = {"qwen": WorkerModel(ready=True, resident=True, version="1", weights_sha256="a" * 64)}
    worker.announce(WorkerStatus("host-1-old", "cuda:0", 7, models | {"flux": WorkerModel(ready=True, resident=True)}))
    batch = replace(ledger.batch("queued", ["qwen", "flux"], priority="high"), label="12 Oak St", metadata={"mls": "1"})
    ledger.announce_uploads(batch)
    assert ledger.submit(batch, idempotency=REPLAYED).kind == "accepted"
    ledger.accept("waiting", ["qwen", "qwen"], owner="ben", priority="low")
    ledger.announce([record("unused"), record("known", sha256="b" * 64)])
    ledger.sweep(["qwen", "flux"])


def _finish_mixed(ledger: LedgerKit) -> None:
    ledger.accept("mixed", ["qwen", "qwen", "qwen"], hook=True)
    assert ledger.commit(ledger.claim(["qwen"]), weights_sha256="a" * 64) == "ok"
    ledger.fail(ledger.claim(["qwen"]))
    ledger.run(ledger.api.cancel("ana", ["mixed-2"]))
    [due] = ledger.run(ledger.api.take_webhooks(limit=10, lease_seconds=60))
    assert due.batch.webhook is not None
    assert due.batch.webhook.url == HOOK_URL
    ledger.run(
        ledger.api.note_delivery(
            "mixed", 1, 1, outcome="retrying", http_status=500, detail="the receiver answered 500", delay_seconds=300
        )
    )


def dump(client: redis.Redis) -> dict[str, Any]:
    """Return all that a Redis holds: of each key its type, its value and the ms that it has left, -1 for ever."""
    keys: dict[str, Any] = {}
    for key in sorted(client.scan_iter()):
        kind = client.type(key)
        keys[key] = {"type": kind, "left_ms": client.pttl(key), "value": _read(client, key, kind)}
    seconds, _ = client.time()
    return {"schema": SCHEMA_VERSION, "seconds": seconds, "keys": keys}


def _read(client: redis.Redis, key: str, kind: Any) -> Any:
    match kind:
        case "string":
            return client.get(key)
        case "hash":
            return client.hgetall(key)
        case "list":
            return client.lrange(key, 0, -1)
        case "set":
            return sorted(client.smembers(key))
        case "zset":
            return client.zrange(key, 0, -1, withscores=True)
        case _:
            return client.xrange(key)


def restore(client: redis.Redis, stored: dict[str, Any]) -> None:
    """Write what `dump` returned into an empty Redis, as if no time had passed since."""
    for key, one in stored["keys"].items():
        _write(client, key, one["type"], one["value"])
    seconds, _ = client.time()
    # Backwards: what was due in a minute is due in a minute again.
    client.register_script(MOVE_CLOCK)(args=["restage", -1000 * (seconds - stored["seconds"])])
    for key, one in stored["keys"].items():
        if one["left_ms"] >= 0:
            client.pexpire(key, one["left_ms"])


def _write(client: redis.Redis, key: str, kind: str, value: Any) -> None:
    match kind:
        case "string":
            client.set(key, value)
        case "hash":
            client.hset(key, mapping=value)
        case "list":
            client.rpush(key, *value)
        case "set":
            client.sadd(key, *value)
        case "zset":
            client.zadd(key, dict(value))
        case _:
            for entry_id, fields in value:
                client.xadd(key, fields, id=entry_id)


def main(file: Path) -> None:
    """Fill an empty ledger and write it down."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedValkey(Path(folder) / "valkey")
        server.start()
        try:
            server.wait_ready()
            ledger = LedgerKit(server.url)
            fill(ledger)
            file.write_text(json.dumps(dump(ledger.client), indent=0, sort_keys=True) + "\n")
            ledger.close()
        finally:
            server.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
