"""Redis or the store goes away under a running API: it answers 503 at once, and serves again when they are back."""

import io
import os
import signal
import time
from contextlib import contextmanager

import pytest
from PIL import Image

from server.embedded import EmbeddedValkey

PATIENCE_SECONDS = 20


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
        assert (ready.status_code, ready.json()["dependencies"]["store"]) == (503, "ok")
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
