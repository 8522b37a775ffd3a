"""Following, cancelling and fetching: what a client sees while workers work."""

import io
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from PIL import Image

from server.jobs import Job


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def batch(api):
    """Give an accepted batch of two jobs."""
    [upload_id] = api.upload(picture())
    return api.accept({"upload_id": upload_id, "name": "Küche, 1. OG.jpg"}, {"upload_id": upload_id})


def test_a_result_can_be_downloaded_from_the_store(api, batch):
    """A finished job has a URL that works without a key for at least five minutes and names the file."""
    api.run_next()
    job = api.http.get(f"/v1/jobs/{batch['jobs'][0]['id']}").json()
    assert (job["status"], job["attempts"], job["worker"]) == ("succeeded", 1, "worker-1")
    assert job["timings"]["run"] == 0.2
    assert job["timings"]["queue"] >= 0
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    output = job["output"]
    assert datetime.fromisoformat(output["url_expires_at"]) > datetime.now(UTC) + timedelta(minutes=5)
    fetched = httpx.get(output["url"])
    assert fetched.status_code == 200
    assert len(fetched.content) == output["size_bytes"]
    assert (output["content_type"], output["width"], output["height"]) == ("image/webp", 128, 96)
    assert "001-K%C3%BCche%2C%201.%20OG.webp" in fetched.headers["content-disposition"]
    read = api.http.get(f"/v1/batches/{batch['id']}").json()
    assert (read["status"], read["counts"]["succeeded"], read["counts"]["queued"]) == ("running", 1, 1)
    assert read["jobs"][0]["output"]["sha256"] == output["sha256"]


def test_the_output_of_a_job_is_a_redirect(api, batch):
    """The job's own address leads to the result, once there is one."""
    job_id = batch["jobs"][0]["id"]
    early = api.http.get(f"/v1/jobs/{job_id}/output")
    assert (early.status_code, early.json()["code"]) == (409, "no_output")
    api.run_next()
    response = api.http.get(f"/v1/jobs/{job_id}/output")
    assert response.status_code == 307
    assert response.headers["cache-control"] == "no-store"
    assert httpx.get(response.headers["location"]).content.startswith(b"RIFF")


def test_a_running_job_shows_its_progress_and_is_asked_to_stop(api, batch):
    """Progress comes from the worker; cancelling a running job leaves it running until the worker has stopped."""
    from server.ledger.worker_side import HeldJob

    claimed = api.worker.claim([batch["jobs"][0]["model"]], num_held=0)
    assert isinstance(claimed, Job)
    api.worker.renew([HeldJob(claimed.id, claimed.fence, step=1, total_steps=4)])
    job = api.http.get(f"/v1/jobs/{claimed.id}").json()
    assert (job["status"], job["queue_position"]) == ("running", None)
    assert job["progress"] == {"step": 1, "total_steps": 4, "fraction": 0.25}
    response = api.http.post(f"/v1/jobs/{claimed.id}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "running")
    assert api.worker.renew([HeldJob(claimed.id, claimed.fence)]) == ["cancelled"]


def test_queued_jobs_are_cancelled_at_once(api, batch):
    """A queued job ends when it is cancelled; a second time there is nothing to cancel."""
    first, second = batch["jobs"]
    response = api.http.post(f"/v1/jobs/{first['id']}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    again = api.http.post(f"/v1/jobs/{first['id']}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    response = api.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert response.status_code == 200
    assert response.json()["status"] == "finished"
    assert response.json()["counts"]["cancelled"] == 2
    assert response.json()["jobs"][1]["id"] == second["id"]
    assert datetime.fromisoformat(response.json()["expires_at"]) > datetime.now(UTC) + timedelta(days=29)
    again = api.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/batches/{}"),
        ("POST", "/v1/batches/{}/cancel"),
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}/output"),
        ("POST", "/v1/jobs/{}/cancel"),
    ],
)
@pytest.mark.parametrize("unknown", ["0" * 32, "nope", "{id}:jobs", "%00", "%ED%A0%80", "..%2f..%2fhealth", "{id}%20"])
def test_ids_that_are_none_answer_404(api, batch, method, path, unknown):
    """Whatever stands in the place of an id, the answer is the same 404: no key of the ledger can be named that way."""
    found = batch["id"] if "batches" in path else batch["jobs"][0]["id"]
    response = api.http.request(method, path.format(unknown.replace("{id}", found)))
    assert response.status_code == 404
    assert response.json()["code"] == "not_found"


def test_reading_a_batch_costs_one_command(open_api):
    """However many jobs a batch has, reading it asks Redis once and the store never."""
    with open_api(RESTAGE__SWEEP__INTERVAL_SECONDS="1000", RESTAGE__WORKER__LEASE_SECONDS="5000") as api:
        [upload_id] = api.upload(picture())
        batch = api.accept(*[{"upload_id": upload_id}] * 50)
        api.run_next()
        api.http.get(f"/v1/batches/{batch['id']}")

        def num_calls():
            return {name: stat["calls"] for name, stat in api.redis.info("commandstats").items()}

        def count():
            before = num_calls()
            assert len(api.http.get(f"/v1/batches/{batch['id']}").json()["jobs"]) == 50
            grown = {name: calls - before.get(name, 0) for name, calls in num_calls().items()}
            outside = grown.keys() - {f"cmdstat_{name}" for name in inside}
            return {name: grown[name] for name in outside if grown[name]}

        # What the script itself calls is counted as well, and the reader of changes, which asks every second.
        inside = {"hgetall", "hmget", "lrange", "smembers", "time", "xread", "xrevrange", "zcard", "zrange", "zrank"}
        # Others that use this Redis now and then are counted too.
        assert {"cmdstat_evalsha": 1, "cmdstat_info": 1} in [count() for _ in range(3)]
