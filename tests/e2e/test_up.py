"""`restage up` runs everything on one machine, brings workers back, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from server.embedded import EmbeddedValkey

START_SECONDS = 150.0
# `python -m server.cli`, but that only its own coverage is measured and not that of what it starts, which would take a
# quarter of the time of starting.
CLI = """
import os, runpy
os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
"""


class Up:
    """`restage up` in a session of its own, as an operator's shell would start it."""

    def __init__(self, data_dir: Path, weights_dir: Path, *arguments: str, **environment: str) -> None:
        self.data_dir = data_dir
        self._log = data_dir.with_name(f"{data_dir.name}-up.log")
        environment = {"RESTAGE_ENV": "test", "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir)} | environment
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLI, "up", "--data", str(data_dir), *arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """All that it has printed."""
        return self._log.read_text()

    def wait_line(self, pattern: str) -> re.Match[str]:
        """Wait until it prints a line like this."""
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(f"^{pattern}$", self.text, re.MULTILINE)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no line {pattern!r}:\n{self.text}")
            time.sleep(0.05)
        return found

    def wait_ready(self) -> str:
        """Wait until it serves; returns the API's URL."""
        return self.wait_line(r"ready (http://127\.0\.0\.1:\d+)").group(1)

    def wait_end(self) -> int:
        """Wait until it ends; returns its exit status."""
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running:\n{self.text}")

    def children(self) -> dict[str, psutil.Process]:
        """Its child processes by name: valkey, store, api, worker."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            program = Path(child.exe()).name
            # Between fork and exec a child is still the launcher, which is a Python.
            if program in {"valkey-server", "weed"}:
                found["valkey" if program == "valkey-server" else "store"] = child
            elif command[1:3] == ["-m", "server.cli"]:
                found[command[3]] = child
        return found

    def tree(self) -> list[int]:
        """Process ids of it and all that descends from it."""
        root = psutil.Process(self.process.pid)
        return [process.pid for process in (root, *root.children(recursive=True))]

    def kill(self) -> None:
        """End it and all that descends from it, whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def up(tmp_path, weights_dir):
    """Give a function that starts `restage up` on a folder of its own; all are killed after the test."""
    started = []

    def start(*arguments, data="data", **environment):
        started.append(Up(tmp_path / data, weights_dir, *arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory, weights_dir):
    """Give a `restage up` that serves, shared by the tests that leave it so; its environment names other services."""
    one = Up(
        tmp_path_factory.mktemp("up") / "data",
        weights_dir,
        RESTAGE__REDIS__URL="redis://127.0.0.1:9/0",
        RESTAGE__STORE__ENDPOINT="127.0.0.1:9",
        RESTAGE__STORE__PUBLIC_ENDPOINT="photos.example.com",
    )
    try:
        one.wait_ready()
        yield one
    finally:
        one.kill()


def health(url):
    return httpx.get(f"{url}/health/ready", timeout=10)


def test_ready_means_that_a_batch_would_be_served(running):
    """After the line `ready URL` the API answers there, with Redis, the store and a worker behind it."""
    answer = health(running.wait_ready())
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"
    assert answer.json()["models"]["tiny-flux-kontext"] == 1


def test_data_folder_is_kept_in_order(running):
    """The folder holds the data of both servers, a log for each process, and keys that only its owner can read."""
    folder = running.data_dir
    assert {path.name for path in (folder / "logs").iterdir()} == {
        "valkey.log",
        "store.log",
        "api.log",
        "worker-1.log",
    }
    secrets = {"store-keys.json", "webhook-secret"}
    assert {"valkey", "store", "lock", "ports.json", *secrets} <= {path.name for path in folder.iterdir()}
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in secrets)
    assert (folder / "lock").read_text().strip() == str(running.process.pid)


def test_second_up_on_the_folder_is_refused(running, weights_dir):
    """A folder in use is refused with the process id of the one that uses it, which goes on undisturbed."""
    second = subprocess.run(
        [sys.executable, "-m", "server.cli", "up", "--data", str(running.data_dir)],
        env=os.environ | {"RESTAGE_ENV": "test", "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert f"process id {running.process.pid}" in second.stdout
    assert "--data" in second.stdout
    assert health(running.wait_ready()).status_code == 200


def test_port_that_is_taken_is_refused(running, up):
    """A port that was asked for and is taken is refused by name, before anything is started."""
    port = running.wait_ready().rpartition(":")[2]
    other = up("--port", port)
    assert other.wait_end() == 1
    assert f"port {port} of 127.0.0.1 is taken; give another with --port" in other.text
    assert not (other.data_dir / "logs").exists()


@pytest.mark.timeout(400)  # two whole starts, and on a busy machine each takes its time
def test_second_instance_has_ports_of_its_own(running, up, is_gone):
    """Two instances on two folders, neither of which was given a port, serve side by side; one of them is stopped."""
    other = up(data="other")
    url = other.wait_ready()
    assert url != running.wait_ready()
    assert health(url).json()["status"] == health(running.wait_ready()).json()["status"] == "ok"
    check_stop(other, is_gone)
    assert health(running.wait_ready()).json()["status"] == "ok"


def check_stop(one, is_gone):
    """On SIGTERM the worker ends first, then the API, the store and Valkey, and the exit status is 0."""
    left = {name: child.pid for name, child in one.children().items()}
    assert set(left) == {"valkey", "store", "api", "worker"}
    tree = one.tree()
    one.process.send_signal(signal.SIGTERM)
    order = []
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        order += [name for name in left if is_gone(left[name])]
        left = {name: pid for name, pid in left.items() if name not in order}
        time.sleep(0.002)
    assert order == ["worker", "api", "store", "valkey"]
    assert one.wait_end() == 0, one.text
    assert all(is_gone(pid) for pid in tree)


def test_killed_worker_is_replaced(running, wait_until):
    """A worker that is killed is started again and announced; the other processes stay."""
    before = running.children()
    before["worker"].kill()
    running.wait_line("worker-1 ended with status -9 and is started again in 1 s; its last output:")
    wait_until(lambda: "worker" in running.children(), 30)
    after = running.children()
    assert after["worker"].pid != before["worker"].pid
    assert {name: after[name].pid for name in ("valkey", "store", "api")} == {
        name: before[name].pid for name in ("valkey", "store", "api")
    }
    log = running.data_dir / "logs" / "worker-1.log"
    wait_until(lambda: log.read_text().count("model.loaded") >= 4, START_SECONDS)
    assert health(running.wait_ready()).json()["status"] == "ok"


@pytest.mark.parametrize("name", ["valkey", "store", "api"])
def test_death_of_a_needed_process_ends_all(up, is_gone, wait_until, name):
    """When Valkey, the store or the API dies, its last output is shown, all is stopped and the exit status is 1."""
    one = up("--port", "0")
    one.wait_line("API and workers are starting.*")
    wait_until(lambda: len(one.children()) == 4, 30)
    tree = one.tree()
    one.children()[name].kill()
    assert one.wait_end() == 1
    assert f"{name} ended with status -9; its last output:" in one.text
    assert all(is_gone(pid) for pid in tree)


def test_nothing_outlives_a_killed_up(up, is_gone, wait_until):
    """After kill -9 of `restage up` alone no process of it is left."""
    one = up("--port", "0")
    one.wait_line("API and workers are starting.*")
    wait_until(lambda: len(one.children()) == 4, 30)
    tree = one.tree()
    one.process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in tree))


def test_signal_during_the_start_ends_it(up, is_gone):
    """Ctrl-C before anything is ready stops what was started, with exit status 0."""
    one = up("--port", "0")
    one.wait_line("valkey is ready on .*")
    tree = one.tree()
    one.process.send_signal(signal.SIGINT)
    assert one.wait_end() == 0, one.text
    assert all(is_gone(pid) for pid in tree)
    assert "ready http" not in one.text


def test_ledger_with_a_damaged_file_is_told_and_not_served(up, tmp_path):
    """Where Valkey cannot trust its file, nothing is started on what is left of it: the last words say what to do."""
    server = EmbeddedValkey(tmp_path / "data" / "valkey")
    server.start()
    server.wait_ready()
    with redis.Redis.from_url(server.url) as client:
        for number in range(100):
            client.rpush("numbers", number)
    server.kill()
    (file,) = (server.data_dir / "appendonlydir").glob("*.incr.aof")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + b"\xff\xff" + data[len(data) // 2 + 2 :])
    one = up("--port", "0")
    assert one.wait_end() == 1
    assert "valkey ended with status 1; its last output:" in one.text
    assert "Bad file format reading the append only file" in one.text
    assert "--fix" in one.text
    assert "API and workers are starting" not in one.text


def test_wrong_configuration_starts_nothing(up):
    """A mistake in the configuration is told with its name, and no server is started for it."""
    one = up("--port", "0", RESTAGE__WORKER__LEASE_SECONDS="soon")
    assert one.wait_end() == 1
    assert "RESTAGE__WORKER__LEASE_SECONDS" in one.text
    assert not (one.data_dir / "logs").exists()


def test_other_services_of_the_environment_are_not_used(running):
    """Forms are for the instance's own store, although the environment names another Redis and another store."""
    files = [{"filename": "a.png", "content_type": "image/png", "size_bytes": 9}]
    answer = httpx.post(f"{running.wait_ready()}/v1/uploads", json={"files": files}, timeout=10)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d{5}/restage-uploads", answer.json()["uploads"][0]["url"])
