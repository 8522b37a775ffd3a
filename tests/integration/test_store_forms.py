"""An upload form is good for one file under one key, whatever its holder does with it; shown on a real S3 server."""

import base64
import hashlib
import json
import secrets
import socket
import time

import httpx
import pytest
from minio.error import S3Error

from server.errors import ObjectChanged, ObjectNotFound

PHOTO = b"\xff\xd8\xff" + b"a photo, as far as the store can tell " * 100
OTHER_PHOTO = PHOTO[::-1]
BOUNDARY = "a-boundary"


@pytest.fixture
def key():
    """Give an object key that no other test uses."""
    return secrets.token_hex(16)


@pytest.fixture
def store(s3):
    """Give a Store on the shared S3 server."""
    return s3.store


@pytest.fixture
def form(store, key):
    """Give a form for `PHOTO` under `key`, without a digest."""
    return store.upload_form(key, content_type="image/jpeg", max_size_bytes=len(PHOTO), ttl_seconds=60)


def body_of(parts):
    """Write a form as it goes over the wire; `parts` are (name, value), in order."""
    written = b""
    for name, value in parts:
        filename = '; filename="hall.jpg"' if name == "file" else ""
        written += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode()
        written += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return written + f"--{BOUNDARY}--\r\n".encode()


def send(url, parts):
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    return httpx.post(url, content=body_of(parts), headers={"Content-Type": content_type}, timeout=30)


def stored(store, key):
    """What is stored under `key`, as (size, type), or None."""
    try:
        start = store.read_start(key, 10)
    except ObjectNotFound:
        return None
    return start.size_bytes, start.content_type


def test_the_same_form_twice_stores_the_same_bytes(store, key):
    """With a digest, a form that is sent again changes nothing: what was looked at stays what it was."""
    digest = hashlib.sha256(PHOTO).hexdigest()
    form = store.upload_form(
        key,
        content_type="image/jpeg",
        max_size_bytes=len(PHOTO),
        min_size_bytes=len(PHOTO),
        sha256=digest,
        ttl_seconds=60,
    )
    parts = [*form.fields.items(), ("file", PHOTO)]
    assert send(form.url, parts).status_code == 204
    etag = store.read_start(key, 10).etag
    assert send(form.url, parts).status_code == 204
    assert "<Code>BadDigest</Code>" in send(form.url, [*form.fields.items(), ("file", OTHER_PHOTO)]).text
    assert store.fetch_upload(key, etag) == PHOTO


def test_the_same_form_with_other_bytes_is_noticed(store, key, form):
    """Without a digest, a form that is sent again replaces the photo, and the ETag of the look tells it."""
    assert send(form.url, [*form.fields.items(), ("file", PHOTO)]).status_code == 204
    etag = store.read_start(key, 10).etag
    assert send(form.url, [*form.fields.items(), ("file", OTHER_PHOTO)]).status_code == 204
    with pytest.raises(ObjectChanged):
        store.fetch_upload(key, etag)


def test_a_form_that_has_just_expired_is_too_late(store, key):
    """The store's own clock ends a form, one second after its time too."""
    form = store.upload_form(key, content_type="image/jpeg", max_size_bytes=len(PHOTO), ttl_seconds=1)
    time.sleep(2.1)
    answer = send(form.url, [*form.fields.items(), ("file", PHOTO)])
    assert answer.status_code == 403
    assert stored(store, key) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([("key", "{key}0")], []),
        ([], [("key", "{key}0")]),
        ([("Key", "{key}0")], []),
        ([("Content-Type", "text/html")], []),
        ([], [("Content-Type", "text/html")]),
        ([], [("content-type", "text/html")]),
    ],
)
def test_a_field_given_twice_gains_nothing(store, key, form, before, after):
    """A second value for key or type, before or after the signed one, is refused or ignored; never used."""
    parts = [*before, *form.fields.items(), *after]
    send(form.url, [*((name, value.format(key=key)) for name, value in parts), ("file", PHOTO)])
    assert stored(store, f"{key}0") is None
    assert stored(store, key) in {None, (len(PHOTO), "image/jpeg")}


def test_the_name_of_the_file_never_becomes_the_key(store, key, form):
    """The key is what was signed: the store's own word for the file's name does not fit it."""
    answer = send(form.url, [*(form.fields | {"key": "${filename}"}).items(), ("file", PHOTO)])
    assert answer.status_code == 403
    assert stored(store, "hall.jpg") is None


def test_a_form_opens_no_other_bucket(s3, key, form):
    """A form for the uploads bucket stores nothing among the outputs."""
    url = form.url.replace(s3.settings.uploads_bucket, s3.settings.outputs_bucket)
    assert send(url, [*form.fields.items(), ("file", PHOTO)]).status_code == 403
    with pytest.raises(S3Error, match="NoSuchKey"):
        s3.store._client.stat_object(s3.settings.outputs_bucket, key)


def test_a_policy_cannot_be_widened(store, key, form):
    """Whoever takes a condition out of the policy has no signature for the rest."""
    policy = json.loads(base64.b64decode(form.fields["policy"]))
    policy["conditions"] = [each for each in policy["conditions"] if each[0] != "content-length-range"]
    widened = base64.b64encode(json.dumps(policy).encode()).decode()
    answer = send(form.url, [*(form.fields | {"policy": widened}).items(), ("file", PHOTO * 2)])
    assert "<Code>SignatureDoesNotMatch</Code>" in answer.text
    assert stored(store, key) is None


def test_a_huge_file_is_refused(store, key, form):
    """Thirty megabytes through a form for a few kilobytes leave nothing behind."""
    answer = send(form.url, [*form.fields.items(), ("file", bytes(30_000_000))])
    assert "<Code>EntityTooLarge</Code>" in answer.text
    assert stored(store, key) is None


@pytest.mark.parametrize("num_missing", [20, 2000])
def test_a_form_that_breaks_off_stores_nothing(s3, store, key, form, num_missing):
    """A client that hangs up before its file has ended leaves no photo, not even a part of one."""
    body = body_of([*form.fields.items(), ("file", PHOTO)])
    head = (
        f"POST /{s3.settings.uploads_bucket} HTTP/1.1\r\nHost: {s3.settings.endpoint}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    host, _, port = s3.settings.endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + body[:-num_missing])
        connection.shutdown(socket.SHUT_WR)
        assert b" 400 " in connection.recv(65_536)
    assert stored(store, key) is None


def test_without_a_form_nobody_gets_in(s3, store, key):
    """Nothing can be stored, read or listed without a signature."""
    address = f"http://{s3.settings.endpoint}/{s3.settings.uploads_bucket}"
    assert send(address, [("key", key), ("file", PHOTO)]).status_code in {400, 403}
    assert httpx.put(f"{address}/{key}", content=PHOTO).status_code == 403
    assert stored(store, key) is None
    assert httpx.get(address).status_code == 403
    assert httpx.get(f"{address}/{key}").status_code == 403
