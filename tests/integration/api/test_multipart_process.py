"""Forms as clients really send them, to an API that runs as a process: with curl, half, slowly, and large."""

import json
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest

from tests.integration.api.process_kit import spawn_api

PATIENCE_SECONDS = 30
MIB = 1024 * 1024
# Enough of a PNG for the API, which does not decode: 1000 x 1000 pixels.
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000003e8000003e80802000000c2c143b30000000049444154")


@pytest.fixture
def api(valkey, s3):
    """Give the process and the address of a running `restage api`."""
    process, port = spawn_api(valkey, s3, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_alive(url):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield psutil.Process(process.pid), url
    process.terminate()
    _, log = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0
    assert '"level": "error"' not in log, log


def is_alive(url):
    try:
        return httpx.get(f"{url}/health/live").is_success
    except httpx.TransportError:
        return False


def has_temporary_files(process):
    """Tell whether the process has files open that have no name."""
    links = []
    for name in os.listdir(f"/proc/{process.pid}/fd"):  # noqa: PTH208
        with suppress(FileNotFoundError):  # closed since
            links.append(os.readlink(f"/proc/{process.pid}/fd/{name}"))  # noqa: PTH115
    return any(link.endswith("(deleted)") for link in links)


def curl(folder, url, *options):
    """Call curl as the documents do; returns status and answer."""
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}", *options, f"{url}/v1/batches"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_curl_sends_a_batch_in_one_call(api, tmp_path):
    """Options as a person writes them work: a file of JSON or the JSON itself, typed or not, photos in any order."""
    _, url = api
    (tmp_path / "hall.jpg").write_bytes(PNG)  # the bytes count, not the name
    (tmp_path / 'Küche "2".png').write_bytes(PNG + b"2")
    batch = json.dumps({"items": [{"file": "photo1"}, {"file": "photo2", "name": "kitchen"}, {"file": "photo1"}]})
    (tmp_path / "batch.json").write_text(batch)
    hall, kitchen = ("--form", "photo1=@hall.jpg"), ("--form", 'photo2=@"Küche \\"2\\".png"')
    batch_ids = set()
    for options in (
        ("--form", "batch=<batch.json;type=application/json", *hall, *kitchen),
        (*kitchen, *hall, "--form", "batch=<batch.json"),
        (*hall, "--form", "batch=@batch.json", *kitchen),
        ("--form-string", f"batch={batch}", *hall, *kitchen),
    ):
        status, answer = curl(tmp_path, url, "--header", "Idempotency-Key: key-1", *options)
        assert status == 201, answer
        assert [job["name"] for job in answer["batch"]["jobs"]] == ["hall.jpg", "kitchen", "hall.jpg"]
        batch_ids.add(answer["batch"]["id"])
    assert len(batch_ids) == 1, "these are four ways to send the same"
    status, answer = curl(tmp_path, url, "--form", 'batch={"items": [{"file": "photo2"}]}', *kitchen)
    assert (status, answer["batch"]["jobs"][0]["name"]) == (201, 'Küche "2".png')


def test_curl_hears_of_a_refusal_while_it_sends(api, tmp_path, wait_until):
    """What is refused before its end is answered at once, and the answer arrives."""
    process, url = api
    with (tmp_path / "large.png").open("wb") as file:
        file.write(PNG)
        file.truncate(60 * MIB)
    (tmp_path / "batch.json").write_text(json.dumps({"items": [{"file": "photo1"}]}))
    photo = ("--form", "photo1=@large.png")
    status, answer = curl(tmp_path, url, "--form", "label=12 Oak St", "--form", "batch=<batch.json", *photo)
    assert (status, answer["code"]) == (422, "invalid_request")
    status, answer = curl(tmp_path, url, "--form", "batch=<batch.json", *photo)
    assert (status, answer["code"]) == (422, "nothing_accepted"), answer
    assert [error["code"] for error in answer["errors"]] == ["file_too_large"]
    wait_until(lambda: not has_temporary_files(process))


def head(url, *lines):
    return "\r\n".join(["POST /v1/batches HTTP/1.1", f"Host: {httpx.URL(url).host}", *lines, "", ""]).encode()


def connect(url):
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=PATIENCE_SECONDS)


PART = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n'


def test_a_form_that_ends_in_the_middle_leaves_nothing(api, wait_until):
    """Clients that vanish cost no file, no memory and no error, and the server serves on."""
    process, url = api
    start = head(url, "Content-Type: multipart/form-data; boundary=x", "Content-Length: 10000000") + PART
    for num_bytes in (0, 10, 3 * MIB):
        with connect(url) as connection:
            connection.sendall(start + bytes(num_bytes))
            wait_until(lambda: has_temporary_files(process))
        wait_until(lambda: not has_temporary_files(process))
    assert httpx.get(f"{url}/v1/models").status_code == 200


def test_a_form_that_announces_too_much_is_refused_before_it_comes(api):
    """Nobody needs to send gigabytes to hear that they are too many."""
    _, url = api
    form = ("Content-Type: multipart/form-data; boundary=x", "Content-Length: 99999999999999")
    with connect(url) as connection:
        connection.sendall(head(url, *form, "Expect: 100-continue"))
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"payload_too_large" in answer


def test_a_slow_form_holds_nobody_up(api):
    """While one client sends byte by byte, others are answered; in the end its form is accepted too."""
    _, url = api
    body = b'--x\r\nContent-Disposition: form-data; name="batch"\r\n\r\n{"items": [{"file": "a"}]}\r\n'
    body += PART + PNG + b"\r\n--x--"
    with connect(url) as connection:
        connection.sendall(
            head(
                url,
                "Content-Type: multipart/form-data; boundary=x",
                f"Content-Length: {len(body)}",
                "Connection: close",
            )
        )
        for place in range(len(body)):
            connection.sendall(body[place : place + 1])
            time.sleep(0.001)
            if place % 50 == 0:
                assert httpx.get(f"{url}/health/live").status_code == 200
        assert connection.recv(65_536).startswith(b"HTTP/1.1 201 ")


@contextmanager
def watched_memory(process):
    """Measure what the process holds at most while the block runs; gives a list that ends with it, in bytes."""
    seen, is_done = [process.memory_info().rss], threading.Event()

    def watch():
        while not is_done.wait(0.01):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_done.set()
        watcher.join()


def write_form(num_photos, size_bytes):
    """Write a form of photos that all differ, piece by piece."""
    yield b'--x\r\nContent-Disposition: form-data; name="batch"\r\n\r\n'
    yield json.dumps({"items": [{"file": f"p{number}"} for number in range(num_photos)]}).encode()
    for number in range(num_photos):
        name = f'name="p{number}"; filename="{number}.png"'
        yield f"\r\n--x\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + PNG + bytes([number])
        for _ in range(size_bytes // MIB):
            yield bytes(MIB)
    yield b"\r\n--x--"


def test_large_forms_go_through_little_memory(api, wait_until):
    """Twenty photos of 10 MB cost a fraction of their size in memory, while they come and while they are stored."""
    process, url = api
    idle = process.memory_info().rss
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with watched_memory(process) as peak, httpx.Client(timeout=PATIENCE_SECONDS * 2) as http:
        answer = http.post(f"{url}/v1/batches", content=write_form(20, 10 * MIB), headers=headers)
    assert answer.status_code == 201, answer.text
    assert peak[0] - idle < 50 * MIB
    wait_until(lambda: not has_temporary_files(process))
