"""Keys: nobody without one, and nobody with one sees another owner's work."""

import io
import re

import pytest
from PIL import Image

from server.errors import ConfigError
from server.keys import KeyStore


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def keys(tmp_path):
    """Give a file of keys."""
    return KeyStore(tmp_path / "keys.jsonl")


@pytest.fixture
def api(open_api, keys):
    """Give an API that asks for keys."""
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path)) as running:
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/uploads"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches"),
        ("GET", f"/v1/batches/{'0' * 32}"),
        ("DELETE", f"/v1/batches/{'0' * 32}"),
        ("GET", f"/v1/batches/{'0' * 32}/events"),
        ("GET", f"/v1/batches/{'0' * 32}/archive"),
        ("POST", f"/v1/batches/{'0' * 32}/cancel"),
        ("POST", f"/v1/batches/{'0' * 32}/retry"),
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs/retry"),
        ("GET", f"/v1/jobs/{'0' * 32}"),
        ("GET", f"/v1/jobs/{'0' * 32}/output"),
        ("POST", f"/v1/jobs/{'0' * 32}/cancel"),
        ("POST", f"/v1/jobs/{'0' * 32}/retry"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny-flux-kontext"),
        ("GET", "/v1/presets"),
        ("GET", "/v1/workers"),
    ],
)
def test_every_route_of_the_api_needs_a_key(api, keys, method, path):
    """Without a key, with a wrong one and with a revoked one the answer is 401, before a body is looked at."""
    revoked = keys.add("ana", "user")
    keys.revoke(revoked.split("_")[1])
    for headers in ({}, bearer("nonsense"), bearer(revoked), {"Authorization": "Basic YTpi"}, bearer("k\u00f6y")):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        response = api.http.request(method, path, headers=encoded)
        assert response.status_code == 401, response.text
        assert response.json()["code"] == "unauthorized"
        assert response.headers["www-authenticate"] == "Bearer"


def test_health_and_the_api_page_need_no_key(api):
    """Probes and people who read the documentation have none."""
    for path in ("/health/live", "/health/ready", "/openapi.json", "/docs"):
        assert api.http.get(path).status_code == 200


def without_ids(response):
    problem = response.json()
    return {**problem, "request_id": "", "detail": re.sub("[0-9a-f]{32}", "", problem["detail"])}


def test_another_owners_work_is_not_there(api, keys):
    """Every id of another owner, an upload's too, answers exactly as one that never was."""
    ana = bearer(keys.add("ana", "user"))
    [upload_id] = api.upload(picture(), headers=ana)
    batch = api.http.post("/v1/batches", json={"items": [{"upload_id": upload_id}]}, headers=ana).json()["batch"]
    job_id = batch["jobs"][0]["id"]
    other = bearer(keys.add("other", "user"))
    for method, path in [
        ("GET", f"/v1/batches/{batch['id']}"),
        ("GET", f"/v1/batches/{batch['id']}/events"),
        ("GET", f"/v1/batches/{batch['id']}/archive"),
        ("POST", f"/v1/batches/{batch['id']}/cancel"),
        ("POST", f"/v1/batches/{batch['id']}/retry"),
        ("DELETE", f"/v1/batches/{batch['id']}"),
        ("GET", f"/v1/jobs/{job_id}"),
        ("GET", f"/v1/jobs/{job_id}/output"),
        ("POST", f"/v1/jobs/{job_id}/cancel"),
        ("POST", f"/v1/jobs/{job_id}/retry"),
    ]:
        response = api.http.request(method, path, headers=other)
        unknown = path.replace(batch["id"], "0" * 32).replace(job_id, "0" * 32)
        never_was = api.http.request(method, unknown, headers=other)
        assert response.status_code == 404
        assert without_ids(response) == without_ids(never_was)
    assert api.http.get("/v1/jobs", headers=other).json()["data"] == []
    response = api.http.post("/v1/jobs/retry", json={"ids": [job_id]}, headers=other)
    assert response.json()["errors"][0]["code"] == "not_found"
    response = api.http.post("/v1/batches", json={"items": [{"upload_id": upload_id}]}, headers=other)
    assert response.json()["errors"][0]["code"] == "upload_not_found"
    assert api.http.get(f"/v1/jobs/{job_id}", headers=ana).json()["status"] == "queued"


def test_an_admin_looks_after_everybodys_work(api, keys):
    """A key of the role admin reads, cancels, retries and deletes another owner's batch; photos stay the owner's."""
    ana = bearer(keys.add("ana", "user"))
    [upload_id] = api.upload(picture(), headers=ana)
    batch = api.http.post("/v1/batches", json={"items": [{"upload_id": upload_id}]}, headers=ana).json()["batch"]
    admin = bearer(keys.add("boss", "admin"))
    path, job_id = f"/v1/batches/{batch['id']}", batch["jobs"][0]["id"]
    assert api.http.get(path, headers=admin).json()["id"] == batch["id"]
    assert [job["id"] for job in api.http.get("/v1/jobs", headers=admin).json()["data"]] == [job_id]
    assert api.http.get("/v1/batches", headers=admin).json()["data"] == []
    assert api.http.post(f"/v1/jobs/{job_id}/cancel", headers=admin).json()["status"] == "cancelled"
    assert api.http.post("/v1/jobs/retry", json={"ids": [job_id]}, headers=admin).status_code == 200
    assert api.http.post(f"{path}/cancel", headers=admin).json()["counts"]["cancelled"] == 1
    response = api.http.post("/v1/batches", json={"items": [{"upload_id": upload_id}]}, headers=admin)
    assert response.json()["errors"][0]["code"] == "upload_not_found"
    assert api.http.delete(path, headers=admin).status_code == 204
    assert api.http.get(path, headers=ana).status_code == 404


def test_an_idempotency_key_belongs_to_its_owner(api, keys):
    """Two owners may use the same idempotency key."""
    ids = []
    for owner in ("ana", "ben"):
        headers = bearer(keys.add(owner, "user"))
        [upload_id] = api.upload(picture(), headers=headers)
        response = api.submit({"upload_id": upload_id}, headers=headers | {"Idempotency-Key": "same"})
        assert response.status_code == 201
        ids.append(response.json()["batch"]["id"])
    assert len(set(ids)) == 2


def test_a_key_has_a_highest_priority(api, keys):
    """Who may ask for normal at most is refused high, and gets what lies below."""
    headers = bearer(keys.add("ana", "user", max_priority="normal"))
    [upload_id] = api.upload(picture(), headers=headers)
    statuses = {
        priority: api.submit({"upload_id": upload_id}, priority=priority, headers=headers).status_code
        for priority in ("high", "normal", "low")
    }
    assert statuses == {"high": 403, "normal": 201, "low": 201}


def test_an_open_server_listens_on_loopback_only(settings_for):
    """Without keys the server refuses to be reachable from elsewhere."""
    secrets = {"RESTAGE__STORE__ACCESS_KEY": "a", "RESTAGE__STORE__SECRET_KEY": "b"}
    with pytest.raises(ConfigError, match="loopback"):
        settings_for(RESTAGE__SERVER__HOST="0.0.0.0", **secrets)  # noqa: S104 (refused, not bound)
