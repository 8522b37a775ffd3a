"""Listens to Dramatiq's queues: a bell makes the worker look at the ledger, and does nothing else."""

import logging
from collections.abc import Callable, Iterable

import dramatiq
import redis

from server.ledger.worker_side import connect
from server.queue import create_broker, declare_ring, queue_name
from server.settings import RedisSettings

# How long a queue may be asleep: the upper bound of what a bell waits. Each look writes a heartbeat, which Redis puts
# on disk, and costs both a little for each model. Nobody waits for it where the control stream is heard, so it is rare.
POLL_MILLISECONDS = 1000
STOP_MILLISECONDS = 5000


class Bells:
    """A Dramatiq worker in this process, on the queues of all models that it may serve.

    Args:
        settings: of Redis.
        models: ids.
        on_ring: called from another thread for each bell; returns at once and never raises.
    """

    def __init__(self, settings: RedisSettings, models: Iterable[str], on_ring: Callable[[], None]) -> None:
        self._client = connect(settings, decode=False)
        broker = create_broker(self._client)
        for model in models:
            declare_ring(broker, lambda _model: on_ring(), queue_name(settings.key_prefix, model))
        self._worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=POLL_MILLISECONDS)

    def start(self) -> None:
        """Listen, in threads of Dramatiq's own."""
        quiet_dramatiq()
        self._worker.start()

    def stop(self) -> None:
        """Listen no more, so that the bells go to other workers."""
        self._worker.stop(timeout=STOP_MILLISECONDS)
        self._client.close()


def quiet_dramatiq() -> None:
    """Leave out what Dramatiq says of an outage of Redis: each queue would repeat what the worker has said once."""
    dramatiq_log = logging.getLogger("dramatiq")
    dramatiq_log.setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_outage)


def _is_no_outage(record: logging.LogRecord) -> bool:
    if not record.name.startswith("dramatiq."):
        return True
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, redis.RedisError) or "connection error" in record.getMessage())
