"""The API as a process: it starts, it ends in order, and it says in one line why it cannot start."""

import json
import signal
import socket
import subprocess
import time

import httpx
import pytest
from litestar import Litestar

from server.main import _configure as configure
from server.ports import free_ports
from server.settings import ServerSettings
from tests.integration.api.process_kit import spawn_api

PATIENCE_SECONDS = 30


@pytest.fixture
def start_api(valkey, s3, tmp_path):
    """Give a function that starts `restage api` on a free port; returns the process and its address."""
    started = []

    def start(**environment):
        process, port = spawn_api(valkey, s3, stdout=subprocess.PIPE, **environment)
        started.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until_alive(process, url):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return httpx.get(f"{url}/health/live")
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(start_api, number):
    """SIGTERM and SIGINT end the process with status 0, also while a client keeps a connection; the log is JSON."""
    process, url = start_api()
    wait_until_alive(process, url)
    with httpx.Client(base_url=url) as client:
        client.get("/v1/models?secret=s3cret", headers={"X-Request-Id": "mine-1"})
        started = time.monotonic()
        process.send_signal(number)
        _, log = process.communicate(timeout=PATIENCE_SECONDS)
    assert time.monotonic() - started < 20
    assert process.returncode == 0, log
    events = {entry["event"]: entry for entry in map(json.loads, log.splitlines())}
    answered = events["request.answered"]
    assert (answered["method"], answered["path"], answered["status"]) == ("GET", "/v1/models", 422)
    assert (answered["request_id"], answered["level"]) == ("mine-1", "info")
    assert {"api.started", "api.stopped"} <= set(events)
    assert "s3cret" not in log


@pytest.mark.parametrize("away", ["redis", "store", "port"])
def test_what_is_missing_at_the_start_is_told_in_one_line(start_api, away):
    """Without Redis, without the store, or on a port in use, the process ends with status 1 and says why."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        [closed] = free_ports(1)
        environment = {
            "redis": {"RESTAGE__REDIS__URL": f"redis://127.0.0.1:{closed}/0"},
            "store": {"RESTAGE__STORE__ENDPOINT": f"127.0.0.1:{closed}"},
            "port": {"RESTAGE__SERVER__PORT": str(port)},
        }[away]
        process, _ = start_api(**environment)
        out, log = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, log
    assert "Traceback" not in log + out
    assert str(port if away == "port" else closed) in log + out


def test_clients_that_vanish_are_no_failure(start_api):
    """A client that goes away in the middle of its body leaves no error in the log, and the server serves on."""
    process, url = start_api()
    wait_until_alive(process, url)
    address = ("127.0.0.1", httpx.URL(url).port)
    with socket.create_connection(address) as connection:
        head = "POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.3)
    assert httpx.get(f"{url}/v1/models").status_code == 200
    process.terminate()
    _, log = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert '"level": "error"' not in log


def test_a_connection_is_kept_as_long_as_a_head_may_take():
    """Uvicorn must not close sooner: a proxy that keeps connections would send into one that is being closed."""
    for seconds in (0.5, 30.0, 75.0):
        config = configure(Litestar(), ServerSettings(header_timeout_seconds=seconds))
        assert seconds <= config.timeout_keep_alive < seconds + 1
