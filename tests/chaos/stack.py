"""A whole Restage whose every line leads through a fault proxy, and whose processes are started again when they die."""

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from server.child import Child
from server.embedded import EmbeddedStore, EmbeddedValkey
from server.keys import KeyStore
from server.ports import free_ports
from tests.chaos.chaos_worker import LAST_WORDS
from tests.chaos.history import History
from tests.chaos.proxy import Proxy
from tests.conftest import REPOSITORY, untraced

FLUX, QWEN = "tiny-flux-kontext", "tiny-qwen-image-edit-2511"
LEASE_SECONDS, SWEEP_SECONDS = 3.0, 0.5
_READY_SECONDS = 180.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.05
# What a process says before it serves stands in so much of its log.
_START_BYTES = 200_000
_SERVERS = ("valkey", "store")
_SETTINGS = {
    "RESTAGE_ENV": "test",
    "RESTAGE__MODELS__ENABLED": json.dumps([FLUX, QWEN]),
    "RESTAGE__MODELS__DEFAULT": FLUX,
    "RESTAGE__AUTH__MODE": "keys",
    "RESTAGE__WEBHOOKS__ALLOWED_HOSTS": '["127.0.0.1"]',
    "RESTAGE__WEBHOOKS__TIMEOUT_SECONDS": "5",
    "RESTAGE__WORKER__LEASE_SECONDS": str(LEASE_SECONDS),
    "RESTAGE__WORKER__RETRY_BASE_SECONDS": "0.5",
    "RESTAGE__SWEEP__INTERVAL_SECONDS": str(SWEEP_SECONDS),
    "RESTAGE__LOG__FORMAT": "json",
}


@dataclass
class Process:
    """One process of Restage.

    Attributes:
        port: of an API, behind its proxy.
        starts_at: when it is to be started again, by the monotonic clock; None: it runs, as far as we know.
        cause: why it is about to end, once somebody has decided on that.
    """

    child: Child
    environment: Mapping[str, str]
    port: int = 0
    starts_at: float | None = None
    cause: str | None = None


@dataclass
class ChaosStack:
    """Valkey, a store, APIs, workers and the lines between them, as a context.

    Start and tend it from one thread that outlives it: the kernel kills children with the thread that started them.

    Args:
        folder: for data and logs.
        weights_dir: of the tiny twins.
        history: hears of every start and end of a process.

    Attributes:
        lines: proxies by name: `store`, and for each process `<name>:redis` and, of an API, `<name>:http`.
        processes: by name.
    """

    folder: Path
    weights_dir: Path
    history: History
    num_apis: int = 1
    num_workers: int = 2
    lines: dict[str, Proxy] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.valkey = EmbeddedValkey(self.folder / "valkey")
        self.store = EmbeddedStore(self.folder / "store")
        self.keys = KeyStore(self.folder / "keys.jsonl")
        self.away: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._start_servers()
            for name in [f"api-{number}" for number in range(self.num_apis)]:
                self._add(name, port=free_ports(1)[0])
            for name in [f"worker-{number}" for number in range(self.num_workers)]:
                self._add(name)
            self._wait_ready()
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end_all()

    @property
    def api_urls(self) -> list[str]:
        """Where clients reach the APIs, through their proxies."""
        return [f"http://{line.address}" for name, line in self.lines.items() if name.endswith(":http")]

    @property
    def workers(self) -> list[str]:
        """Names of the workers."""
        return [name for name in self.processes if name.startswith("worker")]

    def redis_client(self) -> redis.Redis:
        """Connect to Valkey past all proxies."""
        never_again = Retry(NoBackoff(), 0)
        return redis.Redis.from_url(self.valkey.url, decode_responses=True, socket_timeout=5, retry=never_again)

    def tend(self) -> None:
        """See to each process once: note what has ended, and start what is due."""
        now = time.monotonic()
        for name, process in self.processes.items():
            if process.starts_at is None and not process.child.is_running:
                self._note_end(name, process)
                process.starts_at = now + 0.2
            if process.starts_at is not None and now >= process.starts_at:
                process.starts_at, process.cause = None, None
                process.child.start(process.environment)
                self.history.add("process.started", name=name, pid=process.child.pid)

    def kill(self, name: str, *, away_seconds: float) -> None:
        """Kill a process with all that it started; `tend` starts it again."""
        process = self.processes[name]
        process.cause, at = "fault", time.time()
        process.child.kill_group()
        self._note_end(name, process, at=at)
        process.starts_at = time.monotonic() + away_seconds

    def signal(self, name: str, signum: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self.processes[name].child.send_signal(signum)

    def kill_server(self, name: str) -> None:
        """Kill Valkey or the store."""
        self.away.add(name)
        (self.valkey if name == "valkey" else self.store).kill()

    def start_server(self, name: str) -> None:
        """Start Valkey or the store again; it leaves `away` once it serves."""
        server = self.valkey if name == "valkey" else self.store
        server.start()
        self._aim()

        def wait() -> None:
            while name in self.away:
                if server._answers():
                    self.away.discard(name)
                time.sleep(_POLL_SECONDS)

        threading.Thread(target=wait, daemon=True).start()

    def heal(self) -> None:
        """Let every line be good again."""
        for line in self.lines.values():
            line.heal()

    def stop(self) -> None:
        """Ask every process to end, and note how each does: workers first."""
        for name in [*self.workers, *(one for one in self.processes if one.startswith("api"))]:
            process = self.processes[name]
            if process.child.is_running:
                # One that is still starting has no handler of signals yet, and nothing to put in order.
                process.cause = "stop" if _has_served(process.child) else "stop.early"
                process.child.stop(_STOP_SECONDS)
                self._note_end(name, process)

    def _start_servers(self) -> None:
        for server in (self.valkey, self.store):
            server.start()
        self.valkey.wait_ready()
        self.store.wait_ready()
        self.lines["store"] = Proxy(self.store.ports[0]).start()

    def _aim(self) -> None:
        """Let the lines lead to where the servers are; one that was started again may have found its port taken."""
        for name, line in self.lines.items():
            if name.endswith(":redis"):
                line.target_port = self.valkey.ports[0]
        self.lines["store"].target_port = self.store.ports[0]

    def _add(self, name: str, *, port: int = 0) -> None:
        line = self.lines[f"{name}:redis"] = Proxy(self.valkey.ports[0]).start()
        environment = (
            untraced()
            | _SETTINGS
            | {
                "RESTAGE__MODELS__WEIGHTS_DIR": str(self.weights_dir),
                "RESTAGE__AUTH__KEYS_FILE": str(self.keys.path),
                "RESTAGE__REDIS__URL": f"redis://{line.address}/0",
                "RESTAGE__STORE__ENDPOINT": self.lines["store"].address,
                "RESTAGE__STORE__ACCESS_KEY": self.store.access_key,
                "RESTAGE__STORE__SECRET_KEY": self.store.secret_key,
            }
        )
        if port:
            self.lines[f"{name}:http"] = Proxy(port).start()
            command = [sys.executable, "-m", "server.cli", "api"]
            environment |= {"RESTAGE__SERVER__PORT": str(port)}
        else:
            command = [sys.executable, "-m", "tests.chaos.chaos_worker", "worker", "--device", "cpu"]
        child = Child(name, command, log_file=self.folder / f"{name}.log", cwd=REPOSITORY)
        self.processes[name] = Process(child, environment, port, starts_at=0.0)

    def _wait_ready(self) -> None:
        give_up_at = time.monotonic() + _READY_SECONDS
        while not self._serves():
            self.tend()
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"not ready after {_READY_SECONDS:g} s:\n{self.tails()}")
            time.sleep(_POLL_SECONDS)

    def _serves(self) -> bool:
        try:
            for url in self.api_urls:
                models = httpx.get(f"{url}/health/ready", trust_env=False, timeout=10).json()["models"]
                if any(models.get(model, 0) < self.num_workers for model in (FLUX, QWEN)):
                    return False
        except (httpx.TransportError, KeyError, ValueError):
            return False
        return True

    def _note_end(self, name: str, process: Process, *, at: float | None = None) -> None:
        tail = process.child.tail(30)
        if process.cause is None and tail.endswith(LAST_WORDS):
            process.cause = "poison"
        elif process.cause is None and not _has_served(process.child):
            process.cause = "start"
        process.child.kill_group()  # what it started must not outlive it
        told: dict[str, Any] = {} if process.cause in {"fault", "poison"} else {"tail": tail}
        status = process.child.poll()
        about = {"name": name, "pid": process.child.pid, "status": status, "cause": process.cause}
        self.history.add("process.ended", at=at, **about, **told)

    def tails(self) -> str:
        """Return what the processes wrote last."""
        return "\n\n".join(f"--- {name}\n{process.child.tail(30)}" for name, process in self.processes.items())

    def _end_all(self) -> None:
        self.away.clear()
        for process in self.processes.values():
            process.child.kill_group()
        for server in (self.store, self.valkey):
            server.kill()
        for line in self.lines.values():
            line.close()


def _has_served(child: Child) -> bool:
    """Whether a process has come to its work in this life."""
    with child.log_file.open("rb") as log:
        log.seek(child._log_start)
        return b".started" in log.read(_START_BYTES)
