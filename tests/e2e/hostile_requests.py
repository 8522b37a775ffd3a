"""Requests as an attacker would make them: from a seed, over every operation of the OpenAPI document, byte by byte."""

import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tests.e2e.hostile_values import (
    CHUNKED_BODIES,
    CONTENT_TYPES,
    DISPOSITIONS,
    FRAMINGS,
    HEADER_NAMES,
    HEADER_VALUES,
    HOSTS,
    JSON_VALUES,
    METHODS,
    PART_HEADERS,
    TEXTS,
    Header,
)

# Enough of a PNG for the API, which does not decode: 1000 x 1000 pixels.
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000003e8000003e80802000000c2c143b30000000049444154")
JSON_TYPE: Header = (b"Content-Type", b"application/json")
MOST_SECONDS = 30
# What uvicorn says of bytes that are no HTTP; the application never sees them.
NO_HTTP = b"Invalid HTTP request received."


@dataclass(frozen=True)
class Request:
    """One request, as it is written to the socket.

    `is_cut`: it ends before it says, so there may be no answer.
    """

    trick: str
    method: bytes
    target: bytes
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    is_cut: bool = False

    def write(self) -> bytes:
        """Return its bytes."""
        names = {name.lower() for name, _ in self.headers}
        headers = list(self.headers)
        if b"host" not in names:
            headers.append((b"Host", b"127.0.0.1"))
        if self.body and not names & {b"content-length", b"transfer-encoding"}:
            headers.append((b"Content-Length", str(len(self.body)).encode()))
        if b"connection" not in names:
            headers.append((b"Connection", b"close"))
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        return self.method + b" " + self.target + b" HTTP/1.1\r\n" + lines + b"\r\n" + self.body


@dataclass(frozen=True)
class Answer:
    """What came back; `status` is 0 where the connection ended without an answer."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def send(port: int, request: Request) -> Answer:
    """Send a request over a connection of its own and read the answer to its end; of a stream, its head."""
    with socket.create_connection(("127.0.0.1", port), timeout=MOST_SECONDS) as connection:
        received = b""
        try:
            connection.sendall(request.write())
            if request.is_cut:
                connection.settimeout(0.1)
                received = _receive(connection, received)
                connection.settimeout(MOST_SECONDS)
                connection.shutdown(socket.SHUT_WR)
            received = _receive(connection, received)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was answered, and closed, before all was sent
        return _parse(received)


def _receive(connection: socket.socket, received: bytes) -> bytes:
    while b"text/event-stream" not in received.partition(b"\r\n\r\n")[0]:
        try:
            some = connection.recv(262_144)
        except TimeoutError:
            if connection.gettimeout() == MOST_SECONDS:
                raise
            return received
        if not some:
            return received
        received += some
    return received


def _parse(received: bytes) -> Answer:
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return Answer(0)
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    assert len(headers) == len(lines), f"a header stands twice: {lines}"
    return Answer(int(first.split(" ")[1]), headers, body)


@dataclass(frozen=True)
class Operation:
    """One operation of the document: its path has places for ids."""

    method: str
    path: str
    query: tuple[str, ...]
    has_body: bool


def operations_of(document: dict[str, Any]) -> list[Operation]:
    """List all operations of an OpenAPI document, and what is there beside it."""
    found = [
        Operation(
            method.upper(),
            path,
            tuple(one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"),
            "requestBody" in operation,
        )
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    beside = ("/docs", "/", "/openapi.json", "/docs/start.js", "/docs/files/{name}")
    return found + [Operation("GET", path, (), has_body=False) for path in beside]


class Attacker:
    """Makes hostile requests from good ones.

    Args:
        random_: decides.
        operations: are tried in turn.
        bodies: good bodies of JSON, by path.
        ids: that are known, by the name of the place in a path; drawn from.
        key: lets requests in; most carry it.
    """

    def __init__(
        self,
        random_: random.Random,
        operations: list[Operation],
        *,
        bodies: dict[str, Any],
        ids: dict[str, list[str]],
        key: str,
    ) -> None:
        self._random = random_
        self._operations = operations
        self._bodies = bodies
        self._ids = ids
        self._authorization = (b"Authorization", b"Bearer " + key.encode())

    def requests(self, count: int) -> Iterator[tuple[Operation, Request]]:
        """Make requests to all operations in turn."""
        tricks = [self._path, self._query, self._header, self._method, self._host, self._framing, self._key]
        of_bodies = [self._json_value] * 4 + [
            self._json_shape,
            self._json_bytes,
            self._content_type,
            self._form,
            self._form,
        ]
        for number in range(count):
            operation = self._operations[number % len(self._operations)]
            trick: Callable[[Operation], Request] = self._random.choice(
                tricks + (of_bodies * 3 if operation.has_body else [])
            )
            yield operation, trick(operation)

    def bodies_in_turn(self, count: int) -> Iterator[tuple[Operation, Request]]:
        """Make requests with hostile bodies only, to the operations that read one."""
        readers = [one for one in self._operations if one.has_body]
        tricks = [self._json_value] * 4 + [self._json_shape, self._json_bytes, self._content_type, self._form]
        for number in range(count):
            operation = readers[number % len(readers)]
            yield operation, self._random.choice(tricks)(operation)

    def good(self, operation: Operation) -> Request:
        """Make a request that is right."""
        target = re.sub(r"\{(\w+)\}", lambda place: self._random.choice(self._ids[place[1]]), operation.path)
        request = Request("none", operation.method.encode(), target.encode(), (self._authorization,))
        if not operation.has_body:
            return request
        body = json.dumps(self._bodies[operation.path]).encode()
        return replace(request, headers=(*request.headers, JSON_TYPE), body=body)

    def _path(self, operation: Operation) -> Request:
        good, text = self.good(operation), self._random.choice(TEXTS).encode()
        steps = good.target.split(b"/")
        place = self._random.randrange(1, len(steps) + 1)
        steps[place:] = [text] if place == len(steps) or self._random.random() < 0.3 else [text, *steps[place + 1 :]]
        target = self._random.choice([b"/".join(steps)] * 6 + [text, b"/" + good.target, b"http://a" + good.target])
        return replace(good, trick=f"path {text[:40]!r}", target=target)

    def _query(self, operation: Operation) -> Request:
        good = self.good(operation)
        names = [*operation.query, "limit", "cursor", "label", "status", "__class__", "a[]", "", "%00"]
        pairs = [
            f"{self._random.choice(names)}={self._random.choice(TEXTS)}"
            for _ in range(self._random.choice((1, 1, 1, 2, 3, 50)))
        ]
        query = self._random.choice(("&", "&", "&", ";", "&&")).join(pairs)
        return replace(good, trick=f"query {query[:60]}", target=good.target + b"?" + query.encode())

    def _header(self, operation: Operation) -> Request:
        good = self.good(operation)
        name, value = self._random.choice(HEADER_NAMES), self._random.choice(HEADER_VALUES)
        headers = [one for one in good.headers if one[0] != name]
        times = self._random.choice((1, 1, 1, 2, 200))
        header = (name, value if times < 200 else value[:50])
        return replace(good, trick=f"{times} x {name!r}: {value[:40]!r}", headers=(*headers, *[header] * times))

    def _method(self, operation: Operation) -> Request:
        method = self._random.choice(METHODS)
        good = self.good(operation)
        # What asks the server to end the connection with nothing is told apart from what it does not understand.
        return replace(good, trick=f"method {method[:20]!r}", method=method)

    def _host(self, operation: Operation) -> Request:
        host = self._random.choice(HOSTS)
        good = self.good(operation)
        if self._random.random() < 0.5:
            good = replace(good, target=good.target + b"x")
        hosts = [(b"Host", host)] * self._random.choice((1, 1, 1, 2))
        return replace(good, trick=f"host {host[:40]!r}", headers=(*good.headers, *hosts))

    def _framing(self, operation: Operation) -> Request:
        good, framing = self.good(operation), self._random.choice(FRAMINGS)
        body = good.body
        if any(name == b"Transfer-Encoding" for name, _ in framing):
            body = self._random.choice(CHUNKED_BODIES)
        return replace(
            good, trick=f"framing {framing} {body[:20]!r}", headers=(*good.headers, *framing), body=body, is_cut=True
        )

    def _key(self, operation: Operation) -> Request:
        scheme, key = self._authorization[1].split(b" ")
        values = [
            *(b"", scheme, scheme + b" ", key, b"Basic " + key, scheme + b"  " + key, scheme + b" " + key + b" a"),
            *(scheme + b" " + key[:-1], scheme + b" " + key + b"\xff", scheme + b" \xff", b"bearer " + key.upper()),
            *(scheme + b" rsk_00000000_" + b"a" * 43, scheme + b" " + b"a" * 100_000, scheme + b" rsk_\xc3\xbc"),
        ]
        value = self._random.choice(values)
        good = self.good(operation)
        headers = tuple(one for one in good.headers if one != self._authorization)
        shown = value.replace(key, b"KEY")[:40]
        return replace(good, trick=f"authorization {shown!r}", headers=(*headers, (b"Authorization", value)))

    def _json_value(self, operation: Operation) -> Request:
        good, value = self.good(operation), self._random.choice(JSON_VALUES)
        body = json.loads(good.body)
        places = list(_places(body))
        if not places or self._random.random() < 0.05:
            return replace(good, trick=f"body {value[:40]}", body=value.encode())
        parent, step = self._random.choice(places)
        parent[step] = _PLACE
        text = json.dumps(body).replace(json.dumps(_PLACE), value)
        return replace(good, trick=f"{step}: {value[:40]}", body=text.encode())

    def _json_shape(self, operation: Operation) -> Request:
        good = self.good(operation)
        body = json.loads(good.body)
        parent, step = self._random.choice(list(_places(body)))
        trick = self._random.choice(("left out", "unknown", "another case", "many", "deep"))
        if isinstance(parent, list):
            parent += [parent[step]] * 60
        elif trick == "left out":
            del parent[step]
        elif trick == "another case":
            parent[step.upper()] = parent.pop(step)
        elif trick == "many":
            parent[step] = [parent[step]] * 2000
        elif trick == "deep":
            parent[step] = {step: {step: parent[step]}}
        else:
            parent[self._random.choice(("x" * 5000, "__init__", "", "\u202e", "self", "model_config", "ü"))] = 1
        return replace(good, trick=f"{trick} {step}", body=json.dumps(body).encode())

    def _json_bytes(self, operation: Operation) -> Request:
        good = self.good(operation)
        body = good.body
        flipped = bytearray(body)
        flipped[self._random.randrange(len(body))] ^= 1 << self._random.randrange(8)
        bodies = {
            "cut off": body[: self._random.randrange(len(body))],
            "twice": body + body,
            "flipped": bytes(flipped),
            "BOM": b"\xef\xbb\xbf" + body,
            "UTF-16": body.decode().encode("utf-16"),
            "UTF-32": body.decode().encode("utf-32"),
            "latin-1": body.replace(b"hall", b"K\xfcche"),
            "CESU-8": body.replace(b"hall", b"\xed\xa0\xbd\xed\xb8\x80"),
            "NUL behind": body + b"\0",
            "padded": b" " * 100_000 + body,
            "too large": b" " * 1_000_001 + body,
            "a field twice": body.replace(b"{", b'{"label": "a", "label": "b", ', 1),
            "noise": self._random.randbytes(200),
            "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(50),
        }
        trick, changed = self._random.choice(list(bodies.items()))
        return replace(good, trick=trick, body=changed)

    def _content_type(self, operation: Operation) -> Request:
        good, value = self.good(operation), self._random.choice(CONTENT_TYPES)
        headers = tuple(one for one in good.headers if one != JSON_TYPE)
        return replace(good, trick=f"type {value[:40]!r}", headers=(*headers, (b"Content-Type", value)))

    def _form(self, operation: Operation) -> Request:
        good = self.good(operation)
        batch = part(b'name="batch"', b'{"items": [{"file": "a"}]}')
        photo = part(b'name="a"; filename="a.png"', PNG)
        odd = part(
            self._random.choice(DISPOSITIONS), PNG, *self._random.sample(PART_HEADERS, self._random.randrange(2))
        )
        odd_batch = part(b'name="batch"', self._random.choice(JSON_VALUES).encode(), self._random.choice(PART_HEADERS))
        end = b"--x--\r\n"
        forms = {
            "odd part": batch + odd + end,
            "odd batch": odd_batch + photo + end,
            "batch twice": batch + batch + photo + end,
            "photo first": photo + batch + end,
            "photo twice": batch + photo + photo + end,
            "no end": batch + photo,
            "cut": (batch + photo + end)[: self._random.randrange(200)],
            "1001 parts": batch + b"".join(part(b'name="p%d"; filename="a"' % n, b"a") for n in range(1000)) + end,
            "huge text": part(b'name="text"', b"a" * 3_000_000) + batch + end,
            "huge batch": part(b'name="batch"', b" " * 1_000_001) + end,
            "no parts": end,
            "line feeds": (batch + photo + end).replace(b"\r\n", b"\n"),
            "preamble": b"a" * 5000 + b"\r\n" + batch + photo + end,
            "behind the end": batch + photo + end + b"a" * 5000,
            "boundary in a part": part(b'name="a"; filename="a"', b"\r\n--x\r\n\r\n--x--") + batch + end,
            "other boundary": (batch + photo + end).replace(b"--x", b"--y"),
            "many headers": part(b'name="a"', b"", *[b"X: y"] * 3000) + end,
        }
        trick, body = self._random.choice(list(forms.items()))
        headers = tuple(one for one in good.headers if one != JSON_TYPE)
        form_type = (b"Content-Type", b"multipart/form-data; boundary=x")
        return replace(good, trick=f"form, {trick}", headers=(*headers, form_type), body=body)


_PLACE = "the place of a value"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place in a JSON value: what it stands in, and where."""
    steps = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for step in list(steps):
        yield value, step
        yield from _places(value[step])


def part(disposition: bytes, content: bytes, *headers: bytes) -> bytes:
    """Write one part of a form with the boundary x."""
    lines = [b"--x", b"Content-Disposition: form-data; " + disposition, *headers, b"", content, b""]
    return b"\r\n".join(lines)


def costly_requests(ids: dict[str, list[str]], key: str) -> Iterator[Request]:
    """Make requests of a megabyte that would take long where each of their parts was compared with all others."""
    upload = ids["upload_id"][0]
    items = [{"upload_id": upload}]
    names = ",".join(f'"{number:x}":1' for number in range(75_000))
    bodies = {
        "a name twice behind thousands": f'{{{names},"a":1,"a":1}}',
        "thousands of unknown fields": f'{{"items":{json.dumps(items)},{names}}}',
        "thousands of parameters": f'{{"items":{json.dumps(items * 50)},"defaults":{{"params":{{{names}}}}}}}',
        "too many parameters from two places": json.dumps(
            {
                "items": [{**items[0], "params": dict.fromkeys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN", 1)}],
                "defaults": {"params": dict.fromkeys(map(str, range(40)), 1)},
            }
        ),
        "thousands of entries of metadata": f'{{"items":{json.dumps(items)},"metadata":{{{names}}}}}',
        "a huge name of a parameter, fifty times": json.dumps(
            {"items": items * 50, "defaults": {"params": {"n" * 900_000: 1}}}
        ),
        "a huge model, fifty times": json.dumps({"items": items * 50, "defaults": {"model": "m" * 900_000}}),
        "a huge room type, fifty times": json.dumps({"items": items * 50, "defaults": {"room_type": "m" * 900_000}}),
        "a huge LoRA, fifty times": json.dumps({"items": items * 50, "defaults": {"loras": [{"id": "m" * 900_000}]}}),
        "thousands of LoRAs": json.dumps({"items": items, "defaults": {"loras": [{"id": "a"}] * 60_000}}),
        "thousands of uploads": json.dumps({"items": [{"upload_ids": [upload] * 25_000}]}),
        "thousands of items": json.dumps({"items": items * 18_000}),
        "a huge upload": json.dumps({"items": [{"upload_id": "0" * 990_000}]}),
        "hundreds of thousands of lists": '{"items":[' + "[]," * 300_000 + "[]]}",
        "hundreds of thousands of numbers": '{"items":[' + "1," * 490_000 + "1]}",
        "a hundred thousand escapes": '{"label":"' + "\\u0041" * 160_000 + '","items":[]}',
        "a hundred thousand forbidden characters": '{"items":["' + '\\u0000","' * 100_000 + '"]}',
        "a number of a megabyte": '{"items":0.' + "1" * 990_000 + "}",
        "an exponent of a megabyte": '{"items":1e-' + "1" * 990_000 + "}",
    }
    headers = ((b"Authorization", b"Bearer " + key.encode()), JSON_TYPE)
    for trick, body in bodies.items():
        yield Request(trick, b"POST", b"/v1/batches", headers, body.encode())
    query = "&".join(f"{number:x}" for number in range(3300))
    yield Request("a query of thousands of names", b"GET", f"/v1/jobs?{query}".encode(), headers[:1])
    for path in (b"/v1/uploads", b"/v1/jobs/retry"):
        body = '{"files":[' + '{"filename":1},' * 60_000 + "{}]}"
        yield Request("thousands of files", b"POST", path, headers, body.encode())
