"""The store is in trouble under a running API: what does not need it is answered as ever, what does with 503."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server.store import Store
from tests.chaos.proxy import Proxy
from tests.integration.api.conftest import picture

# What the API takes for an answer that needs no store, ten times and more.
PATIENCE_SECONDS = 5.0
SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nRetry-After: 600\r\nConnection: close\r\n"
    b"Content-Length: 42\r\n\r\n<Error><Code>SlowDown</Code></Error>      "
)
RESET = "reset in the answer's midst"
FAULTS = {
    "refused": lambda proxy: setattr(proxy, "target_port", 1),
    "silence": lambda proxy: proxy.black_hole(),
    "a byte now and then": lambda proxy: proxy.slow(50),
    "503": lambda proxy: proxy.answer_instead(b" HTTP/1.1", answer=SLOW_DOWN, times=10_000),
    RESET: lambda proxy: proxy.lose_replies(b" HTTP/1.1", after_bytes=200, times=10_000),
}


@pytest.fixture
def proxy(s3):
    """Give a proxy before the store."""
    with Proxy(s3.server.ports[0]) as started:
        yield started


@pytest.fixture
def api(open_live_api, proxy, s3):
    """Give an API that reaches the store through the proxy; its clients reach it directly."""
    settings = {
        "ENDPOINT": proxy.address,
        "PUBLIC_ENDPOINT": s3.server.endpoint,
        "READ_TIMEOUT_SECONDS": "0.5",
        "TRANSFER_TIMEOUT_SECONDS": "1",
        "POOL_SIZE": "8",
    }
    with open_live_api(**{f"RESTAGE__STORE__{name}": value for name, value in settings.items()}) as running:
        yield running


def check_unavailable(response):
    assert response.status_code == 503, response.text
    assert response.json()["code"] == "store_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert "X-Amz" not in response.text


def check_what_needs_no_store(api, batch):
    """Every such call is answered, and soon, while others wait for the store."""
    started = time.monotonic()
    for path in ("/health/live", "/v1/batches", "/v1/jobs", "/v1/models", f"/v1/batches/{batch['id']}"):
        assert api.http.get(path).status_code == 200, path
    assert api.http.get(f"/v1/jobs/{batch['jobs'][0]['id']}/output").status_code == 307
    assert api.announce(picture())[0]["url"]
    with api.http.stream("GET", f"/v1/batches/{batch['id']}/events") as stream:
        assert "event: snapshot" in stream.iter_lines()
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_the_api_answers_through_every_trouble_with_the_store(api, proxy, s3):
    """Batches, lists, events, forms and URLs as ever; new batches and archives 503; and all again once it is over."""
    upload_ids = api.upload(*[picture()] * 4)
    items = [{"upload_id": upload_id} for upload_id in upload_ids]
    batch = api.accept(items[0])
    api.run_next()
    forms = {"batch": (None, '{"items": [{"file": "hall"}]}', "application/json"), "hall": ("h.jpg", picture("PNG"))}
    for name, spoil in FAULTS.items():
        spoil(proxy)
        proxy.cut()  # a connection that waits for work would be refused or slow at its second call only
        with httpx.Client(base_url=api.http.base_url, timeout=60) as other, ThreadPoolExecutor() as threads:
            started = time.monotonic()
            waiting = [
                threads.submit(other.post, "/v1/batches", json={"items": items}),
                threads.submit(other.post, "/v1/batches", files=forms),
                threads.submit(other.get, f"/v1/batches/{batch['id']}/archive"),
            ]
            is_ready = threads.submit(other.get, "/health/ready")
            check_what_needs_no_store(api, batch)
            for answer in waiting:
                check_unavailable(answer.result())
            # That the buckets are there is told by a status alone, which a line that breaks off later lets through.
            assert is_ready.result().status_code == (200 if name == RESET else 503), name
            assert is_ready.result().json()["dependencies"]["redis"] == "ok"
            assert time.monotonic() - started < 60, name
        proxy.heal()
        proxy.target_port = s3.server.ports[0]
        deadline = time.monotonic() + PATIENCE_SECONDS * 4
        while api.submit(*items).status_code != 201:
            assert time.monotonic() < deadline, name
    assert api.http.get(f"/v1/batches/{batch['id']}/archive").status_code == 200


def test_archive_of_changed_bytes_is_not_told_as_whole(api, s3):
    """A result that is not what the worker wrote breaks the archive off, or is refused before it begins."""
    [upload_id] = api.upload(picture())
    batch = api.accept({"upload_id": upload_id})
    job = api.run_next()
    with contextlib.closing(Store(s3.settings)) as store:
        store.put_output(f"{job.id}/1/output.webp", b"other", "image/webp")
    check_unavailable(api.http.get(f"/v1/batches/{batch['id']}/archive"))
