"""Keys: nobody without one, and nobody with one sees another owner's work."""

import io
import re
import socket

import pytest
from PIL import Image

from server.data_folder import DataFolder
from server.errors import ConfigError
from server.keys import KeyStore
from server.main import _listen as listen
from server.settings import load_settings
from server.supervisor import _Supervisor


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


def ask_raw(api, *header_lines):
    """Ask for the presets with these lines; returns the status, or None where the server just hung up."""
    lines = [b"GET /v1/presets HTTP/1.1", b"Host: restage", b"Connection: close", *header_lines, b"", b""]
    with socket.create_connection((api.http.base_url.host, api.http.base_url.port), timeout=30) as connection:
        try:
            connection.sendall(b"\r\n".join(lines))
            answer = connection.makefile("rb").readline()
        except ConnectionError:  # it need not read on what it has refused already
            return None
    return int(answer.split()[1]) if answer else None


def test_no_header_breaks_the_server(open_live_api, keys, tmp_path):
    """Whatever stands where a key should, from any client, is answered 4xx; the right key goes on working."""
    key = keys.add("ana", "user").encode()
    others = KeyStore(tmp_path / "others.jsonl").add("ana", "user").encode()
    right = b"Authorization: Bearer " + key
    environment = {"RESTAGE__AUTH__MODE": "keys", "RESTAGE__AUTH__KEYS_FILE": str(keys.path)}
    with open_live_api(**environment) as api:
        assert ask_raw(api, right) == 200
        assert ask_raw(api, b"AUTHORIZATION:bearer  " + key) == 200
        for lines in (
            [right, right],
            [right, b"authorization: Bearer " + others],
            [b"authorization: Basic YTpi", right],
            [right + b", Bearer " + key],
            [b"Authorization:"],
            [b"Authorization: Bearer " + others],
            [b"Authorization: Bearer " + key.upper()],
            [b"Authorization: Bearer rsk_\xff\xfe" + key],
            [right + b"\xa0"],
            [b"Authorization: Bearer " + b"rsk_" * 12_000],
            [b"Proxy-" + right],
            [],
        ):
            assert ask_raw(api, *lines) == 401, lines
        # These are no headers, and are refused before anybody looks for a key.
        for line in (
            b"Authorization: Bearer " + b"a" * 1_000_000,
            right + b"\0",
            b" " + right,
        ):
            assert ask_raw(api, line) in {None, 400, 401, 431}, line[:100]
        assert ask_raw(api, right) == 200


def test_an_open_server_listens_on_loopback_only(settings_for):
    """Without keys the server refuses to be reachable from elsewhere, by what its host says and by where that leads."""
    secrets = {"RESTAGE__STORE__ACCESS_KEY": "a", "RESTAGE__STORE__SECRET_KEY": "b"}
    with pytest.raises(ConfigError, match="loopback"):
        settings_for(RESTAGE__SERVER__HOST="0.0.0.0", **secrets)  # noqa: S104 (refused, not bound)
    settings = settings_for(RESTAGE__SERVER__HOST="localhost", RESTAGE__SERVER__PORT="0", **secrets)
    listen(settings).close()
    # As if the name led elsewhere on this machine.
    for host in ("0.0.0.0", "::"):  # noqa: S104 (refused before anybody is served)
        elsewhere = settings.model_copy(update={"server": settings.server.model_copy(update={"host": host})})
        with pytest.raises(ConfigError, match=f"server.host: {host} is {host} here.*needs a loopback address"):
            listen(elsewhere)
        with_keys = elsewhere.model_copy(update={"auth": settings.auth.model_copy(update={"mode": "keys"})})
        listen(with_keys).close()


def test_pages_of_other_sites_do_not_reach_an_open_server(open_api):
    """Without keys, what a browser sends for another site is refused: a form, and a name that leads here."""
    with open_api() as api:

        def ask(**headers):
            statuses = {
                api.http.get("/v1/batches", headers=headers).status_code,
                api.http.post("/v1/batches", files={"batch": b"{}"}, headers=headers).status_code,
            }
            assert api.http.get("/health/live", headers=headers).status_code == 200
            return statuses

        for host in (
            "127.0.0.1",
            "127.0.0.1:8000",
            "localhost:80",
            "LOCALHOST",
            "[::1]:8000",
            "a.localhost",
            f"{socket.gethostname()}:8000",
        ):
            assert ask(Host=host) == {200, 422}, host
            assert ask(Host=host, Origin=f"http://{host}") == {200, 422}, host
        assert ask(Origin="http://localhost:3000") == {200, 422}
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[fe80::1]",
            "evil.example.",
            "box:8000",
            "1.1",
            "nolocalhost",
        ):
            assert ask(Host=host) == {401}, host
            assert ask(Host=host, Origin=f"http://{host}") == {401}, host
        for origin in (
            "https://evil.example",
            "null",
            "",
            "file://",
            "http://127.0.0.1.evil.example",
            "http://a@evil.example",
        ):
            assert ask(Origin=origin) == {401}, origin


def test_restage_up_listens_on_loopback_only(tmp_path, monkeypatch):
    """It serves this machine alone, whatever the environment says; so it may be open, as config/local.yaml has it."""
    monkeypatch.setenv("RESTAGE_ENV", "local")
    monkeypatch.setenv("RESTAGE__SERVER__HOST", "0.0.0.0")  # noqa: S104 (not bound)
    folder = DataFolder(tmp_path / "data")
    with folder.locked():
        supervisor = _Supervisor(folder, 0, 1, lambda _line: None)
        supervisor._claim.release()
        settings = load_settings(env=supervisor._environment())
    assert (settings.server.host, settings.auth.mode) == ("127.0.0.1", "none")
