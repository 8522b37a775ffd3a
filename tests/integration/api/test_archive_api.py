"""The zip of a batch: what it holds, that it opens everywhere or not at all, and what it costs."""

import hashlib
import io
import json
import os
import secrets
import signal
import struct
import time
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import httpx
import psutil
import pytest
from PIL import Image

from server.jobs import Job, JobOutput

QWEN = "tiny-qwen-image-edit-2511"
DAY_SECONDS = 24 * 3600
MIB = 2**20


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def accept(api, *names):
    """Submit a batch of one photo under several names; None is no name."""
    [upload_id] = api.upload(picture())
    return api.accept(*[{"upload_id": upload_id} | ({} if name is None else {"name": name}) for name in names])


def run_all(api, batch):
    """Let each job of a batch have a result of its own; returns them in order."""
    results = {}
    for _ in batch["jobs"]:
        data = secrets.token_bytes(1000)
        results[api.run_next(data).id] = data
    return [results[job["id"]] for job in batch["jobs"]]


def fetch(api, batch):
    return api.http.get(f"/v1/batches/{batch['id']}/archive")


def opened(response):
    assert response.status_code == 200, response.text
    return zipfile.ZipFile(io.BytesIO(response.content))


def receive(api, batch, received):
    """Add what comes of an archive to `received`, until it breaks off."""
    with api.http.stream("GET", f"/v1/batches/{batch['id']}/archive") as response:
        assert response.status_code == 200
        for chunk in response.iter_raw():
            received += chunk


def replace_result(api, job_id, data):
    key = json.loads(api.redis.hget(f"restage:job:{job_id}", "output"))["key"]
    api.store.put_output(key, data, "image/webp")


@contextmanager
def silent(pid):
    """Let a process answer nothing for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_archive_holds_each_result_and_the_record(api):
    """Every entry is the very result, dated when the batch ended; the manifest is the batch without URLs."""
    batch = accept(api, "hall.jpg", "Küche, 1. OG.png", None)
    results = run_all(api, batch)
    response = fetch(api, batch)
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == f'attachment; filename="restage-{batch["id"]}.zip"'
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    read = api.http.get(f"/v1/batches/{batch['id']}").json()
    with opened(response) as archive:
        assert archive.testzip() is None
        third = f"003-{batch['jobs'][2]['id']}.webp"
        assert archive.namelist() == ["001-hall.webp", "002-Küche, 1. OG.webp", third, "manifest.json"]
        assert [archive.read(name) for name in archive.namelist()[:3]] == results
        ended = datetime.fromisoformat(read["finished_at"]).astimezone(UTC)
        for entry in archive.infolist():
            assert abs((datetime(*entry.date_time, tzinfo=UTC) - ended).total_seconds()) <= 2
            assert entry.external_attr >> 16 & 0o777 == 0o644
        manifest = json.loads(archive.read("manifest.json"))
        files = [job["output"].pop("file") for job in manifest["jobs"]]
        assert files == archive.namelist()[:3]
        for job in read["jobs"]:
            del job["output"]["url"], job["output"]["url_expires_at"]
        assert manifest == read
        assert "X-Amz" not in archive.read("manifest.json").decode()


def test_names_of_entries_are_plain_and_differ(api, tmp_path):
    """Whatever a photo is called, its entry is a file of its own in the folder that the archive is unpacked into."""
    names = [
        "hall.jpg",
        "hall.jpg",
        "hall.png",
        None,
        "",
        " ",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\Users\\ana\\hall.jpg",
        "\\\\server\\share\\hall.jpg",
        "a/b/",
        ".hidden",
        "con.jpg",
        'what<is>this:"|?*.jpg',
        "two\nlines\tand a tab.jpg",
        "\u202egpj.exe",
        "x" * 255,
        "🛋" * 255,
        "manifest.json",
        "002-hall.webp",
        "部屋.webp",
    ]
    batch = accept(api, *names)
    results = run_all(api, batch)
    with opened(fetch(api, batch)) as archive:
        entries = archive.namelist()[:-1]
        assert len({name.casefold() for name in entries}) == len(names)
        for index, name in enumerate(entries):
            assert name.startswith(f"{index + 1:03d}-")
            assert name.endswith(".webp")
            assert len(name.encode()) <= 255
            assert name.isprintable()
            assert not set('<>:"/\\|?*\u202e') & set(name)
        archive.extractall(tmp_path / "unpacked")
    unpacked = sorted((tmp_path / "unpacked").rglob("*"))
    assert [path.name for path in unpacked] == sorted([*entries, "manifest.json"])
    assert [(tmp_path / "unpacked" / name).read_bytes() for name in entries] == results
    assert entries[:3] == ["001-hall.webp", "002-hall.webp", "003-hall.webp"]
    assert entries[8:11] == ["009-passwd.webp", "010-passwd.webp", "011-hall.webp"]
    assert entries[-1] == "023-部屋.webp"


def test_an_archive_can_be_unpacked_while_it_arrives(api):
    """Each entry says its size before its data, so that a reader needs no list from the end."""
    batch = accept(api, "a.jpg", "b.jpg")
    results = run_all(api, batch)
    content = fetch(api, batch).content
    found, position = [], 0
    while content[position : position + 4] == b"PK\x03\x04":
        flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack_from(
            "<HHHHIIIHH", content, position + 6
        )
        assert (flags & 0x08, method, packed) == (0, zipfile.ZIP_STORED, size)
        begin = position + 30 + name_length + extra_length
        data = content[begin : begin + size]
        assert zlib.crc32(data) == crc
        found.append(data)
        position = begin + size
    assert found[:2] == results
    assert json.loads(found[2])["id"] == batch["id"]


def test_a_batch_that_is_not_done_gives_what_there_is(api):
    """Results that are there are in the archive, each under its place; the manifest says how the others stand."""
    batch = accept(api, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    with opened(fetch(api, batch)) as archive:
        assert archive.namelist() == ["manifest.json"]
        assert [job["output"] for job in json.loads(archive.read("manifest.json"))["jobs"]] == [None] * 4
    api.fail_next()
    api.run_next(b"second")
    api.worker.claim([QWEN], num_held=0)
    with opened(fetch(api, batch)) as archive:
        assert archive.namelist() == ["002-b.webp", "manifest.json"]
        assert archive.read("002-b.webp") == b"second"
        jobs = json.loads(archive.read("manifest.json"))["jobs"]
        assert [job["status"] for job in jobs] == ["failed", "succeeded", "running", "queued"]
        assert jobs[0]["error"]["code"] == "invalid_input"


def test_a_batch_without_any_result_is_an_archive_of_its_record(api):
    """Where everything was cancelled there is still a manifest to be had."""
    batch = accept(api, "a.jpg")
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    with opened(fetch(api, batch)) as archive:
        assert json.loads(archive.read("manifest.json"))["counts"]["cancelled"] == 1


def test_results_that_were_removed_are_gone(api, pass_time, wait_until):
    """After the results' time, and where the store has lost one, the answer is 410 and no half an archive."""
    batch, lost = accept(api, "a.jpg", "b.jpg"), accept(api, "c.jpg")
    run_all(api, batch)
    job = api.run_next()
    api.store.delete_output(json.loads(api.redis.hget(f"restage:job:{job.id}", "output"))["key"])
    response = fetch(api, lost)
    assert (response.status_code, response.json()["code"]) == (410, "output_expired")
    pass_time(api.redis, 8 * DAY_SECONDS)
    wait_until(lambda: not api.redis.hexists(f"restage:job:{batch['jobs'][1]['id']}", "output"))
    response = fetch(api, batch)
    assert (response.status_code, response.json()["code"]) == (410, "output_expired")


def test_wrong_bytes_are_never_handed_out(open_live_api, capfd):
    """Where the store gives other bytes than the worker wrote, the answer is 503, or ends before its end."""
    with open_live_api() as api:
        batch = accept(api, "a.jpg", "b.jpg", "c.jpg")
        results = run_all(api, batch)
        first, second, _ = (job["id"] for job in batch["jobs"])
        replace_result(api, first, b"other bytes")
        response = fetch(api, batch)
        assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
        assert int(response.headers["retry-after"]) > 0

        replace_result(api, first, results[0])
        replace_result(api, second, results[1][:-1])
        received = bytearray()
        with pytest.raises(httpx.RemoteProtocolError):
            receive(api, batch, received)
        assert results[0] in received
        assert results[1][:-1] not in received
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(received))
        assert "archive.broken_off" in "".join(capfd.readouterr())

        replace_result(api, second, results[1])
        with opened(fetch(api, batch)) as archive:
            assert [archive.read(name) for name in archive.namelist()[:3]] == results


def test_a_silent_store_costs_its_timeout_and_no_more(open_api, s3):
    """A store that does not answer is told as 503 after its timeout; then archives are to be had again."""
    with open_api(RESTAGE__STORE__READ_TIMEOUT_SECONDS="0.5") as api:
        batch = accept(api, "a.jpg")
        run_all(api, batch)
        with silent(s3.server.child.pid):
            started = time.monotonic()
            response = fetch(api, batch)
            assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
            assert time.monotonic() - started < 5
        assert fetch(api, batch).status_code == 200


def finish_with(api, batch, data):
    """Let every job of a batch have the same large object as its result."""
    key = f"{batch['id']}/large.webp"
    api.store.put_output(key, data, "image/webp")
    output = JobOutput(key, hashlib.sha256(data).hexdigest(), "image/webp", 96, 128, len(data))
    for _ in batch["jobs"]:
        job = api.worker.claim([QWEN], num_held=0)
        assert isinstance(job, Job)
        answer = api.worker.commit(
            job.id, job.fence, output=replace(output), timings={}, params=job.params, inputs=job.inputs, speeds={}
        )
        assert answer == "ok"


def test_an_archive_costs_the_memory_of_one_image(open_live_api):
    """50 results of 4 MiB go out while this process, client and server in one, grows by less than 40 MiB."""
    with open_live_api() as api:
        batch = accept(api, *[None] * 50)
        data = secrets.token_bytes(4 * MIB)
        finish_with(api, batch, data)
        process = psutil.Process()
        before = process.memory_info().rss
        most = num_received = 0
        with api.http.stream("GET", f"/v1/batches/{batch['id']}/archive") as response:
            for number, chunk in enumerate(response.iter_raw()):
                if number == 0:
                    time.sleep(0.5)  # a client that is slow does not let the server collect
                num_received += len(chunk)
                most = max(most, process.memory_info().rss)
        assert num_received > 50 * len(data)
        assert most - before < 40 * MIB


def test_a_client_that_leaves_ends_its_archive(open_live_api, wait_until):
    """What a download held is given back when its client goes away in the middle; until then no other one fits."""
    with open_live_api(RESTAGE__STORE__POOL_SIZE="1", RESTAGE__SERVER__MAX_STREAMS="11") as api:
        batch = accept(api, *[None] * 10)
        finish_with(api, batch, secrets.token_bytes(4 * MIB))

        def come_and_leave():
            with api.http.stream("GET", f"/v1/batches/{batch['id']}/archive") as response:
                if response.status_code == 503:
                    return False
                pieces = response.iter_raw()  # the download ends with it
                next(pieces)
                beyond = fetch(api, batch)
                assert (beyond.status_code, beyond.json()["code"]) == (503, "too_many_streams")
                assert "1 archive(s) are open" in beyond.json()["detail"]
            return True

        for _ in range(3):
            wait_until(come_and_leave)
        wait_until(lambda: fetch(api, batch).status_code == 200)
        wait_until(lambda: api.services.store_threads.borrowed_tokens == 0)
        with opened(fetch(api, batch)) as archive:
            assert len(archive.namelist()) == 11
