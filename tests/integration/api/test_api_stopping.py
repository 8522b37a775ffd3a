"""SIGTERM under load: whoever is connected to the API gets an answer or a clean end, and the process is gone."""

import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress

import httpx
import pytest

from server.ports import free_ports
from tests.integration.api.conftest import picture

FLUX = "tiny-flux-kontext"
MIB = 2**20
# Far more than anything here takes.
PATIENCE_SECONDS = 30


class StoppedApi:
    """A `restage api` as a process, which the test ends."""

    def __init__(self, environment: dict[str, str]) -> None:
        [self.port] = free_ports(1)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "api"],
            env=os.environ | environment | {"RESTAGE__SERVER__PORT": str(self.port), "RESTAGE__LOG__FORMAT": "json"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.listens():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def listens(self) -> bool:
        """Whether a new connection is taken."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS):
            return True
        return False

    def stop(self) -> list[str]:
        """Wait for the end after the signal; returns the names of the events in its log."""
        _, log = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == 0, log
        print(re.sub(r"X-Amz-[^ \"]*", "…", log))  # noqa: T201
        return [json.loads(line)["event"] for line in log.splitlines()]


class Sender:
    """A request over a bare socket, of which the test sends as much as it likes."""

    def __init__(self, port: int, head: str, *, length: int = 0) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        self.send(f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n".encode())

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers, body."""
        file = self.connection.makefile("rb")
        status = int(file.readline().split()[1])
        headers = dict(line.split(": ", 1) for line in iter(lambda: file.readline().decode().strip().lower(), ""))
        return status, headers, file.read(int(headers["content-length"]))

    def is_closed(self) -> bool:
        """Whether the server ends the connection without another word."""
        with suppress(ConnectionResetError):
            return self.connection.recv(1) == b""
        return False


class Following(threading.Thread):
    """A client of an event stream, which must end as HTTP has it: `events` are (kind, id)."""

    def __init__(self, url: str, batch_id: str) -> None:
        super().__init__()
        self.events: list[tuple[str, str | None]] = []
        self.failure: Exception | None = None
        self._url = f"{url}/v1/batches/{batch_id}/events"
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.read()
        except httpx.HTTPError as error:
            self.failure = error

    def read(self) -> None:
        for kind, event_id in read_events(self._url):
            self.events.append((kind, event_id))
            self.has_begun.set()

    def end(self) -> str:
        """Wait for the end of the stream; returns the id to go on with."""
        self.join(PATIENCE_SECONDS)
        assert self.failure is None
        return [event_id for _, event_id in self.events if event_id][-1]


def read_events(url: str, last_event_id: str | None = None):
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    fields: dict[str, str] = {}
    with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_SECONDS) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            fields[name] = value
            if not line and "event" in fields:
                yield fields["event"], fields.get("id")
            fields = fields if line else {}


@pytest.fixture
def environment(valkey, s3):
    """Give the variables of an API process beside the one of this test."""
    return {"RESTAGE_ENV": "test", "RESTAGE__REDIS__URL": valkey.url, **s3.environment}


@pytest.fixture
def start_api(environment):
    """Give a function that starts an API process; one that a test leaves behind is killed."""
    started = []

    def start(**extra):
        started.append(StoppedApi(environment | extra))
        return started[-1]

    yield start
    for api in started:
        api.process.kill()
        api.process.communicate()


def open_connections(port: int, body: bytes) -> dict[str, Sender]:
    """Connect in every way that a client may be in: with half a body (`late` sends the rest), or kept and silent."""
    heads = {"late": "POST /v1/batches", "never": "POST /v1/batches", "kept": "GET /v1/models", "silent": "GET /docs"}
    senders = {name: Sender(port, head, length=len(body) * ("POST" in head)) for name, head in heads.items()}
    senders["form"] = Sender(port, "POST /v1/batches", length=10 * MIB)
    for name in ("late", "never"):
        senders[name].send(b"Content-Type: application/json\r\n\r\n" + body[:10])
    senders["form"].send(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
    senders["form"].send(b'Content-Disposition: form-data; name="photo1"; filename="a.png"\r\n\r\n' + bytes(MIB))
    for name in ("kept", "silent"):
        senders[name].send(b"\r\n")
        assert senders[name].answer()[0] == 200
    return senders


def check_farewell(senders: dict[str, Sender], body: bytes) -> str:
    """Who goes on is served, and told that this was the last answer; returns the id of the batch that came late."""
    senders["kept"].send(b"GET /v1/presets HTTP/1.1\r\nHost: localhost\r\n\r\n")
    status, headers, _ = senders["kept"].answer()
    assert (status, headers["connection"]) == (200, "close")
    assert senders["kept"].is_closed()
    senders["late"].send(body[10:])
    status, headers, answer = senders["late"].answer()
    assert (status, headers["connection"]) == (201, "close")
    assert senders["silent"].is_closed()
    return json.loads(answer)["batch"]["id"]


def check_refusals(senders: dict[str, Sender]) -> None:
    """In the end, what will not be done in time is told so."""
    for name in ("never", "form"):
        status, headers, answer = senders[name].answer()
        assert (status, json.loads(answer)["code"]) == (503, "server_stopping")
        assert "look at GET /v1/batches" in json.loads(answer)["detail"]
        assert int(headers["retry-after"]) > 0
        assert headers["content-type"] == "application/problem+json"


def check_streams(streams: dict[str, Following], other) -> None:
    """What was seen before, and what is seen behind it at another server, is all that was told."""
    for batch_id, stream in streams.items():
        last_id = stream.end()
        behind = read_events(f"{other.http.base_url}/v1/batches/{batch_id}/events", last_id)
        first_id, *seen = [event_id for _, event_id in [*stream.events, *behind] if event_id]
        told = [event_id for event_id, _ in other.redis.xrange(f"restage:batch:{batch_id}:events")]
        # The snapshot bears the id of the last event that it shows, 0-0 before there is any.
        assert seen == told[told.index(first_id) + 1 if first_id in told else 0 :]
        assert last_id != told[-1], "it had ended before"


def test_sigterm_leaves_nobody_without_an_answer(start_api, open_live_api):
    """What can end does, streams are taken up elsewhere, the rest hears 503; then the process is gone."""
    with open_live_api() as other:
        api = start_api()
        [upload_id] = other.upload(picture())
        done = other.accept(*[{"upload_id": upload_id}] * 6)
        for _ in done["jobs"]:
            other.run_next(secrets.token_bytes(3 * MIB))
        idle = other.accept({"upload_id": upload_id}, priority="low")
        busy = other.accept(*[{"upload_id": upload_id, "model": FLUX}] * 40)
        streams = {batch["id"]: Following(api.url, batch["id"]) for batch in (idle, busy)}
        body = json.dumps({"items": [{"upload_id": upload_id}], "priority": "low"}).encode()
        senders = open_connections(api.port, body)
        archive_url = f"{api.url}/v1/batches/{done['id']}/archive"
        with httpx.stream("GET", archive_url) as slow, httpx.stream("GET", archive_url) as never_read:
            pieces = slow.iter_raw()
            archive = [next(pieces)]
            assert streams[idle["id"]].has_begun.wait(PATIENCE_SECONDS)
            working = threading.Thread(target=lambda: [other.run_next() for _ in busy["jobs"]])
            working.start()
            while len(streams[busy["id"]].events) < 10:
                time.sleep(0.01)

            signaled_at = time.monotonic()
            api.process.send_signal(signal.SIGTERM)
            while api.listens():
                assert time.monotonic() - signaled_at < PATIENCE_SECONDS
            late_id = check_farewell(senders, body)
            archive += pieces
            check_refusals(senders)
            events = api.stop()
            print(f"gone {time.monotonic() - signaled_at:.2f} s after the signal")  # noqa: T201
            with pytest.raises(httpx.RemoteProtocolError):  # it has no end, so nobody takes it for whole
                never_read.read()
        for sender in senders.values():
            sender.connection.close()
        assert events[-1] == "api.stopped"
        assert "api.given_up" not in events
        with zipfile.ZipFile(io.BytesIO(b"".join(archive))) as whole:
            assert whole.testzip() is None
            assert len(whole.namelist()) == 7
        working.join(PATIENCE_SECONDS)
        assert other.http.get(f"/v1/batches/{late_id}").json()["counts"]["queued"] == 1
        for _ in (idle["id"], late_id):
            other.run_next()
        check_streams(streams, other)


def test_a_store_that_hangs_does_not_hold_a_stopping_api(start_api, open_live_api, s3):
    """A thread that waits for it cannot be interrupted: its client is answered all the same, and the process ends."""
    with open_live_api() as other:
        api = start_api(RESTAGE__STORE__READ_TIMEOUT_SECONDS="60")
        upload_ids = other.upload(picture(), picture(size=(200, 100)))
        done = other.accept({"upload_id": upload_ids[0]})
        other.run_next()
    form = {"batch": (None, '{"items": [{"file": "photo1"}]}'), "photo1": ("a.jpg", picture(), "image/jpeg")}
    answers = []

    def call(method, path, **options):
        answers.append(httpx.request(method, f"{api.url}{path}", timeout=PATIENCE_SECONDS, **options))

    os.kill(s3.server.child.pid, signal.SIGSTOP)
    try:
        calls = [
            threading.Thread(
                target=call, args=("POST", "/v1/batches"), kwargs={"files": form, "headers": {"Idempotency-Key": "one"}}
            ),
            threading.Thread(target=call, args=("GET", f"/v1/batches/{done['id']}/archive")),
        ]
        for one in calls:
            one.start()
        time.sleep(0.5)
        api.process.send_signal(signal.SIGTERM)
        for one in calls:
            one.join(PATIENCE_SECONDS)
        events = api.stop()
    finally:
        os.kill(s3.server.child.pid, signal.SIGCONT)
    assert [(one.status_code, one.json()["code"]) for one in answers] == [(503, "server_stopping")] * 2
    assert all(int(one.headers["retry-after"]) > 0 for one in answers)
    details = {one.request.method: one.json()["detail"] for one in answers}
    assert details["POST"].endswith("; send it again with the same Idempotency-Key")
    assert details["GET"].endswith("; send it again")
    assert events[-1] == "api.given_up"
