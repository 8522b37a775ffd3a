"""The fault proxy does to a line what it is told, and nothing else."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.chaos.proxy import Proxy

LINE_TIMEOUT_SECONDS = 30.0


class Echo:
    """A server that notes what it heard and answers each line with `done: ` and the line."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # the listener is closed in the end
            while True:
                threading.Thread(target=self.answer, args=(self.listener.accept()[0],), daemon=True).start()

    def answer(self, line: socket.socket) -> None:
        with suppress(OSError), line, line.makefile("rb") as requests:
            for request in requests:
                self.heard.append(request)
                line.sendall(b"done: " + request)


@pytest.fixture
def echo() -> Iterator[Echo]:
    """Give a server."""
    server = Echo()
    yield server
    server.listener.shutdown(socket.SHUT_RDWR)
    server.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    """Give a proxy before the server."""
    with Proxy(echo.port) as started:
        yield started


@pytest.fixture
def open_line(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Give a function that connects to the proxy."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", proxy.port), LINE_TIMEOUT_SECONDS))
        return opened[-1]

    yield connect
    for line in opened:
        line.close()


def ask(line: socket.socket, *chunks: bytes) -> bytes:
    """Send a request in pieces and return the answer, which is cut short where the connection is."""
    answer = b""
    with suppress(ConnectionResetError):
        for chunk in chunks:
            line.sendall(chunk)
            time.sleep(0.05 * (len(chunks) > 1))
        while not answer.endswith(b"\n") and (data := line.recv(1000)):
            answer += data
    return answer


def test_a_lost_reply_is_of_a_request_that_was_done(proxy, echo, open_line):
    """The next two requests with the needle are done and not answered, even where it comes in two pieces."""
    proxy.lose_replies(b"commit", times=2)
    assert ask(open_line(), b"claim 1\n") == b"done: claim 1\n"
    assert ask(open_line(), b"commit 2\n") == b""
    assert ask(open_line(), b"com", b"mit 3\n") == b""
    assert ask(open_line(), b"commit 4\n") == b"done: commit 4\n"
    assert echo.heard == [b"claim 1\n", b"commit 2\n", b"commit 3\n", b"commit 4\n"]
    assert (proxy.num_lost, proxy.num_to_lose) == (2, 0)


def test_an_answer_may_break_off_or_come_from_elsewhere(proxy, echo, open_line):
    """So many bytes of the answer pass; and a server that is answered for hears nothing."""
    proxy.lose_replies(b"get", after_bytes=8)
    proxy.answer_instead(b"put", answer=b"503\n")
    assert ask(open_line(), b"get 1\n") == b"done: ge"
    assert ask(open_line(), b"put 2\n") == b"503\n"
    assert echo.heard == [b"get 1\n"]


def test_a_cut_ends_what_is_open_and_nothing_else(proxy, open_line):
    """Both connections end, and the next one is carried."""
    lines = [open_line(), open_line()]
    assert [ask(line, b"a\n") for line in lines] == [b"done: a\n"] * 2
    assert proxy.cut() == 2
    assert [ask(line, b"b\n") for line in lines] == [b""] * 2
    assert ask(open_line(), b"c\n") == b"done: c\n"


def test_a_black_hole_keeps_what_is_sent_until_it_heals(proxy, echo, open_line):
    """Nothing is heard or answered while it lasts, on lines old and new; then all of it is."""
    lines = [open_line()]
    assert ask(lines[0], b"a\n") == b"done: a\n"
    proxy.black_hole()
    lines.append(open_line())
    for line in lines:
        line.sendall(b"b\n")
    time.sleep(0.2)
    assert echo.heard == [b"a\n"]
    proxy.heal()
    assert [ask(line) for line in lines] == [b"done: b\n"] * 2


def test_a_slow_line_takes_its_time(proxy, open_line):
    """2,000 bytes there and back at 4,000 a second take a second."""
    proxy.slow(4000)
    started_at = time.monotonic()
    assert len(ask(open_line(), b"x" * 1999 + b"\n")) == 2006
    assert time.monotonic() - started_at > 0.8


def test_a_server_that_is_away_ends_the_connection_and_is_found_again(proxy, echo, open_line):
    """A client's connection is ended while nobody listens there."""
    proxy.target_port = 1
    assert ask(open_line(), b"a\n") == b""
    proxy.target_port = echo.port
    assert ask(open_line(), b"b\n") == b"done: b\n"
