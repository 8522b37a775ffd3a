"""The calls of the API as clients rely on them, one test for each, on one server with a single worker."""

import hashlib
import io
import json
import os
import random
import re
import signal
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis
from PIL import Image

from server.embedded import EmbeddedValkey, valkey_binary
from tests.conftest import need
from tests.e2e.conftest import Client, Stack, opened_stack, wait_for

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"
COUNTS = {"total", "queued", "running", "succeeded", "failed", "cancelled"}
SUMMARY = {
    *("id", "status", "label", "metadata", "priority", "created_at", "started_at", "finished_at", "expires_at"),
    *("counts", "eta_seconds", "webhook"),
}
JOB = {
    *("id", "batch_id", "index", "name", "metadata", "status", "model", "model_version", "prompt", "negative_prompt"),
    *("params", "loras", "attempts", "progress", "queue_position", "error", "created_at", "started_at", "finished_at"),
    *("timings", "input", "output", "worker"),
}
OUTPUT = {"url", "url_expires_at", "sha256", "content_type", "width", "height", "size_bytes"}


@pytest.fixture(scope="module")
def valkey_client(tmp_path_factory) -> Iterator[Any]:
    """Give a client of the module's own Valkey: `valkey` is emptied for each test."""
    need(valkey_binary)
    server = EmbeddedValkey(tmp_path_factory.mktemp("contract-valkey") / "valkey")
    server.start()
    server.wait_ready()
    with redis.Redis.from_url(server.url, decode_responses=True, socket_timeout=10) as client:
        yield client
    server.kill()


@pytest.fixture(scope="module")
def server(valkey_client, s3, weights_dir, tmp_path_factory) -> Iterator[Stack]:
    """Give an API with one worker that serves every model."""
    address = valkey_client.connection_pool.connection_kwargs
    environment = {
        "RESTAGE__REDIS__URL": f"redis://{address['host']}:{address['port']}/0",
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir),
        "RESTAGE__MODELS__ENABLED": json.dumps([QWEN, FLUX]),
        **s3.environment,
    }
    with opened_stack(environment, tmp_path_factory.mktemp("contract"), is_traced=True) as stack:
        stack.start("api")
        stack.start_worker()
        stack.wait_ready()
        yield stack


@pytest.fixture
def client(server) -> Client:
    """Give a client of the module's server."""
    return server.client


def photo() -> bytes:
    """Draw a photo that is like no other."""
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((96, 80)).convert("RGB")
    image.putpixel((0, 0), tuple(random.randbytes(3)))
    image.putpixel((1, 0), tuple(random.randbytes(3)))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cut_photo() -> bytes:
    """Return the first half of a photo: its header is right, and it cannot be decoded."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def submit(client: Client, *items: dict[str, Any], count: int = 1, **body: Any) -> dict[str, Any]:
    """Submit items, or `count` plain ones, each with a photo of its own."""
    items = items or ({},) * count
    upload_ids = client.upload({f"{index}.png": photo() for index in range(len(items))})
    named = [{"upload_id": upload_id} | item for upload_id, item in zip(upload_ids, items, strict=True)]
    return client.submit({"defaults": {"model": FLUX}, "items": named, **body})


def keep_busy(client: Client) -> dict[str, Any]:
    """Let the only worker have its hands full with a batch that takes long: one job runs, and one is made ready."""
    params = {"num_inference_steps": 100, "height": 512, "width": 512}
    batch = submit(client, {"params": params}, {"params": params}, priority="high")

    def is_busy() -> bool:
        jobs = client.batch(batch["id"])["jobs"]
        return all(job["status"] == "running" for job in jobs) and any(job["progress"] for job in jobs)

    wait_for("a worker that is busy", is_busy)
    return batch


def cancel_job(client: Client, job_id: str) -> dict[str, Any]:
    response = client.call("POST", f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 200, response.text
    return response.json()


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Compare a refusal with RFC 9457 and our code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= problem.keys()
    assert (problem["status"], problem["code"]) == (status, code)
    return problem


def test_uploads(client) -> None:
    """A form for each file, 207 where some are refused, 422 where all are; the store takes what was announced."""
    data = photo()
    digest = hashlib.sha256(data).hexdigest()
    good = {"filename": "a.png", "content_type": "image/png", "size_bytes": len(data), "sha256": digest}
    wrong = good | {"content_type": "image/gif"}
    response = client.call("POST", "/v1/uploads", json={"files": [wrong, good]})
    assert response.status_code == 207
    [form] = response.json()["uploads"]
    assert form.keys() == {"upload_id", "index", "method", "url", "fields", "expires_at", "max_size_bytes"}
    assert (form["index"], form["method"]) == (1, "POST")
    assert response.json()["errors"][0].keys() >= {"index", "code", "detail"}
    refused = httpx.post(form["url"], data=form["fields"], files={"file": data + b"x"})
    assert refused.is_client_error
    client.send(form, data)
    check_problem(client.call("POST", "/v1/uploads", json={"files": [wrong]}), 422, "nothing_accepted")
    response = client.call("POST", "/v1/uploads", json={"files": [good | {"name": "x"}]})
    problem = check_problem(response, 422, "invalid_request")
    assert problem["errors"][0].keys() >= {"location", "code", "detail"}
    assert problem["errors"][0]["location"] == "/files/0/name"


def test_submit_as_json(client) -> None:
    """201 with the batch and its address, 207 where some items are refused; the same key answers the same batch."""
    [upload_id] = client.upload({"a.png": photo()})
    body = {
        "defaults": {"model": FLUX, "room_type": "living_room", "params": {"seed": 7}},
        "items": [{"upload_id": upload_id, "name": "hall.jpg", "metadata": {"sku": "7"}}],
        "label": "12 Oak St",
        "metadata": {"mls": "123"},
        "priority": "low",
    }
    key = {"Idempotency-Key": "contract-1"}
    response = client.call("POST", "/v1/batches", json=body, headers=key)
    assert (response.status_code, response.json()["errors"]) == (201, [])
    batch = response.json()["batch"]
    assert response.headers["location"] == f"/v1/batches/{batch['id']}"
    assert batch.keys() == SUMMARY | {"jobs"}
    assert batch["counts"].keys() == COUNTS
    [job] = batch["jobs"]
    assert job.keys() >= JOB
    assert (job["name"], job["metadata"], job["params"]["seed"]) == ("hall.jpg", {"sku": "7"}, 7)
    assert job["input"].keys() == {"upload_id", "sha256", "width", "height"}
    assert job["timings"].keys() == {"queue", "fetch", "run", "store"}
    again = client.call("POST", "/v1/batches", json=body, headers=key)
    assert (again.status_code, again.json()["batch"]["id"]) == (201, batch["id"])
    other = client.call("POST", "/v1/batches", json=body | {"label": "other"}, headers=key)
    check_problem(other, 409, "idempotency_conflict")
    partly = client.call("POST", "/v1/batches", json={"items": [{"upload_id": "none"}, *body["items"]]})
    assert (partly.status_code, [one["index"] for one in partly.json()["errors"]]) == (207, [0])
    nothing = client.call("POST", "/v1/batches", json={"items": [{"upload_id": "none"}]})
    assert check_problem(nothing, 422, "nothing_accepted")["errors"][0]["location"].startswith("/items/0")
    for batch_id in (batch["id"], partly.json()["batch"]["id"]):
        client.finished(batch_id)


def test_submit_as_a_form(client) -> None:
    """Photos may come in the same request, named by the parts that hold them."""
    body = {"defaults": {"model": FLUX}, "items": [{"file": "photo1", "name": "den.png"}, {"file": "photo2"}]}
    parts = {
        "batch": (None, json.dumps(body), "application/json"),
        "photo1": ("a.png", photo(), "image/png"),
        "photo2": ("b.png", photo(), "image/png"),
    }
    response = client.call("POST", "/v1/batches", files=parts)
    assert response.status_code == 201, response.text
    end = client.finished(response.json()["batch"]["id"])
    assert [job["name"] for job in end["jobs"]] == ["den.png", "b.png"]
    assert all(client.output(job) for job in end["jobs"])


def test_list_batches(client) -> None:
    """Own batches, newest first, without jobs, by label and status, in pages."""
    batches = [submit(client, count=2, label="listed") for _ in range(3)]
    expected = [batch["id"] for batch in reversed(batches)]
    first = client.call("GET", "/v1/batches?label=listed&limit=2").json()
    rest = client.call("GET", f"/v1/batches?label=listed&limit=2&cursor={first['next_cursor']}").json()
    assert first.keys() == {"data", "next_cursor"}
    assert all(batch.keys() == SUMMARY for batch in first["data"])
    assert [batch["id"] for page in (first, rest) for batch in page["data"]] == expected
    assert rest["next_cursor"] is None
    for batch in batches:
        client.finished(batch["id"])
    finished = client.call("GET", "/v1/batches?status=finished&label=listed&limit=100").json()
    assert [batch["id"] for batch in finished["data"]] == expected
    assert client.call("GET", "/v1/batches?status=queued&label=listed").json() == {"data": [], "next_cursor": None}
    check_problem(client.call("GET", "/v1/batches?limit=101"), 422, "invalid_request")


def num_round_trips(valkey_client) -> int:
    """Count how often anybody has sent something to Redis, this question included."""
    return valkey_client.info("stats")["total_reads_processed"]


@pytest.fixture
def quiet_worker(server) -> Iterator[None]:
    """Let the worker ask Redis for nothing, as one that hangs."""
    worker = next(child for child in server.children if child.name.startswith("worker"))
    os.kill(worker.pid, signal.SIGSTOP)
    yield
    os.kill(worker.pid, signal.SIGCONT)


@pytest.mark.parametrize("count", [1, 50])
def test_read_a_batch_and_a_job(client, valkey_client, quiet_worker, count) -> None:
    """Reading costs one round trip to Redis, whatever the size."""
    [upload_id] = client.upload({"a.png": photo()})
    batch = client.submit({"defaults": {"model": FLUX}, "items": [{"upload_id": upload_id}] * count})
    client.call("POST", f"/v1/batches/{batch['id']}/cancel")
    end = client.finished(batch["id"])
    assert len(end["jobs"]) == count
    for path in (f"/v1/batches/{batch['id']}", f"/v1/jobs/{batch['jobs'][-1]['id']}"):
        counted: list[int] = []
        for _ in range(25):  # the server's other work is counted with some of them, but not with all
            before = num_round_trips(valkey_client)
            assert client.call("GET", path).status_code == 200
            counted.append(num_round_trips(valkey_client) - before - 1)
        assert min(counted) == 1
    check_problem(client.call("GET", f"/v1/batches/{'0' * 32}"), 404, "not_found")


def test_list_jobs_and_retry_many(client) -> None:
    """Failed jobs of all batches are listed, and queued again by their ids; each that cannot be is named."""
    [cut_id] = client.upload({"cut.jpg": cut_photo()})
    batch = client.submit({"defaults": {"model": FLUX}, "items": [{"upload_id": cut_id}]})
    done = submit(client)
    assert client.finished(batch["id"])["counts"]["failed"] == 1
    client.finished(done["id"])
    page = client.call("GET", f"/v1/jobs?status=failed&model={FLUX}").json()
    assert page.keys() == {"data", "next_cursor"}
    [failed] = page["data"]
    assert failed.keys() >= JOB
    assert failed["error"].keys() == {"code", "detail"}
    assert (failed["id"], failed["error"]["code"]) == (batch["jobs"][0]["id"], "invalid_input")
    ids = [failed["id"], done["jobs"][0]["id"], "none"]
    response = client.call("POST", "/v1/jobs/retry", json={"ids": ids})
    assert response.status_code == 207
    assert [job["id"] for job in response.json()["data"]] == ids[:1]
    assert [(one["index"], one["code"]) for one in response.json()["errors"]] == [(1, "conflict"), (2, "not_found")]
    [again] = client.finished(batch["id"])["jobs"]
    assert (again["status"], again["attempts"]) == ("failed", failed["attempts"] + 1)
    client.call("DELETE", f"/v1/batches/{batch['id']}")


def test_events(client) -> None:
    """A snapshot, each change with an id, progress without one, and the end; an id goes on behind itself."""
    batch = submit(client, {"params": {"num_inference_steps": 20}})
    path = f"{client.http.base_url}/v1/batches/{batch['id']}/events"
    events: list[dict[str, str]] = [{}]
    with httpx.stream("GET", path, timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                events[-1][name] = value
            else:
                events.append({})
    told = [one for one in events if "data" in one]
    assert [one["event"] for one in (told[0], told[-1])] == ["snapshot", "batch.finished"]
    assert json.loads(told[0]["data"]).keys() == SUMMARY | {"jobs"}
    assert json.loads(told[-1]["data"]).keys() == SUMMARY
    kinds = [one["event"] for one in told[1:-1]]
    assert kinds[-1] == "job.succeeded"
    assert set(kinds) <= {"job.started", "job.progress", "job.succeeded"}
    for one in told[1:-1]:
        assert ("id" in one) == (one["event"] != "job.progress")
        assert json.loads(one["data"]).keys() == {"job_id", "index", "status", "progress", "attempts", "error"}
    rest = client.call("GET", path, headers={"Last-Event-ID": told[-2]["id"]})
    assert re.findall(r"^event: (.*)$", rest.text, re.MULTILINE) == ["batch.finished"]
    unknown = client.call("GET", path, headers={"Last-Event-ID": "1-1"})
    assert re.findall(r"^event: (.*)$", unknown.text, re.MULTILINE) == ["snapshot", "batch.finished"]
    assert client.call("GET", path, headers={"Last-Event-ID": told[-1]["id"]}).status_code == 204


def test_cancel_and_retry(client) -> None:
    """Queued jobs end at once, a running one before its next step, a finished one is refused; all may come again."""
    long_batch = keep_busy(client)
    batch = submit(client, count=2)
    first, second = (job["id"] for job in batch["jobs"])
    assert cancel_job(client, first)["status"] == "cancelled"
    check_problem(client.call("POST", f"/v1/jobs/{first}/cancel"), 409, "conflict")
    response = client.call("POST", f"/v1/batches/{batch['id']}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "finished")
    assert response.json()["counts"]["cancelled"] == 2
    check_problem(client.call("POST", f"/v1/batches/{batch['id']}/cancel"), 409, "conflict")

    running_id = long_batch["jobs"][0]["id"]
    assert cancel_job(client, running_id)["status"] in {"running", "cancelled"}
    response = client.call("POST", f"/v1/batches/{long_batch['id']}/cancel")
    assert response.status_code == 200
    end = client.finished(long_batch["id"])
    assert [(job["status"], job["output"]) for job in end["jobs"]] == [("cancelled", None)] * 2
    steps = end["jobs"][0]["progress"]
    assert steps is None or steps["step"] < 100

    # A worker with a free hand would have it before the answer is read.
    long_batch = keep_busy(client)
    assert client.call("POST", f"/v1/jobs/{first}/retry").json()["status"] == "queued"
    check_problem(client.call("POST", f"/v1/jobs/{first}/retry"), 409, "conflict")
    response = client.call("POST", f"/v1/batches/{batch['id']}/retry")
    assert response.status_code == 200
    assert [job["id"] for job in response.json()["jobs"]] == [first, second]
    assert client.call("POST", f"/v1/batches/{long_batch['id']}/cancel").status_code == 200
    end = client.finished(batch["id"])
    assert end["counts"]["succeeded"] == 2
    check_problem(client.call("POST", f"/v1/batches/{batch['id']}/retry"), 409, "conflict")
    check_problem(client.call("POST", f"/v1/batches/{end['id']}/cancel"), 409, "conflict")


def test_archive_and_output(client) -> None:
    """One zip has all results and the record; each job's own address leads to its result."""
    batch = submit(client, {"name": "hall.jpg", "output": {"format": "png"}}, {"name": "Küche.jpg"})
    check_problem(client.call("GET", f"/v1/jobs/{batch['jobs'][1]['id']}/output"), 409, "no_output")
    end = client.finished(batch["id"])
    response = client.call("GET", f"/v1/batches/{batch['id']}/archive")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == ["001-hall.png", "002-Küche.webp", "manifest.json"]
        results = [archive.read(name) for name in archive.namelist()[:2]]
        assert json.loads(archive.read("manifest.json"))["jobs"][0]["prompt"] == end["jobs"][0]["prompt"]
    for job, result in zip(end["jobs"], results, strict=True):
        assert job["output"].keys() == OUTPUT
        assert client.output(job) == result
        redirect = client.call("GET", f"/v1/jobs/{job['id']}/output")
        assert redirect.status_code == 307
        assert httpx.get(redirect.headers["location"]).content == result


def test_delete(client) -> None:
    """An open batch is refused; of a finished one nothing can be reached any more, its results neither."""
    open_id = keep_busy(client)["id"]
    check_problem(client.call("DELETE", f"/v1/batches/{open_id}"), 409, "conflict")
    client.call("POST", f"/v1/batches/{open_id}/cancel")
    batch = submit(client)
    [job] = client.finished(batch["id"])["jobs"]
    client.output(job)
    response = client.call("DELETE", f"/v1/batches/{batch['id']}")
    assert (response.status_code, response.content) == (204, b"")
    check_problem(client.call("DELETE", f"/v1/batches/{batch['id']}"), 404, "not_found")
    for path in (f"/v1/batches/{batch['id']}", f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/output"):
        check_problem(client.call("GET", path), 404, "not_found")
    wait_for("the result to be gone", lambda: httpx.get(job["output"]["url"]).status_code == 404, timeout_seconds=20)
    assert client.call("DELETE", f"/v1/batches/{client.finished(open_id)['id']}").status_code == 204


def test_nothing_failed_on_the_way(server) -> None:
    """Over all of these calls the server has answered nothing with 500, and neither process has logged an error."""
    assert [status for status in server.client.received if status >= 500] == []
    assert all(child.is_running for child in server.children)
    logs = server.logs()
    assert "[error" not in logs
    assert "Traceback" not in logs
