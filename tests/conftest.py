"""Real servers, weights and settings for every tier; each pytest worker has servers of its own."""

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from server.embedded import EmbeddedServerFailed, EmbeddedStore, EmbeddedValkey, valkey_binary, weed_binary
from server.settings import Settings, StoreSettings, load_settings
from server.store import Store

# A shell that starts the tests in the background lets them ignore SIGINT, and the processes that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing is ever downloaded: before any test imports a library that would.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent
# Folders whose files take minutes come first: begun last, one such file would go on alone while the other pytest
# workers have nothing left to do. They are given out in this order under `--no-loadscope-reorder`.
LONGEST_FIRST = ("chaos", "e2e", "integration/worker", "integration/pipelines", "integration/ledger", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""

    def rank(item: pytest.Item) -> int:
        file = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return next(place for place, folder in enumerate(LONGEST_FIRST) if file.startswith(folder))

    items.sort(key=rank)


@dataclass
class Valkey:
    """An empty database 0 on a real Valkey; `server` may be killed and started by a test that makes its own."""

    url: str
    server: EmbeddedValkey
    clients: list[redis.Redis] = field(default_factory=list)

    def client(self, **options: Any) -> redis.Redis:
        """Connect; closed after the test. Keyword arguments as for `redis.Redis.from_url`."""
        connected = redis.Redis.from_url(self.url, **{"socket_timeout": 10, **options})
        self.clients.append(connected)
        return connected


@dataclass
class S3:
    """A real S3 server with both buckets made."""

    server: EmbeddedStore
    settings: StoreSettings
    store: Store

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point the settings of any Restage process here."""
        return {
            "RESTAGE__STORE__ENDPOINT": self.server.endpoint,
            "RESTAGE__STORE__ACCESS_KEY": self.server.access_key,
            "RESTAGE__STORE__SECRET_KEY": self.server.secret_key,
        }


def untraced() -> dict[str, str]:
    """Return this process' environment for one whose coverage is not measured: a worker starts a quarter faster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def need(find_binary: Callable[[], Path]) -> None:
    """Skip the test where a server's program is not installed; fail it under CI."""
    try:
        find_binary()
    except EmbeddedServerFailed as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One Valkey for all tests of a pytest worker; ask for `valkey` instead, which is emptied for each test."""
    need(valkey_binary)
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey-server") / "valkey")
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def valkey(valkey_server: EmbeddedValkey) -> Iterator[Valkey]:
    """Give an empty real Valkey: `.url`, `.client()`."""
    if not valkey_server.child.is_running:
        pytest.fail(f"valkey has died; its last output:\n{valkey_server.tail()}")
    database = Valkey(valkey_server.url, valkey_server)
    database.client().flushall()
    yield database
    for client in database.clients:
        client.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One SeaweedFS for all tests of a pytest worker."""
    need(weed_binary)
    server = EmbeddedStore(tmp_path_factory.mktemp("s3-server") / "store")
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def s3(s3_server: EmbeddedStore) -> Iterator[S3]:
    """Give a real S3 server: `.settings` for a Store, a ready `.store`, `.environment` for processes.

    Objects stay for the whole session: tests use keys of their own.
    """
    store = Store(s3_server.settings)
    yield S3(s3_server, s3_server.settings, store)
    store.close()


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the weights of all tiny twins, made once for all pytest workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    from pipelines.tiny import make_tiny_weights

    with (folder / "weights.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_tiny_weights(folder / "weights")  # those that exist are left as they are
    return folder / "weights"


@pytest.fixture
def settings_for() -> Callable[..., Settings]:
    """Give a function that loads the test configuration: `settings_for(valkey=…, s3=…, RESTAGE__A__B="…")`."""

    def load(*, valkey: Valkey | None = None, s3: S3 | None = None, **environment: str) -> Settings:
        env = {
            "RESTAGE_ENV": "test",
            # Of no store: tests that need one pass `s3`, which brings its own.
            "RESTAGE__STORE__ACCESS_KEY": "unused",
            "RESTAGE__STORE__SECRET_KEY": "unused",
        }
        if valkey is not None:
            env["RESTAGE__REDIS__URL"] = valkey.url
        if s3 is not None:
            env |= s3.environment
        return load_settings(REPOSITORY / "config", env | environment)

    return load


# The scripts of the ledger read Redis' own clock, so time passes by moving everything that is stored in time back by
# ARGV[2] ms.
MOVE_CLOCK = """#!lua flags=allow-oom
local prefix, ms = ARGV[1], tonumber(ARGV[2])
local timed = { "leases", "delayed", "forget", "inputs_due", "outputs_due", "unused", "trash", "webhooks" }
for _, name in ipairs(timed) do
  for _, member in ipairs(redis.call("ZRANGE", prefix .. ":" .. name, 0, -1)) do
    redis.call("ZINCRBY", prefix .. ":" .. name, -ms, member)
  end
end
for _, key in ipairs(redis.call("KEYS", prefix .. ":holders:*")) do
  for _, member in ipairs(redis.call("ZRANGE", key, 0, -1)) do redis.call("ZINCRBY", key, -ms, member) end
end
for _, key in ipairs(redis.call("KEYS", prefix .. ":served:*")) do redis.call("DECRBY", key, ms) end
for _, key in ipairs(redis.call("KEYS", prefix .. ":tokens:*")) do redis.call("HINCRBY", key, "at", -ms * 1000) end
if redis.call("EXISTS", prefix .. ":swept") == 1 then
  redis.call("HINCRBY", prefix .. ":swept", "at", -ms)
  redis.call("HINCRBY", prefix .. ":swept", "grace_until", -ms)
end
for _, model in ipairs(redis.call("HKEYS", prefix .. ":removed")) do
  redis.call("HINCRBY", prefix .. ":removed", model, -ms)
end
for _, key in ipairs(redis.call("KEYS", prefix .. ":upload:*")) do
  redis.call("HINCRBY", key, "form_until", -ms)
  redis.call("HINCRBY", key, "keep_until", -ms)
end
for _, key in ipairs(redis.call("KEYS", prefix .. ":*")) do
  local left = redis.call("PTTL", key)
  if left >= 0 then
    if left <= ms then redis.call("DEL", key) else redis.call("PEXPIRE", key, left - ms) end
  end
end
"""


@pytest.fixture(scope="session")
def pass_time() -> Callable[..., None]:
    """Give a function that lets time pass in a ledger without waiting: `pass_time(client, seconds, prefix="restage")`.

    Every deadline that is stored comes nearer.
    """

    def move(client: redis.Redis, seconds: float, *, prefix: str = "restage") -> None:
        client.register_script(MOVE_CLOCK)(args=[prefix, int(seconds * 1000)])

    return move


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Give a function that waits for a condition and returns it: `wait_until(condition, timeout_seconds=10.0)`."""

    def wait(condition: Callable[[], Any], timeout_seconds: float = 10.0) -> Any:
        deadline = time.monotonic() + timeout_seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_seconds:g} s")
            time.sleep(0.02)
        return found

    return wait


@pytest.fixture(scope="session")
def is_gone() -> Callable[[int], bool]:
    """Give a function that tells whether a process has ended, even where nobody collects it."""

    def tell(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return tell
