"""Receivers of webhooks as the tests want them: real servers on this machine, polite or not."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

OK = b"HTTP/1.1 204 No Content\r\n\r\n"


@dataclass(frozen=True)
class Received:
    """One request as it arrived; names of headers in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes


def answer_with(*answers: bytes) -> "Callable[[socket.socket, int], None]":
    """Answer with these in turn, and with the last one from then on."""

    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(answers[min(number, len(answers) - 1)])

    return answer


@dataclass
class Receiver:
    """Listens on this machine; `behave` is given each connection once its request was read, and its number."""

    behave: Callable[[socket.socket, int], None] = field(default_factory=lambda: answer_with(OK))
    tls: ssl.SSLContext | None = None
    reads_requests: bool = True
    address: str = "127.0.0.1"
    received: list[Received] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)
    num_connections: int = 0

    def __post_init__(self) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._listener = socket.create_server((self.address, 0), family=family)
        self.port: int = self._listener.getsockname()[1]
        if self.tls is not None:
            self.tls.sni_callback = lambda _socket, name, _context: self.server_names.append(name)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; connections that are open end with their peers."""
        # Closing alone does not wake a thread that waits in accept().
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.num_connections += 1
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(60)
        with suppress(OSError), connection:
            if self.tls is None:
                self._answer(connection)
                return
            with self.tls.wrap_socket(connection, server_side=True) as secured:
                self._answer(secured)

    def _answer(self, connection: socket.socket) -> None:
        number = len(self.received)
        if self.reads_requests:
            self.received.append(_read_request(connection))
        self.behave(connection, number)
        # Until the peer leaves: closing at once would be another behaviour.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def _read_request(connection: socket.socket) -> Received:
    with connection.makefile("rb") as file:
        line, *lines = iter(lambda: file.readline().decode().strip(), "")
        headers = {name.lower(): value for name, value in (one.split(": ", 1) for one in lines)}
        return Received(line, headers, file.read(int(headers["content-length"])))


def make_certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """Draw a certificate for a host; returns its file, which is its own authority, and what a server needs."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    draw = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    whose = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*draw.split(), *whose, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context
