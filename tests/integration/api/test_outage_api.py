"""Redis or the store goes away under a running API: it answers 503 at once, and serves again when they are back."""

import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from server.embedded import EmbeddedValkey
from tests.chaos.proxy import Proxy

PATIENCE_SECONDS = 20
ANNOUNCED = {"filename": "a.png", "content_type": "image/png", "size_bytes": 10}


@contextmanager
def silent(pid):
    """Let a process answer nothing for a while, as a server behind a broken line does."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def check_unavailable(response, code):
    assert response.status_code == 503, response.text
    assert response.json()["code"] == code
    assert int(response.headers["retry-after"]) > 0


def wait_for_status(api, path, status):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (response := api.http.get(path)).status_code != status:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    return response


@pytest.fixture
def own_valkey(tmp_path):
    """Give a Valkey that a test may kill and start again."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    server.wait_ready()
    yield server
    server.kill()


def test_redis_may_die_and_come_back(open_api, own_valkey, capfd):
    """While Redis is away every route that needs it answers 503; then all goes on, and the sweep too."""
    with open_api(RESTAGE__REDIS__URL=own_valkey.url, RESTAGE__SWEEP__INTERVAL_SECONDS="0.1") as api:
        [upload_id] = api.upload(picture())
        batch = api.accept({"upload_id": upload_id})
        own_valkey.kill()
        started = time.monotonic()
        check_unavailable(api.http.get(f"/v1/batches/{batch['id']}"), "ledger_unavailable")
        check_unavailable(api.submit({"upload_id": upload_id}), "ledger_unavailable")
        check_unavailable(api.http.post(f"/v1/batches/{batch['id']}/cancel"), "ledger_unavailable")
        check_unavailable(api.http.get("/v1/models"), "ledger_unavailable")
        ready = api.http.get("/health/ready")
        check_unavailable(ready, "ledger_unavailable")
        assert ready.json()["dependencies"]["store"] == "ok"
        assert ready.json()["dependencies"]["redis"] != "ok"
        assert api.http.get("/health/live").status_code == 200
        assert time.monotonic() - started < PATIENCE_SECONDS
        own_valkey.start()
        own_valkey.wait_ready()
        wait_for_status(api, "/health/ready", 200)
        assert api.http.get(f"/v1/batches/{batch['id']}").json() == batch
        time.sleep(0.5)
    log = "".join(capfd.readouterr())
    assert log.count("sweep.failed") == 1
    assert log.count("sweep.recovered") == 1


def test_the_sweep_goes_on_after_a_mistake(open_api, capfd, wait_until):
    """What nobody expected is logged with its traceback, once, and does not end the sweeping."""
    with open_api(RESTAGE__SWEEP__INTERVAL_SECONDS="0.05") as api:
        log = []

        def log_has(text):
            log.extend(capfd.readouterr())
            return text in "".join(log)

        api.redis.set("restage:swept", "not a hash")
        wait_until(lambda: log_has("sweep.failed"))
        time.sleep(0.3)
        api.redis.delete("restage:swept")
        wait_until(lambda: log_has("sweep.recovered"))
    assert "".join(log).count("sweep.failed") == 1
    assert "WRONGTYPE" in "".join(log)


def test_a_silent_redis_costs_its_timeout_and_no_more(open_api, own_valkey):
    """A Redis that does not answer is given up after the client's timeout."""
    with open_api(RESTAGE__REDIS__URL=own_valkey.url, RESTAGE__REDIS__TIMEOUT_SECONDS="0.2") as api:
        api.http.get("/v1/models")
        with silent(own_valkey.child.pid):
            started = time.monotonic()
            check_unavailable(api.http.get("/v1/models"), "ledger_unavailable")
            assert time.monotonic() - started < 5
        wait_for_status(api, "/v1/models", 200)


def timed(call):
    """Return the answer to a call, and how long it took in seconds."""
    began = time.monotonic()
    return call(), time.monotonic() - began


def test_a_black_hole_before_redis_holds_nothing_up(open_live_api, valkey, wait_until):
    """More calls than there are connections are each answered 503 in time; nothing else waits for them, then or later.

    A submission among them that is repeated afterwards is one batch, and no thread is left waiting.
    """
    num_threads = threading.active_count()
    with (
        Proxy(valkey.server.ports[0]) as proxy,
        open_live_api(RESTAGE__REDIS__URL=f"redis://{proxy.address}/0", RESTAGE__REDIS__TIMEOUT_SECONDS="1") as api,
        httpx.Client(base_url=api.http.base_url) as live,
        ThreadPoolExecutor(80) as threads,
    ):
        upload_ids = api.upload(*[picture()] * 16)
        batch = api.accept({"upload_id": upload_ids[0]})
        items = [{"upload_id": upload_id} for upload_id in upload_ids]
        key = {"Idempotency-Key": "once"}
        calls = [
            lambda: api.http.get(f"/v1/batches/{batch['id']}"),
            lambda: api.http.get("/v1/models"),
            lambda: api.http.post("/v1/uploads", json={"files": [ANNOUNCED]}),
            lambda: api.submit(*items, headers=key),
        ]
        proxy.black_hole()
        asked = [threads.submit(timed, calls[number % len(calls)]) for number in range(80)]
        lags = []
        while not all(one.done() for one in asked):
            response, lag = timed(lambda: live.get("/health/live"))
            assert response.status_code == 200
            lags.append(lag)
            time.sleep(0.05)
        proxy.heal()
        for response, seconds in (one.result() for one in asked):
            check_unavailable(response, "ledger_unavailable")
            assert seconds < 10 * 2  # one timeout for a connection of the pool, and one for the answer
        print(f"longest {max(one.result()[1] for one in asked):.2f} s, largest lag {max(lags):.3f} s")  # noqa: T201
        assert max(lags) < 10 * 0.1
        wait_for_status(api, f"/v1/batches/{batch['id']}", 200)
        again = [api.submit(*items, headers=key) for _ in range(2)]
        assert [response.status_code for response in again] == [201, 201]
        assert again[0].json()["batch"]["id"] == again[1].json()["batch"]["id"]
        assert len([name for name in api.redis.keys("restage:batch:*") if name.count(":") == 2]) == 2
    wait_until(lambda: threading.active_count() <= num_threads)


def test_a_full_redis_takes_no_work_and_shows_what_there_is(open_api, valkey):
    """With no memory left submissions and forms are 503; reading, cancelling and ending jobs go on; then all does."""
    admin = valkey.client(decode_responses=True)
    before = admin.config_get("maxmemory")["maxmemory"]
    with open_api() as api:
        [upload_id] = api.upload(picture())
        batch, other = api.accept({"upload_id": upload_id}), api.accept({"upload_id": upload_id})
        admin.config_set("maxmemory", 1)
        try:
            check_unavailable(api.submit({"upload_id": upload_id}), "ledger_full")
            check_unavailable(api.http.post("/v1/uploads", json={"files": [ANNOUNCED]}), "ledger_full")
            api.run_next()
            assert api.http.get(f"/v1/batches/{batch['id']}").json()["counts"]["succeeded"] == 1
            assert api.http.post(f"/v1/batches/{other['id']}/cancel").json()["status"] == "finished"
        finally:
            admin.config_set("maxmemory", before)
        api.accept({"upload_id": upload_id})


def test_a_silent_store_costs_its_timeout_and_no_more(open_api, s3):
    """A store that does not answer makes submissions 503, however many photos they name; reading goes on."""
    with open_api(RESTAGE__STORE__READ_TIMEOUT_SECONDS="1", RESTAGE__STORE__POOL_SIZE="2") as api:
        upload_ids = api.upload(*[picture()] * 8)
        batch = api.accept({"upload_id": upload_ids[0]})
        with silent(s3.server.child.pid):
            started = time.monotonic()
            response = api.submit(*[{"upload_id": upload_id} for upload_id in upload_ids])
            assert time.monotonic() - started < 5
            check_unavailable(response, "store_unavailable")
            assert api.http.get(f"/v1/batches/{batch['id']}").status_code == 200
            assert api.http.get("/health/ready").json()["dependencies"]["redis"] == "ok"
        wait_for_status(api, "/health/ready", 200)
        assert api.submit(*[{"upload_id": upload_id} for upload_id in upload_ids]).status_code == 201
