"""Clients that send slowly, or read nothing, or are too many: nobody keeps a process by doing nothing."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest

from server.main import MOST_LARGE_BODIES
from tests.integration.api.process_kit import spawn_api

PATIENCE_SECONDS = 30
# What slow clients get here.
SECONDS = 0.5
# Ten times as much.
GIVEN_UP_SECONDS = 10 * SECONDS
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000003e8000003e80802000000c2c143b30000000049444154")


class Server:
    """A running `restage api`."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port = port
        self.process = process
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS)

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """Open a connection; `receive_bytes` is what the kernel keeps for a client that does not read."""
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(PATIENCE_SECONDS)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def num_connections(self) -> int:
        """Count what is open to clients."""
        found = self.process.net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == self.port for one in found)

    def submit(self) -> str:
        """Submit a batch that no worker takes; returns its id."""
        batch = json.dumps({"items": [{"file": "a"}]})
        answer = self.http.post("/v1/batches", files={"batch": (None, batch), "a": ("a.png", PNG)})
        assert answer.status_code == 201, answer.text
        return answer.json()["batch"]["id"]


@pytest.fixture
def serve(valkey, s3) -> Callable[..., object]:
    """Give a context manager that runs `restage api` with settings of `server.*`; its log must tell of no error."""

    @contextmanager
    def serving(**settings: float) -> Iterator[Server]:
        given = {f"RESTAGE__SERVER__{name.upper()}": str(value) for name, value in settings.items()}
        process, port = spawn_api(valkey, s3, stdout=subprocess.DEVNULL, **given)
        server = Server(port, psutil.Process(process.pid))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_alive(server):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        try:
            yield server
        finally:
            server.http.close()
            process.terminate()
            _, log = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0
        assert '"level": "error"' not in log, log
        assert "Traceback" not in log

    return serving


def is_alive(server: Server) -> bool:
    try:
        return server.http.get("/health/live").is_success
    except httpx.TransportError:
        return False


def dribble(connection: socket.socket, *, byte: bytes = b"a", every_seconds: float = 0.02) -> tuple[float, bytes]:
    """Send a byte now and then until the server gives up; returns after how many seconds, and what it said."""
    started, said = time.monotonic(), b""
    connection.settimeout(every_seconds)
    while True:
        assert time.monotonic() - started < PATIENCE_SECONDS
        try:
            connection.send(byte)
            received = connection.recv(65_536)
        except TimeoutError:
            continue
        except ConnectionError:
            received = b""
        if not received:
            return time.monotonic() - started, said
        said += received


def head(*lines: str, method: str = "POST", path: str = "/v1/batches") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


JSON = "Content-Type: application/json"
FORM = "Content-Type: multipart/form-data; boundary=x"
LARGE = "Content-Length: 900000"


# What is sent, what is sent again and again behind it, and what the server says before it gives up.
SLOW = {
    "nothing": (b"", b"", b""),
    "a head": (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: ", b"a", b""),
    "a second head": (head(method="GET", path="/health/live") + b"GET ", b"a", b" 200 "),
    "a body": (head(JSON, LARGE), b" ", b" 408 "),
    "a body in chunks": (head(JSON, "Transfer-Encoding: chunked"), b"1\r\n \r\n", b" 408 "),
    "a form": (head(FORM, LARGE) + b"--x\r\n", b"a", b" 408 "),
    "a body that was refused": (head("Content-Type: text/plain", LARGE), b"a", b" 415 "),
}


def test_whoever_dribbles_is_given_up(serve) -> None:
    """Heads, bodies, forms and what is left of a refused body: each has its time, however often a byte comes."""
    slow = {"header_timeout_seconds": SECONDS, "body_timeout_seconds": SECONDS, "min_body_bytes_per_second": 1000}
    with serve(**slow) as server, ThreadPoolExecutor(len(SLOW) + 1) as clients:

        def send_slowly(name: str) -> tuple[str, float, bytes]:
            start, byte, _ = SLOW[name]
            with server.connect() as connection:
                connection.sendall(start)
                return name, *dribble(connection, byte=byte)

        def send_as_slowly_as_may_be() -> float:
            body = b'--x\r\nContent-Disposition: form-data; name="batch"\r\n\r\n' + b" " * 5000
            with server.connect() as connection:
                connection.sendall(head(FORM, LARGE))
                started = time.monotonic()
                for place in range(0, len(body), 100):
                    connection.sendall(body[place : place + 100])
                    time.sleep(0.03)
                assert is_silent(connection)
                return time.monotonic() - started

        good = clients.submit(send_as_slowly_as_may_be)
        for name, seconds, said in clients.map(send_slowly, SLOW):
            # A little less is right: the time of a second head begins with the first answer.
            assert SECONDS * 0.8 < seconds < GIVEN_UP_SECONDS, name
            assert SLOW[name][2] in said, (name, said)
            assert said.count(b"HTTP/1.1") == bool(SLOW[name][2]), (name, said)
        assert good.result() > 2 * SECONDS


def is_silent(connection: socket.socket) -> bool:
    """Read what has come so far; tell whether the connection is still open behind it."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return True
    return False


def fill(connection: socket.socket) -> None:
    """Ask for so many answers, and read none of them, that they fill every buffer on the way; until it is cut."""
    connection.settimeout(GIVEN_UP_SECONDS)
    while True:
        connection.sendall(head(method="GET", path="/openapi.json") * 100)


def test_streams_that_nobody_follows_end(serve, wait_until) -> None:
    """A stream that was half closed, or is not read, makes room; one whose request had a body in pieces goes on."""
    with serve(max_streams=1, send_timeout_seconds=1) as server, ExitStack() as opened:
        events = f"/v1/batches/{server.submit()}/events"

        def open_stream(*lines: str) -> socket.socket | None:
            connection = opened.enter_context(server.connect())
            connection.sendall(head(*lines, method="GET", path=events))
            answer = b""
            while b"retry: " not in answer and b"too_many_streams" not in answer:
                answer += connection.recv(65_536)
            if b" 200 " in answer:
                return connection
            assert b" 503 " in answer
            assert b"\r\nretry-after: 10\r\n" in answer
            return None

        first = open_stream()
        assert first is not None
        assert open_stream() is None
        archive = server.http.get(events.replace("/events", "/archive"))
        assert (archive.status_code, archive.json()["code"]) == (503, "too_many_streams")
        first.shutdown(socket.SHUT_WR)
        in_pieces = wait_until(lambda: open_stream("Transfer-Encoding: chunked"), PATIENCE_SECONDS)
        for _ in range(2500):
            in_pieces.sendall(b"1\r\na\r\n")
        assert server.http.get("/health/live").is_success
        assert is_silent(in_pieces)
        opened.close()
        wait_until(lambda: server.num_connections() <= 1, PATIENCE_SECONDS)
        with server.connect(receive_bytes=4096) as connection:
            with pytest.raises((ConnectionError, TimeoutError)):
                fill(connection)
            wait_until(lambda: server.num_connections() <= 1, PATIENCE_SECONDS)


def test_large_bodies_that_come_slowly_do_not_fill_the_memory(serve, wait_until) -> None:
    """Of bodies that take much memory there are so many at once; small ones are read beside them."""
    with serve(body_timeout_seconds=PATIENCE_SECONDS) as server, ExitStack() as opened:
        form = b'--x\r\nContent-Disposition: form-data; name="batch"\r\n\r\n'
        large = b" " * 70_000
        starts = [head(JSON, LARGE) + large, head(FORM, LARGE) + form + large]
        for number in range(MOST_LARGE_BODIES):
            opened.enter_context(server.connect()).sendall(starts[number % 2])

        def send_one_more(start: bytes) -> bytes:
            with server.connect() as connection:
                connection.settimeout(1)
                connection.sendall(start)
                try:
                    return connection.recv(65_536)
                except TimeoutError:
                    return b""

        for start in starts:
            wait_until(lambda start=start: b"too_many_large_bodies" in send_one_more(start), PATIENCE_SECONDS)
            assert b"\r\nretry-after: " in send_one_more(start)
        small = server.http.post("/v1/batches", json={"items": [{"upload_id": "none"}]})
        assert small.json()["code"] == "nothing_accepted"
        opened.close()
        wait_until(lambda: send_one_more(starts[0]) == b"", PATIENCE_SECONDS)


def test_those_who_are_too_many_are_told_so(serve, wait_until) -> None:
    """Beyond the limit everybody is told when to come back, and nothing is read; probes are answered all the same.

    And whoever keeps a connection waits for no confirmation between the two pieces of an answer.
    """
    with serve(max_connections=5) as server, ExitStack() as stack:
        seconds = sorted(server.http.get("/health/live").elapsed.total_seconds() for _ in range(31))
        assert seconds[15] < 0.02, "ten times what it takes, and half of what it would take"
        for _ in range(5):
            stack.enter_context(server.connect())
        wait_until(lambda: server.num_connections() >= 5, PATIENCE_SECONDS)
        with httpx.Client(base_url=server.http.base_url) as late:
            refused = late.post("/v1/batches", content=b"{", headers={"Content-Type": "application/json"})
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
            assert late.get("/health/live").status_code == 200
        stack.close()

        def is_welcome() -> bool:
            with httpx.Client(base_url=server.http.base_url) as client:
                return client.get("/v1/models").is_success

        wait_until(is_welcome, PATIENCE_SECONDS)
