"""How a bell reaches a worker: Dramatiq's broker, the queue of each model, and the one actor.

The ledger orders the jobs; a Dramatiq message only says "look at the ledger". Losing one costs a moment, not a job.
"""

import os
from collections.abc import Callable

# Dramatiq reads it at import: one message in hand per queue, the rest stays where another worker can take it.
os.environ.setdefault("dramatiq_queue_prefetch", "1")

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

ACTOR_NAME = "ring"
DRAMATIQ_NAMESPACE = "dramatiq"


def queue_name(key_prefix: str, model_id: str) -> str:
    """Return the name of the Dramatiq queue that rings for a model; `prelude.lua` builds the same one."""
    return f"{key_prefix}.{model_id}"


def create_broker(client: redis.Redis) -> RedisBroker:
    """Return a broker on `client`, which must not decode responses.

    A dead worker's bells may lie until Dramatiq's upkeep finds them, which it leaves to chance: the sweep has long rung
    again, and upkeep looks through every key of the database.
    """
    return RedisBroker(client=client, namespace=DRAMATIQ_NAMESPACE, heartbeat_timeout=30_000)


def declare_ring(broker: RedisBroker, on_ring: Callable[[str], None], queue: str) -> None:
    """Let the actor answer bells on `queue`; call it once for each queue, always with the same `on_ring`.

    `on_ring` gets the model's id and must return at once and never raise: Dramatiq then always acknowledges, and its
    own retries, which lose messages while Redis is away, are never used.
    """
    if ACTOR_NAME in broker.get_declared_actors():
        # Messages find their actor by name; a second queue needs no second actor, and Dramatiq refuses one.
        broker.declare_queue(queue)
        return
    # An actor declares itself and its queue.
    dramatiq.Actor(
        on_ring,
        broker=broker,
        actor_name=ACTOR_NAME,
        queue_name=queue,
        priority=0,
        options={"max_retries": 0, "time_limit": float("inf")},
    )
