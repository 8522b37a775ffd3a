"""Nobody sees another owner's work: every route of the OpenAPI document is walked with a stranger's key."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from PIL import Image

from server.jobs import Job, JobOutput
from server.keys import KeyStore
from server.ledger.worker_side import WorkerLedger
from server.main import create_app
from server.ports import free_ports
from tests.e2e.conftest import Client, Stack, wait_for

FLUX = "tiny-flux-kontext"
NEVER_WAS = "0" * 32
METHODS = ("get", "post", "put", "patch", "delete")
# What differs from answer to answer and says nothing.
PASSING_HEADERS = {"x-request-id", "date"}


def photo() -> bytes:
    """Draw a photo that only one owner can have."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (96, 80), hashlib.shake_256(uuid4().bytes).digest(96 * 80 * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def operations(document: dict[str, Any]) -> set[str]:
    """List what a document describes, as `GET /v1/jobs/{job_id}`."""
    return {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in METHODS if method in item
    }


@dataclass(frozen=True)
class Things:
    """What one owner has: a batch that has finished and one that runs, with all that belongs to them.

    Attributes:
        photo: the bytes of an upload that both batches name.
        body: the JSON with which the running one was submitted, under `idempotency_key`.
        marks: texts that stand in no answer to anybody else.
    """

    finished: dict[str, Any]
    running: dict[str, Any]
    photo: bytes
    body: dict[str, Any]
    idempotency_key: str
    marks: frozenset[str]

    @property
    def batch_ids(self) -> list[str]:
        """The ids of both batches."""
        return [self.finished["id"], self.running["id"]]

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of both batches: one succeeded, one failed, one runs, one waits."""
        return [*self.finished["jobs"], *self.running["jobs"]]

    @property
    def upload_id(self) -> str:
        """The id of the upload."""
        return self.finished["jobs"][0]["input"]["upload_id"]


@dataclass(frozen=True)
class Walk:
    """A stranger's way through the API, beside the owner of what it must not see."""

    stranger: httpx.Client
    owner: httpx.Client
    things: Things

    def ask(self, method: str, path: str, *, knows: str = "", **options: Any) -> dict[str, Any]:
        """Send a stranger's request; returns all of the answer that could tell anything.

        Args:
            method: of HTTP.
            path: with the query.
            knows: an id that the request names itself, and that may come back.
            options: as for httpx.
        """
        with self.stranger.stream(method, path, **options) as answer:
            # An event stream may have no end.
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            body = "a stream" if is_stream else answer.read().decode(errors="replace")
        shown = {"status": answer.status_code, "body": body.replace(knows, "the id") if knows else body}
        shown["headers"] = {name: value for name, value in answer.headers.items() if name not in PASSING_HEADERS}
        found = {mark for mark in self.things.marks if mark in json.dumps(shown)}
        assert not found, f"{method} {path} shows {found}"
        if answer.headers.get("content-type") in {"application/problem+json", "application/json"}:
            shown["body"] = json.loads(shown["body"])
            if isinstance(shown["body"], dict):
                shown["body"].pop("request_id", None)
        return shown

    def check_hidden(
        self,
        method: str,
        path: str,
        ids: list[str],
        *,
        status: int = 404,
        make_options: Callable[[str], dict[str, Any]] = lambda _: {},
    ) -> None:
        """See that each id of the owner's is answered as one that never was; `{id}` in `path` is the id."""
        for one in ids:
            answer = self.ask(method, path.format(id=one), knows=one, **make_options(one))
            never = self.ask(method, path.format(id=NEVER_WAS), knows=NEVER_WAS, **make_options(NEVER_WAS))
            assert answer["status"] == status, f"{method} {path}: {answer}"
            assert answer == never

    def check_empty(self, path: str, queries: list[str]) -> None:
        """See that a list is empty for the stranger, however it asks, though the owner's is not."""
        assert self.owner.get(path).json()["data"]
        for query in queries:
            answer = self.ask("GET", f"{path}?{query}")
            assert (answer["status"], answer["body"]) == (200, {"data": [], "next_cursor": None})

    def check_shared(self, path: str) -> None:
        """See that what belongs to nobody is told to everybody alike."""
        answer, owners = self.ask("GET", path), self.owner.get(path)
        assert answer["status"] == owners.status_code == 200
        # What ends in a digit is counted or measured anew for each answer.
        assert re.sub(r"\d+", "", json.dumps(answer["body"])) == re.sub(r"\d+", "", json.dumps(owners.json()))


# One case for each operation. Those that change what the owner has come last: the same walk is gone by the owner.


def lists_of_batches(walk: Walk) -> None:
    """Under no filter, and behind no cursor."""
    page = walk.owner.get("/v1/batches?limit=1").json()
    filters = ["status=finished", "status=running", f"label={walk.things.body['label']}", "limit=100"]
    walk.check_empty("/v1/batches", ["", *filters, f"cursor={page['next_cursor']}"])


def lists_of_jobs(walk: Walk) -> None:
    """Under no filter, and behind no cursor."""
    page = walk.owner.get("/v1/jobs?limit=1").json()
    filters = [*(f"status={one['status']}" for one in walk.things.jobs), f"model={FLUX}"]
    walk.check_empty("/v1/jobs", ["", *filters, f"cursor={page['next_cursor']}"])


def batches(method: str, path: str) -> Callable[[Walk], None]:
    """Make the case of a route that takes the id of a batch."""
    return lambda walk: walk.check_hidden(method, path, walk.things.batch_ids)


def jobs(method: str, path: str) -> Callable[[Walk], None]:
    """Make the case of a route that takes the id of a job."""
    return lambda walk: walk.check_hidden(method, path, [job["id"] for job in walk.things.jobs])


def events(walk: Walk) -> None:
    """From the beginning, from events that there are, and from anywhere."""
    with walk.owner.stream("GET", f"/v1/batches/{walk.things.finished['id']}/events") as stream:
        known = re.findall(r"^id: (.+)$", stream.read().decode(), flags=re.MULTILINE)
    assert known
    for position in (None, "0-0", known[-1], "nonsense"):
        headers = {} if position is None else {"Last-Event-ID": position}
        walk.check_hidden(
            "GET",
            "/v1/batches/{id}/events",
            walk.things.batch_ids,
            make_options=lambda _, headers=headers: {"headers": headers},
        )


def uploads(walk: Walk) -> None:
    """The owner's bytes are not known to be there: they get a form as any others do."""
    for data, is_owners in ((walk.things.photo, True), (photo(), False)):
        announced = {
            "filename": "a.png",
            "content_type": "image/png",
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if is_owners:
            offered = walk.owner.post("/v1/uploads", json={"files": [announced]}).json()["uploads"][0]
            assert (offered["exists"], offered["upload_id"]) == (True, walk.things.upload_id)
        answer = walk.ask("POST", "/v1/uploads", json={"files": [announced]})
        assert answer["status"] == 201
        assert answer["body"]["uploads"][0].keys() >= {"url", "fields"}


def submissions(walk: Walk) -> None:
    """The owner's upload cannot be named, and its idempotency key neither answers nor stands in the way."""
    things = walk.things
    key = {"Idempotency-Key": things.idempotency_key}
    for headers in ({}, key):
        walk.check_hidden(
            "POST",
            "/v1/batches",
            [things.upload_id],
            status=422,
            make_options=lambda one, headers=headers: {"headers": headers, "json": {"items": [{"upload_id": one}]}},
        )
    again = walk.ask("POST", "/v1/batches", knows=things.upload_id, headers=key, json=things.body)
    fresh = walk.ask(
        "POST", "/v1/batches", knows=things.upload_id, headers={"Idempotency-Key": uuid4().hex}, json=things.body
    )
    assert again == fresh
    assert again["status"] == 422
    # The same bytes and the same key, in a form: a batch of the stranger's own.
    parts = {"batch": (None, json.dumps({"items": [{"file": "a"}]}), "application/json"), "a": ("a.png", things.photo)}
    own = walk.ask("POST", "/v1/batches", headers=key, files=parts)
    assert own["status"] == 201
    batch_id = own["body"]["batch"]["id"]
    assert walk.stranger.post(f"/v1/batches/{batch_id}/cancel").status_code == 200
    assert walk.stranger.delete(f"/v1/batches/{batch_id}").status_code == 204


def retries(walk: Walk) -> None:
    """Jobs named by their ids in a body are as hidden as those in a path."""
    ids = [job["id"] for job in walk.things.jobs]
    walk.check_hidden(
        "POST", "/v1/jobs/retry", ids, status=422, make_options=lambda one: {"json": {"ids": [one, "f" * 32]}}
    )


def workers(walk: Walk) -> None:
    """What workers hold is for the operator alone."""
    assert walk.ask("GET", "/v1/workers")["status"] == 403


CASES: dict[str, Callable[[Walk], None]] = {
    "GET /v1/batches": lists_of_batches,
    "GET /v1/jobs": lists_of_jobs,
    "GET /v1/batches/{batch_id}": batches("GET", "/v1/batches/{id}"),
    "GET /v1/batches/{batch_id}/archive": batches("GET", "/v1/batches/{id}/archive"),
    "GET /v1/batches/{batch_id}/events": events,
    "GET /v1/jobs/{job_id}": jobs("GET", "/v1/jobs/{id}"),
    "GET /v1/jobs/{job_id}/output": jobs("GET", "/v1/jobs/{id}/output"),
    "POST /v1/uploads": uploads,
    "POST /v1/batches": submissions,
    "POST /v1/jobs/retry": retries,
    "POST /v1/jobs/{job_id}/retry": jobs("POST", "/v1/jobs/{id}/retry"),
    "POST /v1/jobs/{job_id}/cancel": jobs("POST", "/v1/jobs/{id}/cancel"),
    "POST /v1/batches/{batch_id}/retry": batches("POST", "/v1/batches/{id}/retry"),
    "POST /v1/batches/{batch_id}/cancel": batches("POST", "/v1/batches/{id}/cancel"),
    "DELETE /v1/batches/{batch_id}": batches("DELETE", "/v1/batches/{id}"),
}
# What belongs to no owner.
SHARED_CASES: dict[str, Callable[[Walk], None]] = {
    "GET /v1/workers": workers,
    "GET /v1/models": lambda walk: walk.check_shared("/v1/models"),
    "GET /v1/models/{model_id}": lambda walk: walk.check_shared(f"/v1/models/{FLUX}"),
    "GET /v1/presets": lambda walk: walk.check_shared(f"/v1/presets?model={FLUX}"),
    "GET /health/live": lambda walk: walk.check_shared("/health/live"),
    "GET /health/ready": lambda walk: walk.check_shared("/health/ready"),
}


def check_every_operation_has_its_case(document: dict[str, Any]) -> None:
    """Let no route in that nobody has thought about here."""
    assert operations(document) == CASES.keys() | SHARED_CASES.keys()


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    """Give the file of keys."""
    return KeyStore(tmp_path / "keys.jsonl")


@pytest.fixture
def api(valkey, s3, tmp_path, keys: KeyStore) -> Iterator[Stack]:
    """Give an API process that asks for keys."""
    port = free_ports(1)[0]
    environment = {
        "RESTAGE_ENV": "test",
        "RESTAGE__REDIS__URL": valkey.url,
        "RESTAGE__SERVER__PORT": str(port),
        "RESTAGE__AUTH__MODE": "keys",
        "RESTAGE__AUTH__KEYS_FILE": str(keys.path),
        "RESTAGE__WEBHOOKS__ALLOWED_HOSTS": "[127.0.0.1]",
        **s3.environment,
    }
    running = Stack(environment, tmp_path, port)
    try:
        running.start("api")
        running.wait_api()
        yield running
    finally:
        running.stop()


@pytest.fixture
def open_client(api: Stack, keys: KeyStore) -> Iterator[Callable[[str], Client]]:
    """Give a function that opens a client with a new key of an owner."""
    opened: list[Client] = []

    def make(owner: str) -> Client:
        headers = {"Authorization": f"Bearer {keys.add(owner, 'user')}"}
        opened.append(Client(httpx.Client(base_url=api.client.http.base_url, headers=headers, timeout=30)))
        return opened[-1]

    yield make
    for client in opened:
        client.http.close()


def claim(worker: WorkerLedger) -> Job:
    """Claim the next job, which must be there."""
    job = worker.claim([FLUX], num_held=0)
    assert isinstance(job, Job)
    worker.start(job.id, job.fence, on_device=True)
    return job


@pytest.fixture
def things(valkey, s3, open_client: Callable[[str], Client]) -> tuple[Client, Things]:
    """Give an owner and what it has. The part of the worker is played on the ledger and the store themselves."""
    mark = f"secret{uuid4().hex}"
    owner = open_client(f"owner-{mark}")
    worker = WorkerLedger(
        valkey.client(decode_responses=True), worker_id=f"w-{mark}", key_prefix="restage", lease_seconds=600
    )
    [port] = free_ports(1)  # where nobody listens
    data = photo()
    shared = {
        "defaults": {"model": FLUX, "prompt": f"{mark} prompt"},
        "label": f"{mark}-label",
        "metadata": {"mls": f"{mark} metadata"},
        "webhook": {"url": f"http://127.0.0.1:{port}/{mark}"},
    }
    first = shared | {"items": [{"file": "hall", "name": f"{mark} name"}, {"file": "hall"}]}
    parts = {"batch": (None, json.dumps(first), "application/json"), "hall": ("hall.png", data)}
    answer = owner.call("POST", "/v1/batches", files=parts)
    assert answer.status_code == 201, answer.text

    job = claim(worker)
    key = f"{job.id}/{job.fence}/output.png"
    result = photo()
    s3.store.put_output(key, result, "image/png")
    sha256 = hashlib.sha256(result).hexdigest()
    output = JobOutput(key, sha256, "image/png", 80, 96, len(result))
    done = {"timings": {"run": 0.1}, "params": job.params, "inputs": job.inputs, "speeds": {"run": 0.1}}
    assert worker.commit(job.id, job.fence, output=output, **done) == "ok"
    job = claim(worker)
    assert worker.fail(job.id, job.fence, code="invalid_input", detail=f"{mark} detail", timings={}) == "ok"
    batch_id = answer.json()["batch"]["id"]
    finished = wait_for(
        "a delivery",
        lambda: one if (one := owner.batch(batch_id))["webhook"]["deliveries"] else None,
        timeout_seconds=30,
    )

    body = shared | {"items": [{"upload_id": finished["jobs"][0]["input"]["upload_id"]}] * 2}
    again = {"Idempotency-Key": f"{mark}-key"}
    running_id = owner.call("POST", "/v1/batches", json=body, headers=again).json()["batch"]["id"]
    claim(worker)
    running = owner.batch(running_id)
    assert [job["status"] for job in (*finished["jobs"], *running["jobs"])] == [
        *("succeeded", "failed", "running", "queued")
    ]
    ids = {one["id"] for batch in (finished, running) for one in (batch, *batch["jobs"])}
    marks = frozenset({mark, sha256, body["items"][0]["upload_id"], *ids})
    return owner, Things(finished, running, data, body, again["Idempotency-Key"], marks)


def lasting(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a batch changes by itself neither with time nor with where its webhook stands."""
    jobs = [{**job, "output": job["output"] and job["output"]["sha256"]} for job in batch["jobs"]]
    return {**batch, "jobs": jobs, "webhook": None, "eta_seconds": None}


def fails(case: Callable[[Walk], None], walk: Walk) -> bool:
    """Whether a step of a walk shows what it must not."""
    try:
        case(walk)
    except AssertionError:
        return True
    return False


def test_a_stranger_finds_nothing(api: Stack, open_client: Any, things: tuple[Client, Things]) -> None:
    """Each operation answers a stranger as if the owner's things were not there, and lets it change none of them."""
    owner, owned = things
    stranger = open_client("elm")
    check_every_operation_has_its_case(stranger.call("GET", "/openapi.json").json())

    walk = Walk(stranger.http, owner.http, owned)
    for case in (*CASES.values(), *SHARED_CASES.values()):
        case(walk)

    for batch in (owned.finished, owned.running):
        assert lasting(owner.batch(batch["id"])) == lasting(batch)
    url = owned.finished["jobs"][0]["output"]["url"]
    assert httpx.get(url).status_code == 200
    assert httpx.get(url.partition("?")[0]).status_code == 403

    # To the owner everything is there, so a walk with its own key fails at each step: what is seen is noticed.
    assert [name for name, case in CASES.items() if not fails(case, replace(walk, stranger=owner.http))] == []


def test_a_route_without_a_case_is_noticed(settings_for: Any) -> None:
    """A new route in the document fails the walk, and no route of the API stays out of the document."""
    app = create_app(settings_for())
    document: dict[str, Any] = app.openapi_schema.to_schema()
    check_every_operation_has_its_case(document)
    for new in (
        {"/v1/invoices": {"get": {}}},
        {"/v1/jobs/{job_id}": document["paths"]["/v1/jobs/{job_id}"] | {"patch": {}}},
    ):
        with pytest.raises(AssertionError):
            check_every_operation_has_its_case({"paths": document["paths"] | new})
    routes = {route.path_format for route in app.routes if route.path.startswith("/v1")}
    assert routes == {path for path in document["paths"] if path.startswith("/v1")}
