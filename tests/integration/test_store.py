"""The store keeps what clients and workers rely on, shown on a real S3 server."""

import base64
import hashlib
import io
import json
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from server.embedded import EmbeddedStore
from server.errors import ObjectChanged, ObjectNotFound, StoreUnavailable
from server.store import Store

PHOTO = b"\xff\xd8\xff" + b"a photo, as far as the store can tell " * 100


@pytest.fixture
def key():
    """Give an object key that no other test uses."""
    return secrets.token_hex(16)


@pytest.fixture
def store(s3):
    """Give a Store on the shared S3 server."""
    return s3.store


def changed(s3, **changes):
    """Make a Store whose settings differ from the shared one's."""
    return Store(s3.settings.model_copy(update=changes))


def make_form(store, key, **options):
    defaults = {"content_type": "image/jpeg", "max_size_bytes": len(PHOTO), "ttl_seconds": 60}
    return store.upload_form(key, **(defaults | options))


def send(form, data=PHOTO, **changed_fields):
    """Send a file as a client does; its fields may be changed or, with None, left out."""
    fields = {name: value for name, value in (form.fields | changed_fields).items() if value is not None}
    return httpx.post(form.url, data=fields, files={"file": ("hall.jpg", data, "text/plain")}, timeout=20)


def upload(store, key, data=PHOTO):
    answer = send(make_form(store, key, max_size_bytes=len(data)), data)
    assert answer.status_code == 204, answer.text


def sha256_hex(data):
    return hashlib.sha256(data).hexdigest()


@contextmanager
def listening(serve):
    """Listen on a free port of 127.0.0.1; `serve` gets every accepted connection. Yields host:port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def test_form_takes_the_right_file(store, key):
    """The file that was announced is stored under its key, with its type, however the client names it."""
    answer = send(make_form(store, key, sha256=sha256_hex(PHOTO), min_size_bytes=len(PHOTO)))
    assert answer.status_code == 204, answer.text
    start = store.read_start(key, 1000)
    assert start.data == PHOTO[:1000]
    assert (start.size_bytes, start.content_type) == (len(PHOTO), "image/jpeg")
    assert start.etag == hashlib.md5(PHOTO, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    ("options", "data", "changed_fields", "code"),
    [
        ({}, PHOTO + b"!", {}, "EntityTooLarge"),
        ({}, b"", {}, "EntityTooSmall"),
        ({"min_size_bytes": len(PHOTO)}, PHOTO[:-1], {}, "EntityTooSmall"),
        ({}, PHOTO, {"key": "another"}, "AccessDenied"),
        ({}, PHOTO, {"Content-Type": "text/html"}, "AccessDenied"),
        ({}, PHOTO, {"Content-Type": None}, "AccessDenied"),
        ({}, PHOTO, {"x-amz-meta-more": "1"}, "AccessDenied"),
        ({"sha256": sha256_hex(PHOTO)}, PHOTO[::-1], {}, "BadDigest"),
        ({"sha256": sha256_hex(PHOTO)}, PHOTO, {"x-amz-checksum-sha256": None}, "AccessDenied"),
        ({"ttl_seconds": -1}, PHOTO, {}, "AccessDenied"),
        ({}, PHOTO, {"x-amz-signature": "0" * 64}, "SignatureDoesNotMatch"),
    ],
    ids=[
        "too large",
        "empty",
        "too small",
        "other key",
        "other type",
        "no type",
        "field not signed",
        "other bytes",
        "no checksum",
        "expired",
        "forged",
    ],
)
def test_form_refuses_anything_else(store, key, options, data, changed_fields, code):
    """The store itself refuses what the form does not allow, and keeps nothing of it."""
    answer = send(make_form(store, key, **options), data, **changed_fields)
    assert 400 <= answer.status_code < 500
    assert f"<Code>{code}</Code>" in answer.text
    for wanted in (key, "another"):
        with pytest.raises(ObjectNotFound):
            store.read_start(wanted, 10)


def test_forms_and_urls_are_made_without_the_store(s3, key):
    """Signing needs no network: 50 forms and 50 URLs for an address where nobody answers take no time."""
    store = changed(s3, public_endpoint="photos.example.com", public_secure=True, endpoint="127.0.0.1:9")
    started = time.monotonic()
    forms = [make_form(store, key) for _ in range(50)]
    urls = [store.output_url(key, filename="a", content_type="image/webp", ttl_seconds=60)[0] for _ in range(50)]
    assert time.monotonic() - started < 1
    form, url = forms[-1], urls[-1]
    assert form.url == "https://photos.example.com/restage-uploads"
    assert url.startswith("https://photos.example.com/restage-outputs/")
    assert timedelta(seconds=50) < form.expires_at - datetime.now(UTC) <= timedelta(seconds=60)
    store.close()


def test_public_address_signs_for_itself(s3, key):
    """A form and a URL for the public address work there, though the store is spoken to by another."""
    port = s3.server.endpoint.rpartition(":")[2]
    store = changed(s3, public_endpoint=f"localhost:{port}")
    assert send(make_form(store, key)).status_code == 204
    store.put_output(key, PHOTO, "image/webp")
    url, _ = store.output_url(key, filename="a.webp", content_type="image/webp", ttl_seconds=60)
    assert urlsplit(url).netloc == f"localhost:{port}"
    assert httpx.get(url).content == PHOTO
    store.close()


def test_start_of_a_short_object_is_all_of_it(store, key):
    """Asking for more bytes than there are gives those that there are."""
    upload(store, key, b"ab")
    start = store.read_start(key, 65_536)
    assert (start.data, start.size_bytes) == (b"ab", 2)


def test_start_of_an_empty_object_is_empty(s3, store, key):
    """An empty object, which a range cannot name, is told as empty."""
    store._client.put_object(s3.settings.uploads_bucket, key, io.BytesIO(), 0)
    assert store.read_start(key, 65_536).size_bytes == 0


def test_upload_comes_back_as_it_was_sent(store, key):
    """A whole upload is fetched by the ETag that its start told."""
    upload(store, key)
    assert store.fetch_upload(key, store.read_start(key, 10).etag) == PHOTO


def test_upload_that_was_replaced_is_not_used(store, key):
    """Bytes that were stored after the look at an upload are refused, not fetched."""
    upload(store, key)
    etag = store.read_start(key, 10).etag
    upload(store, key, PHOTO[::-1])
    with pytest.raises(ObjectChanged, match="other bytes"):
        store.fetch_upload(key, etag)


def test_missing_objects_are_told_apart_from_trouble(store, key):
    """Nothing under a key is ObjectNotFound, never StoreUnavailable; deleting nothing is fine."""
    with pytest.raises(ObjectNotFound, match=key):
        store.read_start(key, 10)
    with pytest.raises(ObjectNotFound, match=key):
        store.fetch_upload(key, "0" * 32)
    store.delete_output(key)


@pytest.mark.parametrize("size_bytes", [1, 6_000_000])
def test_output_is_stored_in_one_part(s3, store, size_bytes):
    """An output of any size is one object in one part: its ETag is its MD5, which multipart uploads lack."""
    key = f"{secrets.token_hex(16)}/1/output.png"
    data = secrets.token_bytes(size_bytes)
    store.put_output(key, data, "image/png")
    stored = s3.store._client.stat_object(s3.settings.outputs_bucket, key)
    assert stored.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert stored.content_type == "image/png"
    store.delete_output(key)
    url, _ = store.output_url(key, filename="x.png", content_type="image/png", ttl_seconds=60)
    assert httpx.get(url).status_code == 404


def test_output_is_read_whole(store, key):
    """A result comes back as it was stored; one that is gone is told apart from trouble."""
    data = secrets.token_bytes(3_000_000)
    store.put_output(f"{key}/1/output.png", data, "image/png")
    assert store.read_output(f"{key}/1/output.png") == data
    store.delete_output(f"{key}/1/output.png")
    with pytest.raises(ObjectNotFound, match=key):
        store.read_output(f"{key}/1/output.png")


def test_buckets_are_made_once(s3):
    """Buckets that are missing fail the check, and processes that make them at the same time do not clash."""
    names = {"uploads_bucket": f"up-{secrets.token_hex(4)}", "outputs_bucket": f"out-{secrets.token_hex(4)}"}
    store = changed(s3, **names)
    with pytest.raises(StoreUnavailable, match=names["uploads_bucket"]):
        store.check()
    with ThreadPoolExecutor(8) as threads:
        for made in [threads.submit(store.ensure_buckets) for _ in range(8)]:
            made.result()
    store.check()
    store.close()


def test_refused_keys_are_trouble_with_the_store(s3, key):
    """Wrong keys are the operator's trouble: StoreUnavailable says what the store answered, not the keys."""
    store = changed(s3, secret_key=SecretStr("not-the-secret-key"))
    for call in (store.check, lambda: store.read_start(key, 10), lambda: store.put_output(key, b"x", "image/png")):
        with pytest.raises(StoreUnavailable) as trouble:
            call()
        assert s3.settings.endpoint in trouble.value.detail
        assert "not-the-secret-key" not in trouble.value.detail
    store.close()


def test_silent_store_costs_one_timeout(s3, key):
    """A store that accepts and says nothing is given up after the read timeout, not after several."""
    with listening(lambda _: None) as endpoint:
        store = changed(s3, endpoint=endpoint, read_timeout_seconds=0.5)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"silent for 0\.5 s"):
            store.read_start(key, 10)
        assert time.monotonic() - started < 3
        store.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nRetry-After: 999\r\n\r\n", "too many 503"),
        (b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", "not S3's"),
        (b'HTTP/1.1 200 OK\r\nETag: "%s"\r\nContent-Length: 900\r\n\r\nshort' % (b"0" * 32), "broke off"),
        (b"HTTP/1.1 403 No\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p>x", "not S3's"),
        (b"HTTP/1.1 400 No\r\nContent-Type: application/xml\r\nContent-Length: 4\r\n\r\n<a><", "cannot be read"),
        (b"", "ProtocolError"),
    ],
    ids=["server error", "redirect", "cut body", "a proxy's page", "broken XML", "hung up"],
)
def test_every_bad_answer_is_trouble_with_the_store(s3, key, answer, words):
    """Server errors, bodies that are cut and answers that are not S3's all become StoreUnavailable."""

    def serve(connection):
        connection.recv(65_536)
        connection.sendall(answer)
        connection.close()

    with listening(serve) as endpoint:
        store = changed(s3, endpoint=endpoint)
        with pytest.raises(StoreUnavailable, match=words) as trouble:
            store.fetch_upload(key, "0" * 32)
        assert "Signature" not in trouble.value.detail
        store.close()


def test_killed_store_is_told_at_once_and_found_again(tmp_path):
    """A store that is killed gives StoreUnavailable within the timeouts; started again, it has every object."""
    server = EmbeddedStore(tmp_path / "store")
    server.start()
    server.wait_ready()
    store = Store(server.settings)
    try:
        upload(store, "photo")
        etag = store.read_start("photo", 10).etag
        server.kill()
        for call in (
            store.check,
            lambda: store.read_start("photo", 10),
            lambda: store.fetch_upload("photo", etag),
            lambda: store.put_upload("photo", io.BytesIO(PHOTO), len(PHOTO), "image/jpeg"),
            lambda: store.put_output("out", PHOTO, "image/webp"),
            lambda: store.read_output("out"),
            lambda: store.delete_output("out"),
            lambda: store.delete(["uploads/photo"]),
        ):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="no connection"):
                call()
            assert time.monotonic() - started < 5
        server.start()
        server.wait_ready()
        assert store.fetch_upload("photo", etag) == PHOTO
    finally:
        store.close()
        server.kill()


def test_connections_are_given_back(s3, key):
    """Many calls, refused ones among them, leave no connection in use and open no more than one for one thread."""
    store = changed(s3)
    upload(store, key)
    for _ in range(20):
        store.read_start(key, 10)
        with pytest.raises(ObjectChanged):
            store.fetch_upload(key, "0" * 32)
        with pytest.raises(ObjectNotFound):
            store.read_start("nothing", 10)
    pool = store._pool.connection_from_url(f"http://{s3.settings.endpoint}")
    assert pool.num_connections == 1
    store.close()


def test_policy_says_exactly_what_is_allowed(store, key):
    """The signed policy names bucket, key, type, size and checksum exactly; nothing is left to a prefix."""
    form = make_form(store, key, sha256=sha256_hex(PHOTO), min_size_bytes=len(PHOTO))
    conditions = json.loads(base64.b64decode(form.fields["policy"]))["conditions"]
    assert ["eq", "$key", key] in conditions
    assert ["eq", "$Content-Type", "image/jpeg"] in conditions
    assert ["eq", "$bucket", "restage-uploads"] in conditions
    assert ["content-length-range", len(PHOTO), len(PHOTO)] in conditions
    checksum = base64.b64encode(hashlib.sha256(PHOTO).digest()).decode()
    assert ["eq", "$x-amz-checksum-sha256", checksum] in conditions
    assert not any(condition[0] == "starts-with" for condition in conditions)
