"""`restage submit` killed between any two steps, and the same command again: nothing is lost and nothing made twice."""

import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import untraced

SUBMIT = [sys.executable, "-m", "server.cli", "submit"]
NUM_PHOTOS = 3


@dataclass
class Trigger:
    """At the nth request like `pattern`: act before it is passed on, or instead of passing on its answer."""

    pattern: str
    when: str
    act: Callable[[], object]
    nth: int = 1


@dataclass
class Tap:
    """A TCP proxy that notes requests, and cuts the connection when a trigger fires."""

    target: tuple[str, int]
    requests: list[str] = field(default_factory=list)
    trigger: Trigger | None = None
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def __post_init__(self) -> None:
        """Begin to listen."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, request)) for request in self.requests)

    def close(self) -> None:
        """Take no more connections."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.target)
                fired: list[Trigger] = []
                threading.Thread(target=self._pass_requests, args=(client, server, fired), daemon=True).start()
                threading.Thread(target=self._pass_answers, args=(client, server, fired), daemon=True).start()

    def _pass_requests(self, client: socket.socket, server: socket.socket, fired: list[Trigger]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if line := re.match(rb"((?:GET|POST) \S+) HTTP/1\.1\r\n", data):
                    self.requests.append(line[1].decode())
                    trigger = self._find_trigger(self.requests[-1])
                    if trigger and trigger.when == "before":
                        trigger.act()
                        break
                    fired += [trigger] if trigger else []
                server.sendall(data)
        _close(client, server)

    def _pass_answers(self, client: socket.socket, server: socket.socket, fired: list[Trigger]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if fired:
                    fired[0].act()
                    break
                client.sendall(data)
        _close(client, server)

    def _find_trigger(self, request: str) -> Trigger | None:
        trigger = self.trigger
        if trigger is None or not re.match(trigger.pattern, request):
            return None
        trigger.nth -= 1
        if trigger.nth:
            return None
        self.trigger = None
        return trigger


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


@dataclass
class Bench:
    """A user's machine: three photos, a folder of state, and taps on the ways to the API and to the store."""

    stack: Any
    api: Tap
    store: Tap
    folder: Path
    photos: list[Path]

    @property
    def environment(self) -> dict[str, str]:
        return untraced() | {"RESTAGE_URL": f"http://{self.api.address}", "XDG_STATE_HOME": str(self.folder / "state")}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*SUBMIT, *map(str, self.photos), *arguments]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=150)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def run_killed(self, tap: Tap, pattern: str, when: str, nth: int, *arguments: str) -> None:
        """Run until a request, and kill there."""
        killed = threading.Event()

        def kill() -> None:
            ready.wait(60)
            process.kill()
            process.wait()
            killed.set()

        ready = threading.Event()
        tap.trigger = Trigger(pattern, when, kill, nth)
        process = self.start(*arguments)
        ready.set()
        _, stderr = process.communicate(timeout=150)
        assert process.returncode == -9, f"it ended before {pattern}:\n{stderr}"
        assert killed.wait(60)

    def batches(self, label: str) -> list[dict[str, Any]]:
        """The batches of a label, newest first."""
        answer = self.stack.client.http.get("/v1/batches", params={"label": label})
        return answer.raise_for_status().json()["data"]

    def journals(self) -> list[Path]:
        return list((self.folder / "state" / "restage").glob("*.json"))


@pytest.fixture
def bench(unstarted, s3, tmp_path: Path) -> Iterator[Bench]:
    """Give a user's machine; the API that it reaches names the tap as the store's address."""
    store = Tap(("127.0.0.1", int(s3.server.endpoint.rpartition(":")[2])))
    api = Tap(("127.0.0.1", unstarted.port))
    unstarted.start("api", RESTAGE__STORE__PUBLIC_ENDPOINT=store.address)
    photos = [tmp_path / f"room-{number}.jpg" for number in range(NUM_PHOTOS)]
    for number, photo in enumerate(photos):
        Image.linear_gradient("L").resize((200 + number, 150)).convert("RGB").save(photo)
    yield Bench(unstarted, api, store, tmp_path, photos)
    api.close()
    store.close()


def wait_until_live(stack) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if stack.client.http.get("/health/live").is_success:
                return
        time.sleep(0.05)
    pytest.fail(f"the API does not answer:\n{stack.logs()}")


# The first POST to batches only asks whether the settings are good. What had arrived before the kill is not sent again.
STEPS = [
    ("api", "POST /v1/uploads", "before", 1, NUM_PHOTOS),
    ("api", "POST /v1/uploads", "after", 1, NUM_PHOTOS),
    ("store", "POST /restage-uploads", "before", NUM_PHOTOS, 2 * NUM_PHOTOS),
    ("store", "POST /restage-uploads", "after", NUM_PHOTOS, 2 * NUM_PHOTOS),
    ("api", "POST /v1/batches", "before", 2, NUM_PHOTOS),
    ("api", "POST /v1/batches", "after", 2, NUM_PHOTOS),
    ("api", "GET /v1/batches/", "before", 1, NUM_PHOTOS),
    ("api", "GET /v1/batches/", "after", 1, NUM_PHOTOS),
    ("store", "GET /restage-outputs", "before", 1, NUM_PHOTOS),
    ("store", "GET /restage-outputs", "after", NUM_PHOTOS, NUM_PHOTOS),
]


@pytest.mark.timeout(400)
def test_killed_at_any_step_it_goes_on_and_makes_one_batch(bench: Bench) -> None:
    """After kill -9 around each request the same command ends well, with one batch and each result once."""
    bench.stack.start_worker()
    bench.stack.wait_ready()
    for number, (tap_name, pattern, when, nth, max_sent) in enumerate(STEPS):
        step = f"{when} {nth} {pattern}"
        out = bench.folder / f"out-{number}"
        arguments = ["--label", step, "--out", str(out), "--param", "num_inference_steps=2"]
        bench.store.requests.clear()

        bench.run_killed(getattr(bench, tap_name), pattern, when, nth, *arguments)
        again = bench.run(*arguments)

        assert again.returncode == 0, f"{step}:\n{again.stderr}"
        (batch,) = bench.batches(step)
        assert batch["counts"]["succeeded"] == NUM_PHOTOS, step
        assert sorted(file.name for file in out.iterdir()) == [f"00{n + 1}-room-{n}.webp" for n in range(NUM_PHOTOS)]
        assert bench.store.count("POST") <= max_sent, step
        assert bench.journals() == [], step


def test_results_are_fetched_by_the_same_command_later(bench: Bench) -> None:
    """After --no-wait the same command waits and fetches; after a kill it fetches only what is missing or damaged."""
    wait_until_live(bench.stack)
    out = bench.folder / "out"
    accepted = json.loads(bench.run("--no-wait", "--json").stdout)["batch"]["id"]
    bench.stack.start_worker()
    bench.stack.wait_ready()
    bench.run_killed(bench.store, "GET /restage-outputs", "before", NUM_PHOTOS, "--out", str(out))
    there = sorted(out.glob("*.webp"))
    for file in there[:1]:
        file.write_bytes(b"damaged")
    bench.store.requests.clear()

    fetched = bench.run("--out", str(out))

    assert fetched.returncode == 0, fetched.stderr
    assert f"going on with batch {accepted}" in fetched.stderr
    assert bench.store.count("GET") == NUM_PHOTOS - len(there[1:])
    assert bench.store.count("POST") == 0
    assert len(list(out.iterdir())) == NUM_PHOTOS
    for file in out.iterdir():
        Image.open(file).verify()

    after = bench.run("--no-wait", "--json")
    assert json.loads(after.stdout)["batch"]["id"] != accepted

    # As one archive, whose first try is cut.
    bench.store.requests.clear()
    bench.api.trigger = Trigger("GET /v1/batches/.*/archive", "after", lambda: None)
    archived = bench.run("--zip", "--label", "12 Oak St / flat 3", "--out", str(out))
    file = out / "12 Oak St _ flat 3.zip"
    assert archived.returncode == 0, archived.stderr
    assert f"the results are in {file}" in archived.stdout
    assert bench.api.count("GET /v1/batches/.*/archive") == 2
    assert bench.store.count("GET") == 0
    assert len(list(out.iterdir())) == NUM_PHOTOS + 1
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pictures = [archive.read(name) for name in names if name.endswith(".webp")]
    assert "manifest.json" in names
    assert len(pictures) == NUM_PHOTOS
    for picture in pictures:
        Image.open(io.BytesIO(picture)).verify()


def test_no_wait_twice_is_one_batch(bench: Bench) -> None:
    """The same command finds its batch and sends nothing again; --anew makes another, which is the one from then on."""
    wait_until_live(bench.stack)
    first, second, anew, last = (
        json.loads(bench.run("--no-wait", "--json", *more).stdout)["batch"]["id"] for more in ([], [], ["--anew"], [])
    )
    assert first == second
    assert anew != first
    assert last == anew
    assert bench.store.count("POST") == 2 * NUM_PHOTOS

    # Nobody who reads the journal learns where the server is, or could act in the user's place.
    (journal,) = bench.journals()
    text = journal.read_text().lower()
    for word in ("http", "127.0.0.1", "signature", "policy", "amz", "rsk_", "bearer", str(bench.folder).lower()):
        assert word not in text, text


def test_second_run_is_refused_while_the_first_goes_on(bench: Bench) -> None:
    """Two runs of one command would fetch over one another; the second says which process has it."""
    wait_until_live(bench.stack)
    first = bench.start()
    deadline = time.monotonic() + 60
    while not bench.journals() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = bench.run()
    assert second.returncode == 1
    assert f"running already (process {first.pid})" in second.stderr
    assert first.poll() is None
    first.kill()
    first.communicate(timeout=60)
    assert bench.run("--no-wait").returncode == 0


def uploads_of(journal: Path) -> list[str]:
    return [photo["upload_id"] for photo in json.loads(journal.read_text())["arrived"].values()]


def test_uploads_that_are_gone_are_sent_anew(bench: Bench, valkey) -> None:
    """Uploads that have expired meanwhile are sent again, and all photos end in one batch that is not cancelled."""
    wait_until_live(bench.stack)
    for num_lost in (1, NUM_PHOTOS):
        arguments = ["--label", f"{num_lost} gone", "--no-wait"]
        bench.run_killed(bench.api, "POST /v1/batches", "before", 2, *arguments)
        (journal,) = [file for file in bench.journals() if json.loads(file.read_text())["batch_id"] is None]
        for upload_id in uploads_of(journal)[:num_lost]:
            assert valkey.client().delete(f"restage:upload:{upload_id}") == 1
        bench.store.requests.clear()

        again = bench.run(*arguments)

        assert again.returncode == 0, again.stderr
        assert f"{num_lost} of the photos that were sent are not on the server any more" in again.stderr
        assert bench.store.count("POST") == num_lost
        newest, *older = bench.batches(f"{num_lost} gone")
        assert newest["counts"]["queued"] == NUM_PHOTOS
        assert [batch["counts"]["cancelled"] for batch in older] == [NUM_PHOTOS - 1] * (num_lost < NUM_PHOTOS)


def test_batch_that_was_deleted_is_made_anew(bench: Bench) -> None:
    """A batch that somebody deleted is no reason to end: the photos are staged as if for the first time."""
    wait_until_live(bench.stack)
    accepted = json.loads(bench.run("--no-wait", "--json").stdout)["batch"]["id"]
    http = bench.stack.client.http
    assert http.post(f"/v1/batches/{accepted}/cancel").status_code == 200
    assert http.delete(f"/v1/batches/{accepted}").status_code == 204
    again = bench.run("--no-wait", "--json")
    assert again.returncode == 0, again.stderr
    assert f"batch {accepted} of an earlier run is not on the server any more" in again.stderr
    assert json.loads(again.stdout)["batch"]["id"] != accepted
