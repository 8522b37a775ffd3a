"""A Redis that could lose accepted jobs is refused at the start: real servers, each set in another way."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.child import Child
from server.embedded import EmbeddedValkey, valkey_binary
from server.errors import ConfigError, LedgerUnavailable
from server.ledger.redis_checks import RedisConfig, check_redis, check_redis_if_there, read_config
from server.ledger.worker_side import connect
from server.settings import RedisSettings
from tests.conftest import need

# What a Redis does that nobody has set up: it keeps snapshots, has no bound, and its file is off.
CARELESS = ("--appendonly", "no", "--maxmemory", "0")


class OtherValkey(EmbeddedValkey):
    """A Valkey as somebody else has set it up: of two options of a name, the last counts."""

    def __init__(self, data_dir: Path, options: tuple[str, ...]) -> None:
        super().__init__(data_dir)
        self._options = options

    def _make_child(self) -> Child:
        child = super()._make_child()
        return Child(self.name, [*child._command, *self._options], log_file=self._log_file)


@pytest.fixture
def valkey_with(tmp_path: Path) -> Iterator[Callable[..., EmbeddedValkey]]:
    """Give a function that starts a Valkey with some options: `valkey_with("--appendonly", "no")`."""
    need(valkey_binary)
    servers: list[EmbeddedValkey] = []

    def start(*options: str) -> EmbeddedValkey:
        servers.append(OtherValkey(tmp_path / f"valkey-{len(servers)}", options))
        servers[-1].start()
        servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def check(url: str, **options: Any) -> list[str]:
    """Look at a Redis and return the warnings; whoever is refused fails the test with a ConfigError."""
    with capture_logs() as logged:
        check_redis(RedisSettings(url=url, **options))
    assert {one["event"] for one in logged} <= {"redis.doubted"}
    return [one["detail"] for one in logged]


def test_the_embedded_valkey_is_taken_as_it_is(valkey: Any) -> None:
    """What `restage up` and these tests use loses nothing, and bounds its memory by the machine's."""
    assert check(valkey.url) == []
    with closing(connect(RedisSettings(url=valkey.url))) as client:
        config = read_config(client)
    assert 256 * 2**20 <= (config.maxmemory_bytes or 0) <= 4 * 2**30
    assert config == RedisConfig(True, "always", False, config.maxmemory_bytes, "noeviction")


@pytest.mark.parametrize(
    ("options", "first_words"),
    [
        (CARELESS, ["appendonly", "maxmemory"]),
        (("--appendfsync", "no"), ["appendfsync"]),
        (("--maxmemory-policy", "allkeys-lru"), ["maxmemory-policy"]),
        ((*CARELESS, "--maxmemory-policy", "volatile-lru"), ["appendonly", "maxmemory", "maxmemory-policy"]),
    ],
)
def test_a_redis_that_could_lose_jobs_is_refused(
    valkey_with: Callable[..., EmbeddedValkey], options: tuple[str, ...], first_words: list[str]
) -> None:
    """Each mistake has a line, all at once; with `allow_data_loss` the same lines are warnings."""
    server = valkey_with(*options)
    with pytest.raises(ConfigError) as caught:
        check(server.url)
    *lines, way_out = caught.value.problems
    assert [line.removeprefix(f"redis ({server.url}): ").split()[0] for line in lines] == first_words
    assert "redis.allow_data_loss: true" in way_out
    warnings = check(server.url, allow_data_loss=True)
    assert [line.split()[0] for line in warnings] == first_words


def test_compromises_are_warned_of(valkey_with: Callable[..., EmbeddedValkey]) -> None:
    """A Redis that syncs once a second, or not while it writes its file anew, is used; the log says what may go."""
    server = valkey_with("--appendfsync", "everysec", "--no-appendfsync-on-rewrite", "yes")
    assert [line.split()[0] for line in check(server.url)] == ["appendfsync", "no-appendfsync-on-rewrite"]


def test_where_config_is_not_to_be_had_info_tells(valkey_with: Callable[..., EmbeddedValkey]) -> None:
    """A managed Redis without CONFIG is judged by INFO, and one that denies both is doubted, not refused."""
    careless = valkey_with("--rename-command", "CONFIG", "", *CARELESS)
    with pytest.raises(ConfigError) as caught:
        check(careless.url)
    assert [line.split()[2] for line in caught.value.problems[:-1]] == ["appendonly", "maxmemory"]

    careful = valkey_with("--rename-command", "CONFIG", "")
    assert [line.partition(", since")[0] for line in check(careful.url)] == ["it does not tell appendfsync"]

    with closing(connect(RedisSettings(url=careful.url))) as client:
        client.acl_setuser("shy", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all", "-@dangerous"])
    shy = careful.url.replace("//", "//shy@")
    [warning] = check(shy, password="secret")  # noqa: S106 (of a server that lives for this test)
    assert "it does not tell appendonly, appendfsync, maxmemory, maxmemory-policy" in warning


def test_a_redis_that_is_away_is_not_judged() -> None:
    """The API ends as it does without a Redis; a worker waits for one, and says that it could not look."""
    settings = RedisSettings(url="redis://127.0.0.1:1/0", timeout_seconds=0.5)
    with pytest.raises(LedgerUnavailable):
        check_redis(settings)
    with capture_logs() as logged:
        check_redis_if_there(settings)
    assert [one["event"] for one in logged] == ["redis.unchecked"]


def test_no_process_starts_beside_such_a_redis(valkey_with: Callable[..., EmbeddedValkey]) -> None:
    """`restage api` and `restage worker` end with status 1 and every line, and have written nothing there."""
    server = valkey_with(*CARELESS)
    environment = os.environ | {
        "RESTAGE_ENV": "test",
        "RESTAGE__REDIS__URL": server.url,
        "RESTAGE__SERVER__PORT": "0",
        "RESTAGE__STORE__ACCESS_KEY": "unused",
        "RESTAGE__STORE__SECRET_KEY": "unused",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "server.cli", command], env=environment, stderr=subprocess.PIPE, text=True
        )
        for command in ("api", "worker")
    ]
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 1, told
        assert told.startswith("the configuration cannot be used:\n"), told
        assert "set appendonly yes" in told
        assert "set maxmemory" in told
        assert "Traceback" not in told
    with closing(connect(RedisSettings(url=server.url))) as client:
        assert client.dbsize() == 0
