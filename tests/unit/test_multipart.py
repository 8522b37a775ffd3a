"""A form is read as it was sent, however the network cuts it, and no form that anyone can send breaks the reader."""

import asyncio
import hashlib
import tempfile
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.crowding import LargeBodies
from server.api.multipart import FilesNotKept, max_form_bytes, read_form
from server.errors import (
    InvalidRequest,
    MalformedBody,
    PayloadTooLarge,
    RequestError,
    ServerError,
    UnsupportedMediaType,
)
from server.settings import LimitsSettings

BOUNDARY = "b0undary"
BATCH = 'name="batch"'
LIMITS = LimitsSettings(max_body_bytes=200, max_upload_bytes=1000, max_batch_items=3)


def photo(name, filename="a.jpg"):
    return f'name="{name}"; filename="{filename}"'


def form(*parts, end="--\r\n", boundary=BOUNDARY):
    """Write a form; each part is its disposition, its bytes, and further header lines."""
    body = b""
    for disposition, data, *headers in parts:
        lines = "\r\n".join([f"--{boundary}", f"Content-Disposition: form-data; {disposition}", *headers])
        body += lines.encode() + b"\r\n\r\n" + data + b"\r\n"
    return body + f"--{boundary}{end}".encode()


def cut(body, places):
    """Cut a body at places, which may stand in any order, twice, or behind its end."""
    starts = sorted({0, *(place % (len(body) + 1) for place in places)})
    return [body[start:end] for start, end in zip(starts, [*starts[1:], len(body)], strict=True)]


def read(chunks, *, boundary=BOUNDARY, limits=LIMITS):
    """Read a form to its end; returns its batch, and of each file (name, all bytes, size and digest as told)."""

    async def arrive():
        for chunk in chunks:
            yield chunk

    async def read_all():
        async with AsyncExitStack() as opened:
            found = await read_form(arrive(), boundary, limits=limits, large_bodies=LargeBodies(1), opened=opened)
            return found.batch, {
                part: (file.filename, file.file.read(), file.size_bytes, file.sha256)
                for part, file in found.files.items()
            }

    return asyncio.run(read_all())


def whole(filename, data):
    return filename, data, len(data), hashlib.sha256(data).hexdigest()


# What looks like the parser's own: line ends, and starts of the boundary.
treacherous = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"--", b"\r\n--", b"\r\n--b0un", b"--b0undary", b"x"]), max_size=12
).map(b"".join)
contents = (treacherous | st.binary(max_size=60)).filter(lambda data: b"\r\n--b0undary" not in b"\r\n" + data)


@given(
    contents.filter(bool),
    st.dictionaries(st.sampled_from(["photo1", "photo 2", "größe"]), contents, max_size=3),
    st.integers(0, 3),
    st.lists(st.integers(0, 5000), max_size=40),
    st.booleans(),
)
def test_a_form_is_read_as_it_was_sent(batch, files, place, cuts, is_closed_with_a_line):
    """Every byte of every part arrives, wherever `batch` stands among them and wherever the body is cut."""
    parts: list[Any] = [(photo(name, f"{name}.jpg"), data, "Content-Type: image/jpeg") for name, data in files.items()]
    parts.insert(place, (BATCH, batch))
    body = form(*parts, end="--\r\n" if is_closed_with_a_line else "--")
    assert read(cut(body, cuts)) == (batch, {name: whole(f"{name}.jpg", data) for name, data in files.items()})
    assert read([body[place : place + 1] for place in range(len(body))])[0] == batch


@given(
    st.lists(st.integers(0, 400), max_size=10),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=6),
    st.integers(0, 400),
)
def test_no_damage_to_a_form_breaks_the_reader(cuts, damages, end):
    """A damaged or shortened form is read or refused with an error of ours; its files are closed either way."""
    body = bytearray(
        form((BATCH, b"{}"), (photo("photo1"), b"123", "Content-Type: image/jpeg"), (photo("photo2"), b"4567"))
    )
    for place, data in damages:
        body[place % len(body) : place % len(body) + len(data)] = data
    with suppress(RequestError):
        read(cut(bytes(body[: end or None]), cuts))


@given(st.integers(995, 1005), st.lists(st.integers(0, 3000), max_size=20))
def test_what_is_over_the_limit_of_a_file_is_dropped(size_bytes, cuts):
    """A file keeps as many bytes as an upload may have, tells how many there were, and the next one is whole."""
    data = bytes(place % 251 for place in range(size_bytes))
    body = form((photo("big"), data), (photo("next"), b"abc"), (BATCH, b"{}"))
    _, files = read(cut(body, cuts))
    kept = data[:1000]
    assert files == {
        "big": ("a.jpg", kept, size_bytes, hashlib.sha256(kept).hexdigest()),
        "next": whole("a.jpg", b"abc"),
    }


@given(st.integers(198, 203), st.lists(st.integers(0, 600), max_size=20))
def test_the_batch_has_the_limit_of_a_json_body(size_bytes, cuts):
    """The part `batch` may have as many bytes as a JSON request, and not one more."""
    body = form((BATCH, b" " * size_bytes))
    if size_bytes <= 200:
        assert read(cut(body, cuts)) == (b" " * size_bytes, {})
    else:
        with pytest.raises(PayloadTooLarge, match="200 bytes"):
            read(cut(body, cuts))


def test_a_huge_text_is_given_up_where_it_passes_its_limit():
    """Nobody holds a text part in memory to find out how large it is."""
    num_taken = 0

    def endless():
        nonlocal num_taken
        yield form((BATCH, b""))[: -len("\r\n--b0undary--\r\n")]
        while True:
            num_taken += 1
            yield b" " * 64

    with pytest.raises(PayloadTooLarge):
        read(endless())
    assert num_taken == 4


def test_a_large_file_goes_to_disk_in_pieces():
    """A file of several writes is put together in order, and hashed as a whole."""
    data = bytes(range(256)) * 20_000
    limits = LimitsSettings(max_upload_bytes=10_000_000)
    body = form((BATCH, b"{}"), (photo("photo1"), data))
    _, files = read(cut(body, range(0, len(body), 65_536)), limits=limits)
    assert files == {"photo1": whole("a.jpg", data)}


OK = (BATCH, b"{}")


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (b"", MalformedBody, "last boundary"),
        (b"no form at all", MalformedBody, "last boundary"),
        (form(OK)[:-4], MalformedBody, "last boundary"),
        (form(OK)[:20], MalformedBody, "last boundary"),
        (form(OK, end="xx"), MalformedBody, "boundary"),
        (form(OK).replace(b"\r\n", b"\n"), MalformedBody, "line break"),
        (form(), MalformedBody, "no part batch"),
        (form((photo("photo1"), b"x")), MalformedBody, "no part batch"),
        (form((BATCH, b"")), MalformedBody, "nothing in its part batch"),
        (form(OK, OK), MalformedBody, "'batch' stands twice"),
        (form(OK, (photo("a"), b"1"), (photo("a"), b"2")), MalformedBody, "'a' stands twice"),
        (form(OK, (photo(""), b"1")), MalformedBody, "no name"),
        (form(OK, ('filename="a.jpg"', b"1")), MalformedBody, "no name"),
        (form(OK, ('name="label"', b"12 Oak St")), InvalidRequest, "'label' is not a file"),
        (form(OK, ('name="photo1"', b"1", "Content-Type: image/jpeg")), InvalidRequest, "'photo1' is not a file"),
        (form(OK, ('name="_charset_"', b"latin-1")), InvalidRequest, "'_charset_' is not a file"),
        (form((BATCH, b"{}", "Content-Type: application/json; charset=x-klingon")), UnsupportedMediaType, "x-klingon"),
        (form((BATCH, b"{}", "Content-Type: text/plain; charset=latin-1")), UnsupportedMediaType, "UTF-8"),
        (form((BATCH, b"e30=", "Content-Transfer-Encoding: base64")), MalformedBody, "base64"),
        (form(OK, (photo("a"), b"1", "Content-Transfer-Encoding: quoted-printable")), MalformedBody, "quoted"),
        (form(OK, (photo("a"), b"1", "Content-Length: 2")), MalformedBody, "content-length"),
        (form(OK, (photo("a"), b"1", "Content-Length: -2")), MalformedBody, "content-length"),
        (form(OK, (photo("a"), b"1", f"X-Long: {'x' * 5000}")), MalformedBody, "header length"),
        (form(OK, (photo("a" * 5000), b"1")), MalformedBody, "header length"),
        (form(OK, (photo("a"), b"1", *["X-Many: x"] * 8)), MalformedBody, "header count"),
        (form(OK, (photo("a"), b"1", "no colon")), MalformedBody, "header"),
        (form(OK).replace(b"form-data", b"attachment"), MalformedBody, "disposition"),
        (form(OK).replace(b"Content-Disposition", b"X-Disposition"), MalformedBody, "disposition"),
        (form(OK).replace(b"Content-D", b"Content-\xff"), MalformedBody, "decode"),
        (form(OK, *[(photo(str(number)), b"1") for number in range(4)]), InvalidRequest, "at most 3 files"),
    ],
)
def test_a_form_that_is_wrong_is_refused(body, error, text):
    """Each mistake has its text, however the body is cut."""
    for chunks in ([body], [body[place : place + 1] for place in range(len(body))], cut(body, range(0, 9000, 7))):
        with pytest.raises(error) as caught:
            read(chunks)
        assert text in caught.value.detail


def test_as_many_files_as_a_batch_has_items_are_taken():
    """The limit itself is allowed."""
    batch, files = read([form(*[(photo(str(number)), b"1") for number in range(3)], OK)])
    assert (batch, list(files)) == (b"{}", ["0", "1", "2"])


@pytest.mark.parametrize("boundary", [None, "", "a" * 71, "a\nb", "a\r", "a ", "größe", 'a"b', "a;b"])
def test_a_boundary_that_is_none_is_refused(boundary):
    """A form without a boundary, or with one that RFC 2046 does not know, is not looked at."""
    with pytest.raises(MalformedBody, match="boundary"):
        read([form(OK, boundary=boundary or "")], boundary=boundary)


@pytest.mark.parametrize("boundary", ["a", "a" * 70, "'()+_,-./:=?", "----WebKitFormBoundaryX1"])
def test_any_boundary_that_is_one_is_taken(boundary):
    """All that RFC 2046 allows can be sent."""
    assert read([form(OK, boundary=boundary)], boundary=boundary) == (b"{}", {})


@pytest.mark.parametrize(
    "header", ["Content-Type: application/json", "Content-Type: text/plain; charset=UTF-8", "X: y"]
)
@pytest.mark.parametrize("disposition", [BATCH, 'name=batch; filename="batch.json"'])
def test_the_batch_may_be_a_text_or_a_file(disposition, header):
    """Clients send JSON in a form in many ways, and all of them are clear."""
    assert read([form((disposition, b"{}", header))]) == (b"{}", {})


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        (photo("a", "hall.jpg"), "hall.jpg"),
        (photo("a", ""), None),
        (photo("a", "../../etc/passwd"), "passwd"),
        (photo("a", "/"), None),
        (photo("a", ".."), None),
        (photo("a", "a/.."), None),
        (photo("a", r"C:\Photos\hall.jpg"), "hall.jpg"),
        (photo("a", r"..\..\hall.jpg"), "hall.jpg"),
        (photo("a", "Küche 中 🏠.jpg"), "Küche 中 🏠.jpg"),
        (photo("a", r"12\" pipe.jpg"), '12" pipe.jpg'),
        (photo("a", "12%22 pipe.jpg"), '12" pipe.jpg'),
        (photo("a", "a%0D%0AX-Evil: 1.jpg"), "aX-Evil: 1.jpg"),
        (photo("a", "a\0b\x1b[31m.jpg"), "ab[31m.jpg"),
        (photo("a", "evil\u202egpj.exe"), "evilgpj.exe"),
        (photo("a", "x" * 300 + ".jpg"), "x" * 255),
        ("name=a; filename=hall.jpg", "hall.jpg"),
        ("name=\"a\"; filename*=UTF-8''K%C3%BCche.jpg", "Küche.jpg"),
        ("name=\"a\"; filename*=utf-8''%ff%2e%2e%2fx.jpg", "x.jpg"),
    ],
)
def test_a_filename_is_a_name_and_nothing_else(disposition, filename):
    """Folders, characters that cannot be seen and what is too long are taken off; quotes and other scripts stay."""
    _, files = read([form(OK, (disposition, b"1"))])
    assert files["a"][0] == filename


def test_files_have_no_name_on_disk(tmp_path, monkeypatch):
    """What is received cannot be found by its name, and is gone with the process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def arrive():
        yield form(OK, (photo("a", "../../evil.jpg"), b"1" * 900))
        assert not list(tmp_path.iterdir())

    async def read_all():
        async with AsyncExitStack() as opened:
            found = await read_form(arrive(), BOUNDARY, limits=LIMITS, large_bodies=LargeBodies(1), opened=opened)
            assert len(found.files) == 1
            assert not list(tmp_path.iterdir())

    asyncio.run(read_all())


def test_a_disk_that_takes_nothing_is_told_as_an_outage(tmp_path, monkeypatch):
    """Files that cannot be kept are no fault of the caller, who may come again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FilesNotKept, match="No such file") as caught:
        read([form(OK, (photo("a"), b"1"))])
    assert isinstance(caught.value, ServerError)
    assert caught.value.http_status == 503
    assert read([form(OK)]) == (b"{}", {})


def test_files_are_closed_when_the_form_is_refused(monkeypatch):
    """A form that turns out wrong at its end leaves no open file."""
    files = []
    make_file = tempfile.TemporaryFile

    def make_noted_file():
        files.append(make_file())
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", make_noted_file)
    with pytest.raises(MalformedBody):
        read([form((photo("a"), b"1"), (photo("b"), b"2"), end="xx")])
    assert len(files) == 2
    assert all(file.closed for file in files)


def test_a_whole_form_has_a_limit_that_every_allowed_form_keeps():
    """The largest allowed parts, with the longest headers, fit into the limit of the body."""
    headers = [f"X-{number}: {'x' * 4200}" for number in range(7)]
    parts = [(photo(str(number)), b"1" * 1000, *headers) for number in range(3)]
    body = form((BATCH, b" " * 200, *headers), *parts, boundary="b" * 70)
    assert len(body) <= max_form_bytes(LIMITS)
    assert len(read([body], boundary="b" * 70)[1]) == 3
