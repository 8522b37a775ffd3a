"""No call of the store outlives its time, however slowly bytes still come: a real S3 server behind a bad line."""

import io
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from server.errors import ObjectChanged, StoreTooSlow, StoreUnavailable
from server.store import Store
from server.store_deadline import running_transfer
from tests.chaos.proxy import Proxy

LIMIT_SECONDS = 0.5
READ_TIMEOUT_SECONDS = 0.3
PHOTO = bytes(200_000)


@pytest.fixture
def behind_line(s3):
    """Give a function that opens a Store behind a proxy, and the proxy."""

    @contextmanager
    def opened(**changes):
        with Proxy(s3.server.ports[0]) as proxy:
            settings = s3.settings.model_copy(update={"endpoint": proxy.address, **changes})
            store = Store(settings)
            try:
                yield store, proxy
            finally:
                store.close()

    return opened


@pytest.fixture
def photo(s3):
    """Give the key and the ETag of a photo."""
    key = secrets.token_hex(16)
    return key, s3.store.put_upload(key, io.BytesIO(PHOTO), len(PHOTO), "image/png")


def forged(*lines, body=b""):
    """Write an answer of a store."""
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode() + body


@contextmanager
def dripping(first):
    """Listen as a store that answers `first` at once, and then a byte now and then."""

    def serve(connection):
        with suppress(OSError):  # the client gives up
            connection.recv(65_536)
            connection.sendall(first)
            while True:
                connection.sendall(b"x")
                time.sleep(READ_TIMEOUT_SECONDS / 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept():
            with suppress(OSError):  # the listener is shut down in the end
                while True:
                    connections.append(listener.accept()[0])
                    threading.Thread(target=serve, args=(connections[-1],), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    "first",
    [b"", b"HTTP/1.1 200 OK\r\nx-a: ", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n"],
    ids=["status line", "header", "body", "error's body"],
)
def test_a_store_that_drips_is_given_up_in_time(s3, first):
    """Where no read ever waits for long, the call ends all the same, once, and says why."""
    limits = {"transfer_timeout_seconds": LIMIT_SECONDS, "read_timeout_seconds": READ_TIMEOUT_SECONDS}
    with dripping(first) as endpoint:
        store = Store(s3.settings.model_copy(update={"endpoint": endpoint, **limits}))
        started = time.monotonic()
        with pytest.raises(StoreTooSlow, match=r"within 0\.5 s"):
            store.fetch_upload("photo", "e1")
        assert time.monotonic() - started < 10 * LIMIT_SECONDS
        store.close()


def test_a_slow_line_is_given_up_in_time(behind_line, photo):
    """Every kind of call ends when its time is over, and the store is of use again when the line is."""
    key, etag = photo
    with behind_line(transfer_timeout_seconds=LIMIT_SECONDS) as (store, proxy):
        assert store.fetch_upload(key, etag) == PHOTO
        proxy.slow(100)
        proxy.cut()  # a connection that waits for work would be slow at its second call only
        calls = (
            lambda: store.fetch_upload(key, etag),
            lambda: store.read_start(key, 65_536),
            lambda: store.put_output(f"{key}/1/output.webp", bytes(20_000_000), "image/webp"),
            lambda: store.read_output(f"{key}/1/output.webp"),
            lambda: store.put_marker(f"{key}/done.json", b"{}"),
            lambda: store.delete([f"uploads/{key}"]),
            store.inventory.uploads,
            store.check,
        )
        started = time.monotonic()
        with ThreadPoolExecutor(len(calls)) as threads:
            for given_up in [threads.submit(call) for call in calls]:
                assert isinstance(given_up.exception(), StoreTooSlow)
        assert time.monotonic() - started < 10 * LIMIT_SECONDS
        proxy.heal()
        assert store.fetch_upload(key, etag) == PHOTO


def test_calls_at_once_end_each_in_its_own_time(behind_line, photo):
    """A slow call neither ends another that is in time nor keeps one from being ended."""
    key, etag = photo
    outcomes = []

    def fetch(store):
        try:
            outcomes.append(len(store.fetch_upload(key, etag)))
        except StoreUnavailable as error:
            outcomes.append(type(error))

    with behind_line(transfer_timeout_seconds=LIMIT_SECONDS) as (slow, proxy), behind_line() as (good, _):
        proxy.slow(1000)
        threads = [threading.Thread(target=fetch, args=(store,)) for store in (slow, good, slow, good)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(str, outcomes)) == sorted(map(str, [StoreTooSlow, StoreTooSlow, len(PHOTO), len(PHOTO)]))


def test_a_connection_that_was_given_back_is_not_cut(s3):
    """A call whose time is over between two requests, or behind them, leaves the line to whoever has it by then."""
    store = Store(s3.settings.model_copy(update={"pool_size": 1}))
    store.check()
    [pool] = [store._pool.pools[key] for key in store._pool.pools.keys()]  # noqa: SIM118
    lent_out = pool.pool
    assert lent_out is not None
    [line] = [connection.sock for connection in lent_out.queue if connection]

    def ask_until_time_is_over():
        with store._trouble.translated("bucket"):
            store._client.bucket_exists(s3.settings.uploads_bucket)
            transfer = running_transfer()
            assert transfer is not None
            transfer.cut()

    with pytest.raises(StoreTooSlow):
        ask_until_time_is_over()
    store.check()
    assert [connection.sock for connection in lent_out.queue if connection] == [line]
    store.close()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        # Without a length an answer ends with its connection, and so does one that was cut, be it in its header.
        (b'HTTP/1.1 200 OK\r\nETag: "%(etag)s', StoreUnavailable, "its length"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 200000\r\nETag: "12', StoreUnavailable, "broke off"),
        (forged('ETag: "%(etag)s"', body=b"x" * 1000), StoreUnavailable, "its length"),
        (forged('ETag: "%(etag)s"', "Content-Length: 200000", body=b"x" * 1000), StoreUnavailable, "bytes are missing"),
    ],
    ids=["cut header", "cut ETag", "no length", "cut body"],
)
def test_an_answer_that_is_not_whole_is_no_photo(behind_line, photo, answer, error, words):
    """An answer that broke off, wherever, is trouble with the store, never a photo that was changed."""
    key, etag = photo
    with behind_line() as (store, proxy):
        proxy.answer_instead(b"GET /", answer=answer.replace(b"%(etag)s", etag.encode()))
        with pytest.raises(error, match=words):
            store.fetch_upload(key, etag, size_bytes=len(PHOTO))


def test_a_store_that_sends_without_end_costs_no_memory(behind_line, photo, monkeypatch):
    """Of an object that is larger than accepted no more is read than a byte too many."""
    key, etag = photo
    with behind_line() as (store, _):
        read = []
        whole = store._read
        monkeypatch.setattr(store, "_read", lambda *args: read.append(whole(*args)) or read[-1])
        with pytest.raises(ObjectChanged):
            store.fetch_upload(key, etag, size_bytes=1000)
        store.put_output(f"{key}/1/output.webp", PHOTO, "image/webp")
        with pytest.raises(StoreUnavailable, match="another size"):
            store.read_output(f"{key}/1/output.webp", size_bytes=1000)
        assert [len(data) for data in read] == [1001, 1001]


def test_a_closed_store_leaves_no_thread(s3):
    """What watches over the calls ends with the store."""
    before = set(threading.enumerate())
    store = Store(s3.settings)
    store.check()
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"store-deadlines"}
    store.close()
    assert set(threading.enumerate()) <= before
