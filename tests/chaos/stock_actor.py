"""The same work by Dramatiq alone, as its guide shows it: no ledger, no lease, no fence; for `test_stock.py`.

`python -m dramatiq tests.chaos.stock_actor` runs it. The upkeep that finds dead workers is not left to chance, which is
more than Dramatiq does by itself.
"""

import os
import signal
import time
from pathlib import Path

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from tests.chaos.history import History

QUEUE = "stage"
HEARTBEAT_SECONDS = 2.0
# The job that is on the device at the wrong moment: its worker is killed when it has committed, once.
UNLUCKY = "unlucky"

_URL = os.environ["STOCK_REDIS_URL"]
_history = History(Path(os.environ["STOCK_HISTORY"]))
_client = redis.Redis.from_url(_URL)
dramatiq.set_broker(
    RedisBroker(url=_URL, heartbeat_timeout=int(HEARTBEAT_SECONDS * 1000), maintenance_chance=1_000_000)
)


@dramatiq.actor(queue_name=QUEUE)
def stage(job_id: str) -> None:
    """Do the work and write the result down."""
    time.sleep(0.05)
    tries = _client.hincrby("stock:tries", job_id, 1)
    _client.hset("stock:ends", job_id, "succeeded")
    _history.add("worker.log", event="job.succeeded", worker=str(os.getpid()), job_id=job_id)
    if job_id == UNLUCKY and tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)
