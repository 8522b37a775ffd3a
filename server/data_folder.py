"""What `restage up` keeps between two starts on the same folder: data, logs, the store's keys and the ports."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from server.webhook_secret import new_webhook_secret

_MAX_LOG_BYTES = 10_000_000


class DataFolderInUse(Exception):
    """Raised when another `restage up` runs on the folder."""


@dataclass(frozen=True)
class StoreKeys:
    """Who may use the embedded store."""

    access_key: str
    secret_key: str


class DataFolder:
    """One folder, used by one `restage up` at a time.

    It has `valkey/` and `store/` (their data), `logs/` (one file for each process), `store-keys.json` and
    `webhook-secret` (only for their owner's eyes), `ports.json` and `lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Make the folder if it is missing and hold it; the kernel lets go of it however this process ends.

        Raises:
            DataFolderInUse: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise DataFolderInUse(
                    f"{self.path} is in use by another `restage up`, process id {holder}; "
                    "stop that one, or give another folder with --data"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def log_file(self, name: str) -> Path:
        """Where the output of the process `name` goes; a long file of earlier starts is put aside."""
        path = self.path / "logs" / f"{name}.log"
        if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path

    def store_keys(self) -> StoreKeys:
        """Give the store's keys, drawn on the first start: URLs that were handed out work after a restart."""
        path = self.path / "store-keys.json"
        try:
            return StoreKeys(**json.loads(path.read_text()))
        except FileNotFoundError:
            keys = StoreKeys(f"restage{secrets.token_hex(8)}", secrets.token_urlsafe(32))
        _write_secret(path, json.dumps({"access_key": keys.access_key, "secret_key": keys.secret_key}))
        return keys

    def webhook_secret_file(self) -> Path:
        """Give the file with the secret that signs webhooks; it is drawn when it is first asked for."""
        path = self.path / "webhook-secret"
        if not path.exists():
            _write_secret(path, f"{new_webhook_secret()}\n")
        return path

    def read_ports(self) -> dict[str, list[int]]:
        """Ports of the last start by process name; empty on the first."""
        try:
            return json.loads((self.path / "ports.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # they are only a wish: others are chosen

    def write_ports(self, ports: dict[str, list[int]]) -> None:
        """Keep the ports for the next start."""
        (self.path / "ports.json").write_text(json.dumps(ports))


def _write_secret(path: Path, text: str) -> None:
    # Written aside first, so that a crash leaves no half of it, and never readable by others.
    written = path.with_suffix(".new")
    written.unlink(missing_ok=True)
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 (mode)
        file.write(text)
    written.replace(path)
