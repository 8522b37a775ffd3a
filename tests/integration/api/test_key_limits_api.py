"""The limits of a key: whoever is held back is told why and for how long, and others notice nothing."""

import io
import json
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from server.keys import KeyStore
from tests.chaos.proxy import Proxy

PATIENCE_SECONDS = 20
PHOTO_BYTES = 500


def picture(color: Any = "red"):
    """Draw a photo; all have the same size in bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), color).save(buffer, "PNG")
    return buffer.getvalue().ljust(PHOTO_BYTES, b"\0")


@pytest.fixture
def keys(tmp_path):
    """Give a file of keys."""
    return KeyStore(tmp_path / "keys.jsonl")


@pytest.fixture
def open_with_keys(open_api, keys):
    """Let a test open an API that asks for keys."""
    return lambda **more: open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path), **more)


@pytest.fixture
def api(open_with_keys):
    """Give an API that asks for keys."""
    with open_with_keys() as running:
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def check_refused(response, code, *, at_most_seconds):
    assert response.status_code == 429, response.text
    assert response.json()["code"] == code
    assert response.headers["content-type"] == "application/problem+json"
    assert 1 <= int(response.headers["retry-after"]) <= at_most_seconds


def test_a_key_makes_so_many_requests_a_minute(api, keys, pass_time):
    """Every route counts, what else is wrong with a request too; other keys of the owner are free."""
    key = keys.add("ana", "user", requests_per_minute=3)
    headers, other = bearer(key), bearer(keys.add("ana", "user"))
    statuses = [
        api.http.get("/v1/presets", headers=headers).status_code,
        api.http.get("/v1/jobs?no=such", headers=headers).status_code,
        api.http.post("/v1/batches", content=b"{", headers=headers).status_code,
    ]
    assert statuses == [200, 422, 415]
    for path in ("/v1/presets", f"/v1/batches/{'0' * 32}/events"):
        check_refused(api.http.get(path, headers=headers), "too_many_requests", at_most_seconds=20)
    assert api.http.get("/v1/presets", headers=other).status_code == 200
    assert api.http.get("/health/live", headers=headers).status_code == 200
    assert api.redis.keys("restage:tokens:*") == [f"restage:tokens:requests:{key.split('_')[1]}"]

    pass_time(api.redis, 21)
    assert api.http.get("/v1/presets", headers=headers).status_code == 200
    check_refused(api.http.get("/v1/presets", headers=headers), "too_many_requests", at_most_seconds=20)


def test_limits_change_at_once(api, keys):
    """A limit that is set, changed or taken away counts from the next request on, and the key stays the same."""
    key = keys.add("ana", "user")
    headers, key_id = bearer(key), key.split("_")[1]

    def statuses():
        return [api.http.get("/v1/presets", headers=headers).status_code for _ in range(3)]

    assert statuses() == [200] * 3
    assert api.redis.keys("restage:tokens:*") == []
    keys.limit(key_id, requests_per_minute=2)
    assert statuses() == [200, 200, 429]
    keys.limit(key_id, requests_per_minute=None)
    assert statuses() == [200] * 3


def test_a_key_sends_so_many_bytes_a_day(api, keys, pass_time):
    """Announced photos and those of a form count together; what is refused, or comes again, counts nothing."""
    size = PHOTO_BYTES
    headers = bearer(keys.add("ana", "user", max_bytes_per_day=3 * size))

    def send_form(number, **more):
        items = [{"file": f"p{index}"} for index in range(number)]
        parts = [("batch", (None, json.dumps({"items": items}).encode(), "application/json"))]
        parts += [(f"p{index}", ("a.png", picture((index, 0, 0)))) for index in range(number)]
        return api.http.post("/v1/batches", files=parts, headers=headers | more)

    def announce(*sizes, content_type="image/png"):
        files = [{"filename": "a.png", "content_type": content_type, "size_bytes": one} for one in sizes]
        return api.http.post("/v1/uploads", json={"files": files}, headers=headers)

    assert announce(size, content_type="image/gif").status_code == 422
    assert announce(size).status_code == 201
    first = send_form(1, **{"Idempotency-Key": "one"})
    assert first.status_code == 201
    check_refused(send_form(2), "too_many_bytes", at_most_seconds=86_400 / 3 + 1)
    assert len(api.redis.keys("restage:upload:*")) == 2
    assert announce(size).status_code == 201
    check_refused(announce(1), "too_many_bytes", at_most_seconds=86_400)
    again = send_form(1, **{"Idempotency-Key": "one"})
    assert (again.status_code, again.json()) == (201, first.json())
    for response in (announce(size, size, 2 * size), send_form(4)):
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        assert f"this key may send {3 * size} bytes a day" in response.json()["detail"]
    pass_time(api.redis, 86_400 / 3 + 1)
    assert announce(size).status_code == 201


def test_a_key_has_so_many_jobs_open(api, keys):
    """New batches and retries wait while the owner's jobs fill the limit; more than it at once never goes."""
    limited, free = bearer(keys.add("ana", "user", max_open_jobs=2)), bearer(keys.add("ana", "user"))
    admin = bearer(keys.add("boss", "admin", max_open_jobs=1))
    [upload_id] = api.upload(picture(), content_type="image/png", headers=free)
    item = {"upload_id": upload_id}

    response = api.submit(item, item, item, headers=limited)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    batch = api.submit(item, {"upload_id": "0" * 32}, item, headers=limited).json()["batch"]
    check_refused(api.submit(item, headers=limited), "too_many_open_jobs", at_most_seconds=60)
    third = api.submit(item, headers=free).json()["batch"]

    path = f"/v1/batches/{batch['id']}"
    assert api.http.post(f"{path}/cancel", headers=limited).status_code == 200
    check_refused(api.http.post(f"{path}/retry", headers=limited), "too_many_open_jobs", at_most_seconds=60)
    ids = [job["id"] for one in (batch, third) for job in one["jobs"]]
    assert api.http.post(f"/v1/jobs/{ids[0]}/retry", headers=limited).status_code == 200
    response = api.http.post("/v1/jobs/retry", json={"ids": [ids[1]]}, headers=limited)
    check_refused(response, "too_many_open_jobs", at_most_seconds=60)
    for job_id in (ids[0], ids[2]):
        assert api.http.post(f"/v1/jobs/{job_id}/cancel", headers=limited).status_code == 200
    response = api.http.post("/v1/jobs/retry", json={"ids": ids}, headers=limited)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    [own_upload] = api.upload(picture(), content_type="image/png", headers=admin)
    own_id = api.submit({"upload_id": own_upload}, headers=admin).json()["batch"]["jobs"][0]["id"]
    assert api.http.post(f"/v1/jobs/{own_id}/cancel", headers=admin).status_code == 200
    assert api.submit({"upload_id": own_upload}, headers=admin).status_code == 201
    # An operator's limit is about work of its own.
    response = api.http.post("/v1/jobs/retry", json={"ids": [*ids, own_id]}, headers=admin)
    check_refused(response, "too_many_open_jobs", at_most_seconds=60)
    assert api.http.post("/v1/jobs/retry", json={"ids": ids}, headers=admin).status_code == 200


def test_without_redis_no_request_is_held_back_by_its_number(open_with_keys, keys, valkey, wait_until):
    """What needs no Redis is answered soon, whatever was used before; photos that could not be counted are refused."""
    headers = bearer(keys.add("ana", "user", requests_per_minute=1, max_bytes_per_day=1000))
    with ExitStack() as line:
        proxy = line.enter_context(Proxy(urlsplit(valkey.url).port))
        through = {"RESTAGE__REDIS__URL": f"redis://{proxy.address}/0", "RESTAGE__REDIS__TIMEOUT_SECONDS": "1"}
        with open_with_keys(**through) as api:

            def preset_statuses(count=2):
                return [api.http.get("/v1/presets", headers=headers).status_code for _ in range(count)]

            def check_open():
                started = time.monotonic()
                assert preset_statuses() == [200] * 2
                assert time.monotonic() - started < PATIENCE_SECONDS
                files = [{"filename": "a.png", "content_type": "image/png", "size_bytes": 10}]
                response = api.http.post("/v1/uploads", json={"files": files}, headers=headers)
                assert (response.status_code, response.json()["code"]) == (503, "ledger_unavailable")

            assert preset_statuses() == [200, 429]
            proxy.black_hole()
            check_open()
            proxy.heal()
            wait_until(lambda: preset_statuses() == [429] * 2, PATIENCE_SECONDS)
            line.close()
            check_open()
