"""What is refused for a while answers 503 with its own code and `Retry-After`, and nothing of it is kept."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.errors import DependencyError
from tests.integration.api.conftest import FLUX, QWEN, picture

GRACE_SECONDS = 60


def check_refused(response: Any, code: str) -> dict[str, Any]:
    """Expect a problem document that says when to come back; returns it."""
    assert (response.status_code, response.json()["code"]) == (503, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) > 0
    return response.json()


@pytest.fixture
def api(open_api: Any, pass_time: Any) -> Iterator[Any]:
    """Give an API whose first model has a worker, and whose others have had time enough to get one."""
    with open_api(RESTAGE__ADMISSION__WORKER_GRACE_SECONDS=str(GRACE_SECONDS)) as running:
        pass_time(running.redis, 2 * GRACE_SECONDS)
        running.announce_worker()
        yield running


def test_items_of_a_model_that_nobody_serves_are_refused(api: Any) -> None:
    """The others go on; each refusal names the model where the client wrote it."""
    [upload_id] = api.upload(picture())
    response = api.submit(
        {"upload_id": upload_id},
        {"upload_id": upload_id, "model": QWEN},
        {"upload_id": upload_id},
        defaults={"model": FLUX},
    )
    assert response.status_code == 207, response.text
    assert [job["model"] for job in response.json()["batch"]["jobs"]] == [QWEN]
    errors = response.json()["errors"]
    assert [(one["index"], one["code"], one["location"]) for one in errors] == [
        (0, "model_not_served", "/defaults/model"),
        (2, "model_not_served", "/defaults/model"),
    ]
    assert f"no worker was ready for model {FLUX} in the last 60 s" in errors[0]["detail"]


def test_a_batch_that_only_waits_for_workers_is_refused_whole(api: Any) -> None:
    """503, also where other items are wrong; the same idempotency key is good again once a worker is there."""
    [upload_id] = api.upload(picture())
    good, wrong, key = {"upload_id": upload_id}, {"upload_id": "0" * 32}, {"Idempotency-Key": "one"}
    told = check_refused(api.submit(good, wrong, headers=key, defaults={"model": FLUX}), "model_not_served")
    assert [one["code"] for one in told["errors"]] == ["model_not_served", "upload_not_found"]
    assert api.http.get("/v1/batches").json()["data"] == []
    # What can never be done is not worth coming back for.
    assert api.submit(wrong, defaults={"model": FLUX}).status_code == 422

    api.announce_worker(model=FLUX)
    accepted = api.submit(good, wrong, headers=key, defaults={"model": FLUX})
    assert accepted.status_code == 207
    assert api.submit(good, wrong, headers=key, defaults={"model": FLUX}).json() == accepted.json()


def test_a_fresh_api_accepts_while_its_first_worker_loads(open_api: Any) -> None:
    """Nobody has served anything yet: what comes now waits for the first worker."""
    with open_api(RESTAGE__ADMISSION__WORKER_GRACE_SECONDS=str(GRACE_SECONDS)) as api:
        [upload_id] = api.upload(picture())
        api.accept({"upload_id": upload_id, "model": FLUX})


def test_a_redis_without_memory_to_spare_takes_no_new_jobs(api: Any) -> None:
    """Beyond the share batches are refused, but neither forms nor what is done with open jobs."""
    [upload_id] = api.upload(picture())
    batch = api.accept({"upload_id": upload_id})
    before = api.redis.config_get("maxmemory")["maxmemory"]
    try:
        api.redis.config_set("maxmemory", int(api.redis.info("memory")["used_memory"] / 0.9))
        told = check_refused(api.submit({"upload_id": upload_id}), "ledger_full")
        assert "new jobs are taken up to 80%" in told["detail"]
        assert api.announce(picture())
        assert api.http.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] == "finished"
    finally:
        api.redis.config_set("maxmemory", before)
    assert len(api.http.get("/v1/batches").json()["data"]) == 1
    api.accept({"upload_id": upload_id})


def test_every_reason_to_come_back_has_a_code_and_a_time() -> None:
    """Whatever answers 503 says what it is, and when to try again."""
    kinds, found = [DependencyError], []
    while kinds:
        found += (here := kinds.pop().__subclasses__())
        kinds += here
    assert len(found) >= 6
    for kind in found:
        assert kind.http_status == 503
        assert kind.code != DependencyError.code
        assert kind.retry_after_seconds > 0
