"""Files reach a real S3 server whole, in little memory, and with patience for a slow store or line."""

import hashlib
import io
import secrets
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress

import pytest

from server import store_sending
from server.errors import ObjectNotFound, StoreUnavailable
from server.store import Store

MEGABYTE = 1_000_000


@pytest.fixture
def key():
    """Give an object key that no other test uses."""
    return secrets.token_hex(16)


@pytest.fixture
def store(s3):
    """Give a Store on the shared S3 server."""
    return s3.store


class Wire:
    """A way to the S3 server on which a test can be a bad line.

    `misbehave(number, received)` is called as bytes pass towards the server, with the number of the connection and how
    many of its bytes have come so far. It may take its time, and cuts the connection by returning True.
    """

    def __init__(self, endpoint, misbehave):
        host, _, port = endpoint.rpartition(":")
        self.server = (host, int(port))
        self.misbehave = misbehave
        self.listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that a sender soon notices when nobody reads.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets, self.threads = [], []
        self.start(self.accept)

    def start(self, work, *arguments):
        self.threads.append(threading.Thread(target=work, args=arguments))
        self.threads[-1].start()

    def accept(self):
        with suppress(OSError):  # the listener is shut down in the end
            for number in range(1000):
                client, _ = self.listener.accept()
                upstream = socket.create_connection(self.server)
                self.sockets += [client, upstream]
                self.start(self.pump, client, upstream, number)
                self.start(self.pump, upstream, client, None)

    def pump(self, source, target, number):
        received = 0
        with suppress(OSError):  # either end may have given up
            while data := source.recv(16_384):
                received += len(data)
                if number is not None and self.misbehave(number, received):
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        for each in self.threads:
            each.join()
        for each in [*self.sockets, self.listener]:
            each.close()


@contextmanager
def behind_wire(s3, misbehave, **changes):
    """Yield a Store that reaches the shared S3 server through a `Wire`."""
    wire = Wire(s3.settings.endpoint, misbehave)
    store = Store(s3.settings.model_copy(update={"endpoint": wire.endpoint, **changes}))
    try:
        yield store
    finally:
        store.close()
        wire.close()


@pytest.mark.parametrize("size_bytes", [1, 65_536, 6_000_001])
def test_an_upload_from_a_file_is_stored_whole(store, key, size_bytes):
    """A file is one object in one part, with its type; the ETag told is the one that a look at it tells."""
    data = secrets.token_bytes(size_bytes)
    file = io.BytesIO(data)
    file.seek(size_bytes)  # as it stands after it was written
    etag = store.put_upload(key, file, size_bytes, "image/png")
    assert etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
    start = store.read_start(key, 10)
    assert (start.etag, start.size_bytes, start.content_type) == (etag, size_bytes, "image/png")
    assert store.fetch_upload(key, etag) == data
    assert not file.closed


def test_an_upload_takes_the_place_of_another(store, key):
    """The later file under a key is the one that counts."""
    first = store.put_upload(key, io.BytesIO(b"first"), 5, "image/png")
    second = store.put_upload(key, io.BytesIO(b"second one"), 10, "image/jpeg")
    assert first != second
    assert store.fetch_upload(key, second) == b"second one"


def test_a_large_file_costs_little_memory(store, key, tmp_path):
    """A file of 50 MB is sent from the disk with a few blocks of it in memory."""
    path = tmp_path / "photo"
    path.write_bytes(bytes(50 * MEGABYTE))
    with path.open("rb") as file:
        tracemalloc.start()
        try:
            store.put_upload(key, file, 50 * MEGABYTE, "image/png")
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 5 * MEGABYTE
    assert store.delete([f"uploads/{key}"]) == [f"uploads/{key}"]


@pytest.mark.parametrize("announced", [4, 6])
def test_a_file_of_another_size_is_not_sent(store, key, announced):
    """A file that is not as long as announced is our mistake, and nothing of it is stored."""
    with pytest.raises(ValueError, match=f"has 5 bytes; announced were {announced}"):
        store.put_upload(key, io.BytesIO(b"photo"), announced, "image/png")
    with pytest.raises(ObjectNotFound):
        store.read_start(key, 10)


def test_bytes_that_change_on_the_way_are_refused(store, key):
    """The store compares what it gets with the digest that was signed, and keeps nothing else."""

    class Changing(io.BytesIO):
        times_read = 0

        def seek(self, *place):
            self.times_read += 1
            return super().seek(*place)

        def read(self, *size):
            data = super().read(*size)
            return data if self.times_read < 2 else data[::-1]

    with pytest.raises(StoreUnavailable, match="answered"):
        store.put_upload(key, Changing(b"photo"), 5, "image/png")
    with pytest.raises(ObjectNotFound):
        store.read_start(key, 10)


def test_a_slow_store_gets_the_time_it_takes(s3, key):
    """Sending may take longer than connecting may: a pause amid a body breaks nothing off."""
    paused = []

    def pause_once(_, received):
        if received > 3 * MEGABYTE and not paused:
            paused.append(received)
            time.sleep(1.0)

    data = secrets.token_bytes(16 * MEGABYTE)
    with behind_wire(s3, pause_once, connect_timeout_seconds=0.2) as store:
        store.put_output(f"{key}/1/output.png", data, "image/png")
        assert paused
        assert store.read_output(f"{key}/1/output.png") == data
    assert s3.store.delete([f"outputs/{key}/1/"])


def test_a_connection_that_breaks_is_begun_anew(s3, key):
    """A file whose first sending was cut is sent again from its start."""
    cut = []

    def cut_once(number, received):
        if number == 0 and received > 100_000:
            cut.append(received)
            return True
        return False

    data = secrets.token_bytes(MEGABYTE)
    with behind_wire(s3, cut_once) as store:
        etag = store.put_upload(key, io.BytesIO(data), MEGABYTE, "image/png")
        assert cut
    assert s3.store.fetch_upload(key, etag) == data


def test_a_store_that_stops_reading_costs_one_timeout(s3, key, monkeypatch):
    """Who does not take the next block for long is given up, and not tried again: silence has cost enough."""
    monkeypatch.setattr(store_sending, "_SEND_TIMEOUT_SECONDS", 0.5)
    connections = set()
    over = threading.Event()

    def hold(number, received):
        connections.add(number)
        return received > MEGABYTE and over.wait(60)

    with behind_wire(s3, hold) as store:
        with pytest.raises(StoreUnavailable, match="broke off"):
            store.put_output(f"{key}/1/output.png", bytes(16 * MEGABYTE), "image/png")
        over.set()
    assert connections == {0}
