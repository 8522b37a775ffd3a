"""The real servers that benchmarks measure: Valkey, SeaweedFS and API processes, on loopback, in a temporary folder."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import redis

from server.child import Child
from server.embedded import EmbeddedStore, EmbeddedValkey
from server.ports import free_ports, is_free
from server.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = "tiny-qwen-image-edit-2511"
# What `restage` is, for the interpreter that runs the benchmark.
RESTAGE = ("-m", "server.cli")
_PATIENCE_SECONDS = 60.0
_STOP_SECONDS = 10.0


class BenchFailed(Exception):
    """Raised when something could not be measured; a missed target is no failure."""


@dataclass(frozen=True)
class Api:
    """A running `restage api`."""

    child: Child
    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Id of its process."""
        return self.child.pid or 0

    def server_seconds(self) -> dict[str, float]:
        """By request id: from a request's arrival to the start of its answer, as the process itself has logged it."""
        lines = self.child.log_file.read_text(errors="replace").splitlines()
        events = (json.loads(line) for line in lines if '"request.answered"' in line)
        return {event["request_id"]: event["seconds"] for event in events}


class Servers:
    """Valkey and a store, as a context; API processes and proxies come and go meanwhile.

    Args:
        folder: for their data and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.valkey = EmbeddedValkey(folder / "valkey")
        self.store = EmbeddedStore(folder / "store")
        self._num_children = 0
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        for server in (self.valkey, self.store):
            self._cleanup.callback(server.stop)
            server.start()
        try:
            self.valkey.wait_ready()
            self.store.wait_ready()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._cleanup.close()

    def environment(self, **more: str) -> dict[str, str]:
        """Variables that point any Restage process here; nothing else of Restage's in the environment counts."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("RESTAGE_")}
        return others | {
            "RESTAGE_ENV": "test",
            "RESTAGE__REDIS__URL": self.valkey.url,
            "RESTAGE__STORE__ENDPOINT": self.store.endpoint,
            "RESTAGE__STORE__ACCESS_KEY": self.store.access_key,
            "RESTAGE__STORE__SECRET_KEY": self.store.secret_key,
            "RESTAGE__LOG__FORMAT": "json",
            # As in production: the tests look after dead workers more often.
            "RESTAGE__SWEEP__INTERVAL_SECONDS": "2",
            "RESTAGE__WORKER__LEASE_SECONDS": "15",
            **more,
        }

    def settings(self) -> Settings:
        """Load what an API process here would read."""
        return load_settings(REPOSITORY / "config", self.environment())

    def empty_ledger(self) -> None:
        """Forget all jobs and queues; no API process may run."""
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()

    @contextmanager
    def api(self, program: Sequence[str] = RESTAGE, **environment: str) -> Iterator[Api]:
        """Start an API process on an empty ledger and stop it at the end.

        Args:
            program: what is called with `api`.
            **environment: settings of its own, such as `RESTAGE__STORE__PUBLIC_ENDPOINT`.

        Raises:
            BenchFailed: it ends, or does not answer in time.
        """
        self.empty_ledger()
        port = free_ports(1)[0]
        command = [sys.executable, *program, "api"]
        with self._running("api", command, self.environment(RESTAGE__SERVER__PORT=str(port), **environment)) as child:
            api = Api(child, port)
            wait_until(lambda: _answers(api), child)
            yield api

    @contextmanager
    def worker(self, program: Sequence[str] = RESTAGE, **environment: str) -> Iterator[Child]:
        """Start a worker process and stop it at the end; the API tells when it is ready.

        Args:
            program: what is called with `worker`.
            **environment: settings of its own.
        """
        with self._running("worker", [sys.executable, *program, "worker"], self.environment(**environment)) as child:
            yield child

    @contextmanager
    def proxy(self, targets: Mapping[int, int], *, rtt_ms: float) -> Iterator[None]:
        """Put a line with `rtt_ms` of round trip before ports: `targets` are by the port to listen on."""
        pairs = [f"{listen}:{target}" for listen, target in targets.items()]
        command = [sys.executable, str(REPOSITORY / "scripts" / "bench_proxy.py"), "--rtt-ms", str(rtt_ms), *pairs]
        with self._running("proxy", command, dict(os.environ)) as child:
            # A port on which something listens is not free.
            wait_until(lambda: not any(is_free(port) for port in targets), child)
            yield

    @contextmanager
    def _running(self, name: str, command: list[str], environment: dict[str, str]) -> Iterator[Child]:
        self._num_children += 1
        log_file = self.folder / f"{name}-{self._num_children}.log"
        child = Child(name, command, log_file=log_file, cwd=REPOSITORY)
        try:
            child.start(environment)
            yield child
        finally:
            child.stop(_STOP_SECONDS)


def _answers(api: Api) -> bool:
    try:
        return httpx.get(f"{api.url}/health/ready", trust_env=False, timeout=10).is_success
    except httpx.TransportError:
        return False


def wait_until(check: Callable[[], bool], child: Child) -> None:
    """Wait for what a child brings about.

    Raises:
        BenchFailed: it ended first, or nothing came in a minute.
    """
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while not check():
        if not child.is_running:
            raise BenchFailed(child.describe_end(f"ended with status {child.poll()}"))
        if time.monotonic() > give_up_at:
            raise BenchFailed(child.describe_end(f"was not ready after {_PATIENCE_SECONDS:g} s"))
        time.sleep(0.02)
