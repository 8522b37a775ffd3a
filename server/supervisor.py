"""`restage up`: everything that a batch needs, as children of one process, on one machine's loopback."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Self

import urllib3

from server.child import Child
from server.crew import WorkerCrew, WorkersFailed
from server.data_folder import DataFolder, DataFolderInUse
from server.embedded import EmbeddedServerFailed, EmbeddedStore, EmbeddedValkey
from server.ports import PortClaim, free_ports
from server.settings import load_settings

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.1
# Valkey reads its whole file before it serves.
_SERVERS_TIMEOUT_SECONDS = 300.0
# Time to end for what has nothing to finish.
_STOP_SECONDS = 10.0


class UpFailed(Exception):
    """Raised when `restage up` cannot start, or a process that all others need has ended."""


def _print_line(line: str) -> None:
    # Whoever read the lines may have gone, a closed terminal for one: what runs must still be stopped in order.
    with suppress(OSError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def run_supervisor(
    data_dir: Path, *, port: int | None = None, num_workers: int = 1, say: Callable[[str], None] = _print_line
) -> int:
    """Start Valkey, the store, the API and the workers, and keep them until a signal or a death ends all.

    Call it from the main thread: it handles SIGINT, SIGTERM and SIGHUP while it runs. The first lets running jobs end,
    the second gives them back to the queue, the third kills. Nothing outlives this process, however it ends.

    Args:
        data_dir: where everything is kept; made if missing, gone on with if not.
        port: the API's port on 127.0.0.1; 0 for any that is free; when left out the last one, or `server.port`, or any.
        num_workers: each on a device of its own, counted from `worker.device`; on the CPU they share it.
        say: is given each line of progress; `ready http://127.0.0.1:PORT` is said once a batch would be served.

    Returns:
        Exit status: 0 after a signal; 1 after a failure, which was said.

    Raises:
        ConfigError: the configuration cannot be used; nothing was started.
    """
    folder = DataFolder(data_dir)
    try:
        with folder.locked(), _Supervisor(folder, port, num_workers, say) as supervisor:
            supervisor.start_servers()
            supervisor.start_api_and_workers()
            supervisor.watch()
    except (DataFolderInUse, EmbeddedServerFailed, UpFailed, WorkersFailed) as error:
        say(str(error))
        return 1
    return 0


class _Supervisor:
    """Holds the children. Leaving the context stops them in order, whatever happened inside it."""

    def __init__(self, folder: DataFolder, port: int | None, num_workers: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._num_signals = 0
        self._woken = threading.Event()
        self._is_ready = False
        self._brings_webhook_secret = False
        ports, keys = folder.read_ports(), folder.store_keys()
        self._valkey = EmbeddedValkey(
            folder.path / "valkey", ports=ports.get("valkey"), log_file=folder.log_file("valkey")
        )
        self._store = EmbeddedStore(
            folder.path / "store",
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            ports=ports.get("store"),
            log_file=folder.log_file("store"),
        )
        settings = load_settings(env=self._environment())
        self._brings_webhook_secret = settings.webhooks.secret is None
        self._claim = _claim_api_port(port, [*ports.get("api", []), settings.server.port])
        self._api = Child("api", _restage("api"), log_file=folder.log_file("api"))
        self._crew = WorkerCrew(
            [
                Child(
                    f"worker-{number + 1}",
                    _restage("worker", "--device", _device(settings.worker.device, number)),
                    log_file=folder.log_file(f"worker-{number + 1}"),
                )
                for number in range(num_workers)
            ],
            say=say,
            job_end_seconds=settings.worker.shutdown_timeout_seconds,
        )
        self._http = urllib3.PoolManager(timeout=2.0, retries=False)

    def __enter__(self) -> Self:
        self._old_handlers = {signum: signal.signal(signum, self._on_signal) for signum in _STOP_SIGNALS}
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None and self._crew.is_running:
                self._say("stopping once the running jobs have ended; a second signal gives them back at once")
            # After a failure, jobs cannot be finished: their leases bring them back at the next start.
            self._crew.stop(lambda: self._num_signals, may_finish=error_type is None)
        finally:
            for stop in (self._api.stop, self._store.stop, self._valkey.stop):
                stop(_STOP_SECONDS)
            self._claim.release()
            self._http.clear()
            for signum, handler in self._old_handlers.items():
                signal.signal(signum, handler)

    def start_servers(self) -> None:
        """Start Valkey and the store, and wait until both serve or a signal comes.

        Raises:
            EmbeddedServerFailed: one of them is not installed, or ended.
            UpFailed: one of them was not ready in time.
        """
        starting = [self._valkey, self._store]
        for server in starting:
            server.start()
        deadline = time.monotonic() + _SERVERS_TIMEOUT_SECONDS
        while starting and not self._woken.wait(_POLL_SECONDS):
            for server in [server for server in starting if server.poll_ready()]:
                starting.remove(server)
                self._say(f"{server.name} is ready on 127.0.0.1:{server.ports[0]}")
            if starting and time.monotonic() > deadline:
                late = starting[0].child
                raise UpFailed(late.describe_end(f"was not ready after {_SERVERS_TIMEOUT_SECONDS:g} s"))

    def start_api_and_workers(self) -> None:
        """Start the processes that need both servers."""
        if self._woken.is_set():
            return
        self._folder.write_ports({"valkey": self._valkey.ports, "store": self._store.ports, "api": [self._claim.port]})
        environment = self._environment() | {"RESTAGE__SERVER__PORT": str(self._claim.port)}
        self._api.start(environment)
        self._crew.start(environment)
        self._say(f"API and workers are starting; the output of all is in {self._folder.path / 'logs'}")

    def watch(self) -> None:
        """Keep the workers running until a signal comes.

        Raises:
            UpFailed: a process that all others need has ended.
            WorkersFailed: the workers cannot start.
        """
        while not self._woken.wait(_POLL_SECONDS):
            for child in (self._valkey.child, self._store.child, self._api):
                if not child.is_running:
                    raise UpFailed(child.describe_end(f"ended with status {child.poll()}"))
            self._crew.tend(has_served=self._is_ready)
            if not self._is_ready and self._would_serve():
                self._is_ready = True
                self._say(f"ready {self._url}")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._claim.port}"

    def _would_serve(self) -> bool:
        """Whether Redis and the store answer the API, and a worker has announced a model."""
        try:
            answer = self._http.request("GET", f"{self._url}/health/ready")
            health = answer.json()
        except (urllib3.exceptions.HTTPError, ValueError):  # not listening yet
            return False
        return answer.status == 200 and any(health["models"].values())

    def _environment(self) -> dict[str, str]:
        """Environment of API and workers; what ours says of another Redis or store does not reach them."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("RESTAGE__REDIS__", "RESTAGE__STORE__"))
        }
        if self._brings_webhook_secret:
            inherited["RESTAGE__WEBHOOKS__SECRET_FILE"] = str(self._folder.webhook_secret_file())
        return inherited | {
            "RESTAGE__SERVER__HOST": "127.0.0.1",
            "RESTAGE__REDIS__URL": self._valkey.url,
            "RESTAGE__STORE__ENDPOINT": self._store.endpoint,
            "RESTAGE__STORE__ACCESS_KEY": self._store.access_key,
            "RESTAGE__STORE__SECRET_KEY": self._store.secret_key,
        }

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        self._num_signals += 1
        self._woken.set()


def _restage(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", *arguments]


def _device(first: str, number: int) -> str:
    """Device of the worker with `number`, counted from the first worker's: cuda:0, cuda:1, …; the CPU for all."""
    kind, _, index = first.partition(":")
    return f"{kind}:{int(index) + number}" if index else kind


def _claim_api_port(asked: int | None, wishes: list[int]) -> PortClaim:
    """Claim the port that was asked for, or else the first of the wishes that is free, or any.

    Raises:
        UpFailed: the port that was asked for is taken.
    """
    choice = [port for port in wishes if port and asked is None] + free_ports(20)
    claim = PortClaim.take([asked] if asked else choice)
    if claim is None:
        raise UpFailed(f"port {asked} of 127.0.0.1 is taken; give another with --port, or none to have one chosen")
    return claim
