"""The ledger as a worker uses it: claim, say what is on the device, renew, and hand in the result. Blocking calls."""

import json
import threading
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from server.eta import RUN
from server.jobs import Job, JobInput, JobOutput
from server.ledger.records import dump, parse_job
from server.ledger.scripts import as_map, check_schema, script_keys, script_text, unavailable
from server.ledger.sent import SentScript
from server.ledger.status import WorkerStatus, worker_fields
from server.settings import RedisSettings

Reply = Literal["ok", "cancelled", "lost", "failed"]
ANNOUNCED_FOR_SECONDS = 30
_SCRIPTS = ("claim", "start", "renew", "commit", "fail", "retry", "backlog", "place", "announce")


@dataclass(frozen=True)
class Alone:
    """CLAIM's answer when the next job is suspected of killing workers: come back with no other job in hand."""


@dataclass(frozen=True)
class Backlog:
    """What waits for one model, and who serves it.

    Attributes:
        num_ready: jobs that wait to be claimed.
        oldest_age_seconds: of those.
        num_others: other workers that hold the model, or are loading it.
        job_seconds: of a run lately; None: never measured.
    """

    num_ready: int
    oldest_age_seconds: float
    num_others: int = 0
    job_seconds: float | None = None


@dataclass(frozen=True)
class Fleet:
    """What waits for each model, as it was at a `version` that `place` compares."""

    version: str
    models: Mapping[str, Backlog]


@dataclass(frozen=True)
class HeldJob:
    """A job as RENEW needs it; steps are None until the run has begun."""

    job_id: str
    fence: int
    step: int | None = None
    total_steps: int | None = None


class SentStart:
    """A START on its way."""

    def __init__(self, sent: SentScript) -> None:
        self._sent = sent

    @property
    def is_sent(self) -> bool:
        """Whether Redis has got it; if not, `reply` sends it."""
        return self._sent.is_sent

    @property
    def is_answered(self) -> bool:
        """Whether `reply` need not wait."""
        return self._sent.is_answered

    def reply(self) -> Reply:
        """Wait for the answer; called again after an error, it says the same once more and waits for that.

        Raises:
            LedgerUnavailable: Redis does not serve.
        """
        with ledger_errors():
            return cast("Reply", self._sent.answer())


def _start_arguments(job_id: str, fence: int, on_device: bool, instead_of: HeldJob | None) -> tuple[object, ...]:
    return job_id, fence, int(on_device), *((instead_of.job_id, instead_of.fence) if instead_of else ())


def _encodable(text: str) -> str:
    """Escape what UTF-8 cannot say: an exception may quote a file name that is not text, and must still be recorded."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def ledger_errors() -> Generator[None]:
    """Turn a Redis that does not serve into `LedgerUnavailable`; mistakes of ours stay what they are."""
    try:
        yield
    except RedisError as error:
        if (translated := unavailable(error)) is None:
            raise
        raise translated from error


def connect(settings: RedisSettings, *, decode: bool = True) -> redis.Redis:
    """Return a client that answers or fails within about two timeouts; it connects at its first call.

    A broken connection is made anew, twice. A timeout is not tried again: redis-py would do so for connecting and for
    the call, nine times in all, and a lease may end before that.
    """
    return redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType] (redis types no **kwargs)
        settings.url,
        password=settings.password.get_secret_value() if settings.password else None,
        decode_responses=decode,
        socket_timeout=settings.timeout_seconds,
        socket_connect_timeout=settings.timeout_seconds,
        health_check_interval=15,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), 2, supported_errors=(redis.ConnectionError,)),
    )


class WorkerLedger:
    """One worker's view of the ledger; safe to use from several threads."""

    def __init__(self, client: redis.Redis, *, worker_id: str, key_prefix: str, lease_seconds: float) -> None:
        self.worker_id = worker_id
        self._client = client
        self._prefix = key_prefix
        self._lease_ms = int(lease_seconds * 1000)
        self._keys = script_keys(key_prefix)
        self._scripts = {name: client.register_script(script_text(name)) for name in _SCRIPTS}
        self._claiming = threading.Lock()
        # A token that is kept until its answer arrived makes a claim safe to repeat.
        self._claim_token: str | None = None
        self._has_loaded_start = False
        # The models of the last announcement: `leave` takes the worker out of their holders.
        self._announced: tuple[str, ...] = ()

    def _run(self, name: str, *args: object) -> Any:
        with ledger_errors():
            return self._scripts[name](keys=self._keys, args=[*args])  # pyright: ignore[reportArgumentType]

    def check_schema(self) -> bool:
        """Refuse a ledger that another version wrote.

        Returns:
            Whether there is a ledger: one that no API has begun yet may still become another version's.

        Raises:
            ConfigError: the ledger has another schema version.
            LedgerUnavailable: Redis does not serve.
        """
        with ledger_errors():
            found = cast("str | None", self._client.get(f"{self._prefix}:schema"))
        check_schema(found, self._prefix)
        return found is not None

    def claim(self, models: Sequence[str], *, num_held: int, high_only: bool = False) -> Job | Alone | None:
        """Take the best ready job of `models`, or None when nothing is ready; with `high_only` of that priority alone.

        Raises:
            LedgerUnavailable: Redis does not serve; the same claim is repeated by the next call.
        """
        with self._claiming:
            self._claim_token = self._claim_token or uuid.uuid4().hex
            arguments = (self.worker_id, self._claim_token, self._lease_ms, num_held, int(high_only), *models)
            reply = self._run("claim", *arguments)
            self._claim_token = None
        kind = reply[0]
        if kind == "job":
            return parse_job(as_map(reply[1:]))
        return Alone() if kind == "alone" else None

    def start(self, job_id: str, fence: int, *, on_device: bool, instead_of: HeldJob | None = None) -> Reply:
        """Say that the job goes on the device now, or has left it; `instead_of` leaves it in the same moment."""
        return cast("Reply", self._run("start", *_start_arguments(job_id, fence, on_device, instead_of)))

    def send_start(self, job_id: str, fence: int, *, instead_of: HeldJob | None = None) -> "SentStart":
        """Say that the job goes on the device now, and return before Redis has answered.

        What is sent Redis does, even if this process dies the moment after. Only the first after a restart of Redis,
        which has forgotten the script then, is done when its answer is read.
        """
        if not self._has_loaded_start:
            with suppress(RedisError):  # that does not serve: then it cannot be sent either
                self._client.script_load(script_text("start"))
                self._has_loaded_start = True
        arguments = _start_arguments(job_id, fence, True, instead_of)
        return SentStart(SentScript(self._client, self._scripts["start"], self._keys, arguments))

    def renew(self, held: Sequence[HeldJob]) -> list[Reply]:
        """Prolong the leases of all held jobs and publish their progress; answers are in the order of `held`."""
        args: list[object] = []
        for job in held:
            step = "" if job.step is None else job.step
            args += [job.job_id, job.fence, step, "" if job.total_steps is None else job.total_steps]
        return cast("list[Reply]", self._run("renew", self._lease_ms, *args))

    def commit(
        self,
        job_id: str,
        fence: int,
        *,
        output: JobOutput,
        timings: Mapping[str, float],
        params: Mapping[str, Any],
        inputs: Sequence[JobInput],
        speeds: Mapping[str, float],
        weights_sha256: str | None = None,
        optimizations: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Make `output` the job's result, once; `lost` or `cancelled` mean that the object is nobody's.

        `weights_sha256` tells what the job ran on, where that is known, `optimizations` how its model was run. `speeds`
        are what the run tells about the next ones, as `server.eta.measured_speeds` names them.
        """
        documents = (asdict(output), dict(timings), dict(params), [asdict(one) for one in inputs])
        measured = (part for pair in speeds.items() for part in pair)
        ran_on = (weights_sha256 or "", dump(dict(optimizations)) if optimizations else "")
        return cast("Reply", self._run("commit", job_id, fence, *map(dump, documents), *ran_on, *measured))

    def finished_at_ms(self, job_id: str) -> int | None:
        """Return when a job was finished; None where the ledger does not know it as finished, or not at all."""
        with ledger_errors():
            found = cast("str | None", self._client.hget(f"{self._prefix}:job:{job_id}", "finished_at"))
        return None if found is None else int(found)

    def fail(self, job_id: str, fence: int, *, code: str, detail: str, timings: Mapping[str, float]) -> Reply:
        """End the job as failed, or as cancelled when that was asked for."""
        return cast("Reply", self._run("fail", job_id, fence, code, _encodable(detail), dump(dict(timings))))

    def retry(
        self, job_id: str, fence: int, *, delay_seconds: float, counts: bool, max_errors: int, code: str, detail: str
    ) -> Reply:
        """Give the job back to the queue; with `counts` it fails at its `max_errors`-th error instead."""
        delay_ms = int(delay_seconds * 1000)
        return cast(
            "Reply", self._run("retry", job_id, fence, delay_ms, int(counts), code, _encodable(detail), max_errors)
        )

    def backlog(self, models: Sequence[str]) -> Fleet:
        """Return what waits for each of `models`, and how many other workers hold it."""
        version, *replies = json.loads(self._run("backlog", self.worker_id, RUN, *models))
        return Fleet(
            version,
            {
                model: Backlog(num_ready, oldest_ms / 1000, num_others, None if seconds is False else float(seconds))
                for model, (num_ready, oldest_ms, num_others, seconds) in zip(models, replies, strict=True)
            },
        )

    def place(self, version: str, load: str, evict: Sequence[str] = ()) -> bool:
        """Say that this worker loads a model, and that others leave its memory, before it begins with either.

        Args:
            version: as `backlog` told it.
            load: the model.
            evict: those that leave.

        Returns:
            False where another worker has placed a model meanwhile: look at the backlog again.
        """
        token = uuid.uuid4().hex
        arguments = (self.worker_id, token, version, ANNOUNCED_FOR_SECONDS * 1000, load, *evict)
        return self._run("place", *arguments) == "placed"

    def announce(self, status: WorkerStatus) -> None:
        """Tell the API what this worker serves; forgotten after `ANNOUNCED_FOR_SECONDS` without another call."""
        fields = (text for pair in worker_fields(status).items() for text in pair)
        weights = {
            model: {"version": one.version, "sha256": one.weights_sha256}
            for model, one in status.models.items()
            if one.ready and one.weights_sha256
        }
        holds = {
            model: model == status.loading or (one.resident and model not in status.leaving)
            for model, one in status.models.items()
        }
        ready = [model for model, one in status.models.items() if one.ready]
        self._announced = tuple(holds)
        said = (dump(weights), dump(holds), dump(ready))
        self._run("announce", self.worker_id, ANNOUNCED_FOR_SECONDS * 1000, *said, *fields)

    def leave(self) -> None:
        """Take the announcement back, as the last act of a worker that stops in order."""
        with ledger_errors(), cast("Any", self._client).pipeline(transaction=True) as pipe:
            pipe.delete(f"{self._prefix}:worker:{self.worker_id}", f"{self._prefix}:worker:{self.worker_id}:claim")
            pipe.srem(f"{self._prefix}:workers", self.worker_id)
            for model in self._announced:
                pipe.zrem(f"{self._prefix}:holders:{model}", self.worker_id)
            pipe.execute()

    def control_position(self) -> str:
        """Return the id after which new control messages will stand."""
        with ledger_errors():
            last = cast("list[tuple[str, dict[str, str]]]", self._client.xrevrange(f"{self._prefix}:control", count=1))
        return last[0][0] if last else "0-0"

    def read_control(self, position: str, *, block_seconds: float) -> tuple[str, list[dict[str, str]]]:
        """Wait for control messages after `position`; returns the new position and the messages, oldest first.

        `block_seconds` must stay under the client's socket timeout.
        """
        with ledger_errors():
            reply = cast(
                "list[tuple[str, list[tuple[str, dict[str, str]]]]]",
                self._client.xread({f"{self._prefix}:control": position}, block=int(block_seconds * 1000)),
            )
        entries = reply[0][1] if reply else []
        return (entries[-1][0] if entries else position), [fields for _, fields in entries]
