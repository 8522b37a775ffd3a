"""One request to a receiver: where it goes, what it says, and that no receiver can hold or mislead the server."""

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.settings import WebhooksSettings
from server.webhooks.addresses import check_url
from server.webhooks.posting import NotDelivered, Poster, resolve_host
from tests.integration.webhooks.receiving import OK, Receiver, answer_with, make_certificate

Receive = Callable[..., Receiver]


def post(
    url: str,
    *,
    allowed: list[str] | None = None,
    timeout_seconds: float = 10.0,
    resolve: Any = None,
    body: bytes = b"{}",
    headers: dict[str, str] | None = None,
) -> int:
    """Send a body to a URL as the sender would; `allowed` is webhooks.allowed_hosts."""
    settings = WebhooksSettings(allowed_hosts=allowed or [], timeout_seconds=timeout_seconds)
    target = check_url(url, settings.allowed_hosts)
    return asyncio.run(Poster(settings, resolve).post(target, headers or {}, body))


class ResolveTo:
    """Stands in for a name server, whose answers could not be chosen; counts the questions."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked: list[str] = []

    async def __call__(self, host: str, _port: int) -> list[str]:
        self.asked.append(host)
        return self.addresses


def test_a_request_arrives_as_it_was_sent(receive: Receive) -> None:
    """Method, path with query, headers and body must arrive to the byte, and the status must come back."""
    receiver = receive(answer_with(b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok"))
    body = bytes(range(256)) * 1000

    status = post(
        f"http://localhost:{receiver.port}/a%20b?c=d&e", allowed=["localhost"], body=body, headers={"X-A": "b"}
    )

    assert status == 202
    (received,) = receiver.received
    assert received.line == "POST /a%20b?c=d&e HTTP/1.1"
    assert received.body == body
    assert received.headers == {
        "host": f"localhost:{receiver.port}",
        "connection": "close",
        "x-a": "b",
        "content-length": "256000",
    }


def test_an_address_of_ipv6_is_named_in_brackets(receive: Receive) -> None:
    """The host of such a URL must be called, and be named as HTTP wants it."""
    try:
        receiver = receive(address="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")

    assert post(f"http://[0::1]:{receiver.port}/", allowed=["::1"]) == 204
    assert receiver.received[0].headers["host"] == f"[::1]:{receiver.port}"


def test_the_host_is_named_and_its_certificate_checked(
    receive: Receive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS must be asked for by the name of the URL, though the connection goes to an address."""
    need_openssl()
    certificate, tls = make_certificate(tmp_path, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    receiver = receive(tls=tls)

    resolve = ResolveTo("127.0.0.1")
    status = post(f"https://Hooks.example:{receiver.port}/", allowed=["hooks.EXAMPLE"], resolve=resolve)

    assert status == 204
    assert receiver.server_names == ["hooks.example"]
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"
    assert resolve.asked == ["hooks.example"]


@pytest.mark.parametrize(("name", "is_known"), [("other.example", True), ("hooks.example", False)])
def test_wrong_certificates_are_refused(
    receive: Receive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_known: bool
) -> None:
    """A certificate for another name, or of an unknown authority, must end the connection before anything is sent."""
    need_openssl()
    certificate, tls = make_certificate(tmp_path, name)
    if is_known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    receiver = receive(tls=tls)

    with pytest.raises(NotDelivered, match="needs a certificate for its name"):
        post(f"https://hooks.example:{receiver.port}/", allowed=["hooks.example"], resolve=ResolveTo("127.0.0.1"))
    assert receiver.num_connections == 1
    assert receiver.received == []


def need_openssl() -> None:
    if shutil.which("openssl"):
        return
    if os.environ.get("CI"):
        pytest.fail("openssl draws the certificates of this test; it is not installed")
    pytest.skip("openssl is not installed")


def test_hosts_inside_are_not_called(receive: Receive) -> None:
    """A name that leads to this machine must not even be connected to, unless it is allowed."""
    receiver = receive()

    with pytest.raises(NotDelivered, match="no address that may be called"):
        post(f"https://localhost:{receiver.port}/", allowed=["127.0.0.1"])
    assert receiver.num_connections == 0
    assert post(f"http://localhost:{receiver.port}/", allowed=["localhost"]) == 204


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],
        ["127.0.0.1", "93.184.216.34"],
        ["93.184.216.34"] * 9 + ["127.0.0.1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%lo"],
        [],
    ],
)
def test_one_address_inside_is_enough_to_refuse(receive: Receive, addresses: list[str]) -> None:
    """Every address of a host counts; that it has none, and that it has a wrong one, must look the same."""
    receiver = receive()

    with pytest.raises(NotDelivered) as caught:
        post(f"https://hooks.example:{receiver.port}/", resolve=ResolveTo(*addresses))
    assert str(caught.value) == (
        "the host has no address that may be called; it must be public, or the host in webhooks.allowed_hosts"
    )
    assert receiver.num_connections == 0


def test_a_host_is_looked_up_once(receive: Receive) -> None:
    """A name server that answers otherwise the second time must find nobody who asks."""
    receiver = receive()
    answers = [["127.0.0.1"], ["127.0.0.9"]]

    async def rebind(_host: str, _port: int) -> list[str]:
        return answers.pop(0)

    assert post(f"http://hooks.example:{receiver.port}/", allowed=["hooks.example"], resolve=rebind) == 204
    assert answers == [["127.0.0.9"]]


def test_the_next_address_is_tried(receive: Receive) -> None:
    """Where the first address of a host does not answer, the next one must get the rest of the time."""
    receiver = receive()
    # Nobody listens there: receivers listen on 127.0.0.1 only.
    resolve = ResolveTo("127.0.0.9", "127.0.0.1")

    assert post(f"http://hooks.example:{receiver.port}/", allowed=["hooks.example"], resolve=resolve) == 204


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(receive: Receive, status: int) -> None:
    """A redirect must be the answer, and its goal must not be called."""
    goal = receive()
    location = f"Location: http://localhost:{goal.port}/".encode()
    receiver = receive(answer_with(b"HTTP/1.1 %d Elsewhere\r\n%b\r\nContent-Length: 0\r\n\r\n" % (status, location)))

    assert post(f"http://localhost:{receiver.port}/", allowed=["localhost"]) == status
    assert goal.num_connections == 0


def test_proxies_of_the_environment_are_not_used(receive: Receive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked, whatever the environment says."""
    receiver, proxy = receive(), receive()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    assert post(f"http://localhost:{receiver.port}/", allowed=["localhost"]) == 204
    assert proxy.num_connections == 0


def test_a_huge_answer_is_not_read(receive: Receive) -> None:
    """Of a gigabyte only the beginning may be read; the status counts all the same."""
    sent_bytes = 0

    def flood(connection: socket.socket, _number: int) -> None:
        nonlocal sent_bytes
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(1000):
            connection.sendall(bytes(1_000_000))
            sent_bytes += 1_000_000

    receiver = receive(flood)
    started = time.monotonic()

    assert post(f"http://localhost:{receiver.port}/", allowed=["localhost"]) == 200
    assert time.monotonic() - started < 5
    # What the kernel keeps for a connection, at most.
    assert sent_bytes < 50_000_000


def test_headers_without_end_are_not_read(receive: Receive) -> None:
    """An answer that never comes to its body must be given up long before it fills the memory."""

    def flood(connection: socket.socket, _number: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-Padding: " + b"a" * 1000 + b"\r\n")

    receiver = receive(flood)

    with pytest.raises(NotDelivered, match="without an answer of HTTP"):
        post(f"http://localhost:{receiver.port}/", allowed=["localhost"])


def test_a_slow_answer_ends_with_the_time(receive: Receive) -> None:
    """A receiver that says nothing, or a byte now and then, must not hold the server longer than allowed."""

    def drip(connection: socket.socket, _number: int) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" * 50:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    receiver = receive(drip)
    started = time.monotonic()

    with pytest.raises(NotDelivered, match=r"no answer within 0\.5 s"):
        post(f"http://localhost:{receiver.port}/", allowed=["localhost"], timeout_seconds=0.5)
    assert time.monotonic() - started < 5


def test_a_body_that_never_ends_does_not_undo_the_status(receive: Receive) -> None:
    """Once the status is there the delivery is decided, also when the rest takes too long or breaks off."""

    def drip(connection: socket.socket, _number: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1\r\na\r\n")
            time.sleep(0.05)

    short = receive(answer_with(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\nbroken"))

    url = f"http://localhost:{receive(drip).port}/"
    assert post(url, allowed=["localhost"], timeout_seconds=0.5) == 200
    assert post(f"http://localhost:{short.port}/", allowed=["localhost"]) == 201


def test_a_connection_that_is_never_answered_ends_with_the_time(receive: Receive) -> None:
    """A server that accepts a connection for TLS and then is silent must not hold ours."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(NotDelivered, match=r"no (connection|answer) within 0\.5 s"):
            post(f"https://localhost:{silent.getsockname()[1]}/", allowed=["localhost"], timeout_seconds=0.5)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "answer", [b"", b"\r\n\r\n", b"nonsense\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 1000]
)
def test_an_answer_that_is_no_http_is_told(receive: Receive, answer: bytes) -> None:
    """A receiver that closes at once, or speaks something else, must be told in our own words."""
    receiver = receive(answer_with(answer))

    with pytest.raises(NotDelivered) as caught:
        post(f"http://localhost:{receiver.port}/", allowed=["localhost"])
    assert str(caught.value) == "the connection ended without an answer of HTTP"


def test_nobody_listening_is_told() -> None:
    """A port where nobody listens must be told as such."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    for scheme in ("http", "https"):
        with pytest.raises(NotDelivered, match="no connection could be made"):
            post(f"{scheme}://localhost:{port}/", allowed=["localhost"])


def test_a_receiver_without_tls_is_told(receive: Receive) -> None:
    """Where the URL says https and the receiver speaks plain HTTP, the certificate must be asked for."""
    receiver = receive(answer_with(b"HTTP/1.1 400 Bad Request\r\n\r\n"), reads_requests=False)

    with pytest.raises(NotDelivered, match="no secure connection"):
        post(f"https://localhost:{receiver.port}/", allowed=["localhost"])


def test_a_silent_name_server_ends_with_the_time() -> None:
    """A look-up that takes too long must not hold the server."""

    async def resolve(_host: str, _port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    started = time.monotonic()
    with pytest.raises(NotDelivered, match=r"no (connection|answer) within 0\.3 s"):
        post("https://hooks.example/", resolve=resolve, timeout_seconds=0.3)
    assert time.monotonic() - started < 5


def test_names_are_resolved_by_the_system() -> None:
    """What the system knows is found, each address once; an unknown name has none; odd addresses come out plain."""
    assert set(asyncio.run(resolve_host("localhost", 80))) <= {"127.0.0.1", "::1"}
    assert asyncio.run(resolve_host("localhost", 80))
    assert asyncio.run(resolve_host("nowhere.invalid", 80)) == []
    assert asyncio.run(resolve_host("0x7f.1", 80)) == ["127.0.0.1"]


def test_an_answer_by_parts_is_one_answer(receive: Receive) -> None:
    """Interim answers are passed over; the final status counts."""
    receiver = receive(answer_with(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK))

    assert post(f"http://localhost:{receiver.port}/", allowed=["localhost"]) == 204
