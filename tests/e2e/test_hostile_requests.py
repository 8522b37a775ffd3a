"""A thousand hostile requests over every route: each is refused in words, and the server is as it was before."""

import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.keys import KeyStore
from tests.e2e.hostile_requests import (
    NO_HTTP,
    PNG,
    Answer,
    Attacker,
    Operation,
    Request,
    costly_requests,
    operations_of,
    send,
)

SEED = 20261125
COUNT = 1000
COUNT_OF_BODIES = 500
MOST_API_BYTES = 300_000_000
# Ten times what the slowest takes.
MOST_SECONDS = 10
# Without weights, so its jobs stay queued.
NEVER_SERVED = "flux-kontext-dev"
WELCOME = {200, 201, 204, 207, 307}
API_PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"
INTERNALS = re.compile(
    r"Traceback|\bFile \"|\.py\b|site-packages|pydantic|litestar|msgspec|uvicorn|h11|object at 0x|<class |NoneType"
    r"|KeyError|ValueError|TypeError|AttributeError|IndexError|RecursionError|UnicodeDecodeError|ResponseError|restage:"
)


@pytest.fixture
def key(stack, tmp_path) -> str:
    """Let the API ask for a key; gives one."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    stack.environment |= {"RESTAGE__AUTH__MODE": "keys", "RESTAGE__AUTH__KEYS_FILE": str(keys.path)}
    stack.restart_api()
    key = keys.add("oak", "user")
    stack.client.http.headers["Authorization"] = f"Bearer {key}"
    return key


@pytest.fixture
def ids(stack, key: str) -> dict[str, list[str]]:
    """Give ids of things that there are, by what they are called in a path."""
    [upload_id] = stack.client.upload({"hall.png": PNG})
    body = {"items": [{"upload_id": upload_id}] * 2, "defaults": {"model": NEVER_SERVED}}
    batches = [stack.client.submit(body) for _ in range(6)]
    for batch in batches[::2]:
        assert stack.client.call("POST", f"/v1/batches/{batch['id']}/cancel").status_code == 200
    return {
        "upload_id": [upload_id],
        "batch_id": [batch["id"] for batch in batches],
        "job_id": [job["id"] for batch in batches for job in batch["jobs"]],
        "model_id": ["tiny-flux-kontext"],
        "name": ["swagger-ui.css"],
    }


def good_bodies(ids: dict[str, list[str]]) -> dict[str, Any]:
    """Write a body for each route that reads one, with every field that there is."""
    item = {"upload_id": ids["upload_id"][0], "name": "hall.jpg", "metadata": {"sku": "7"}, "params": {"seed": 1}}
    settings = {"model": NEVER_SERVED, "room_type": "bedroom", "style": "modern", "prompt": "hall", "loras": []}
    output = {"format": "webp", "quality": 80, "size": "model", "metadata": True}
    batch = {
        "defaults": {**settings, "params": {"guidance_scale": 3.0, "aspect_ratio": "4:3"}, "output": output},
        "items": [item, {"upload_ids": ids["upload_id"], "output": {"format": "png"}}],
        "label": "12 Oak St",
        "metadata": {"mls": "123"},
        "priority": "low",
    }
    file = {"filename": "hall.jpg", "content_type": "image/jpeg", "size_bytes": 1000, "sha256": "0" * 64}
    return {
        "/v1/batches": batch,
        "/v1/uploads": {"files": [file, {**file, "filename": "a.png"}]},
        "/v1/jobs/retry": {"ids": ids["job_id"][:2]},
    }


def find_fault(request: Request, answer: Answer, codes: set[str], secret: str) -> str | None:
    """Say what is wrong with an answer; None where nothing is."""
    if secret in answer.body.decode(errors="replace") or "x-evil" in answer.headers:
        return "it tells or does what it must not"
    if answer.status == 0:
        # What is refused unread is not always sent to its end, and then the answer may be lost.
        return None if request.is_cut or len(request.write()) > 50_000 else "there was no answer"
    if answer.status in WELCOME or NO_HTTP in answer.body:
        return None
    if not 400 <= answer.status < 500 or answer.headers.get("content-type") != "application/problem+json":
        return f"{answer.status} {answer.headers.get('content-type')}"
    return None if request.method == b"HEAD" else find_fault_of_problem(json.loads(answer.body), codes)


def find_fault_of_problem(problem: dict[str, Any], codes: set[str]) -> str | None:
    """Say what is wrong with a problem document."""
    if problem["code"] not in codes or not problem["detail"] or not problem["request_id"]:
        return "a problem that is not documented"
    found = INTERNALS.search(problem["detail"] + json.dumps(problem.get("errors")))
    return f"it shows {found[0]!r}" if found else None


@pytest.mark.timeout(300)
def test_a_thousand_hostile_requests_are_refused_in_words(stack, key: str, ids: dict[str, list[str]]) -> None:
    """Every answer is a 2xx that was earned or a problem with a documented code; nothing is told that must not be.

    The process goes on as it was, with little memory, and no request takes it long.
    """
    codes = set(re.findall(r"^\| `([a-z_]+)` \| ", API_PAGE.read_text(), flags=re.MULTILINE))
    operations = operations_of(stack.client.http.get("/openapi.json").json())
    attacker = Attacker(random.Random(SEED), operations, bodies=good_bodies(ids), ids=ids, key=key)
    secret = key.rpartition("_")[2]
    statuses: Counter[int] = Counter()
    by_operation: Counter[Operation] = Counter()
    faults: list[str] = []
    api = stack.children[-1]

    def attack(operation: Operation | None, request: Request) -> None:
        started = time.monotonic()
        answer = send(stack.port, request)
        seconds = time.monotonic() - started
        statuses[answer.status] += 1
        if operation is not None and answer.status and NO_HTTP not in answer.body:
            by_operation[operation] += 1
        fault = find_fault(request, answer, codes, secret)
        if seconds > MOST_SECONDS:
            fault = f"it took {seconds:.1f} s"
        if fault is not None:
            faults.append(
                f"{request.method[:20]!r} {request.target[:60]!r} ({request.trick}): {fault}\n{answer.body[:300]!r}"
            )

    for operation, request in attacker.requests(COUNT):
        attack(operation, request)
    for operation, request in attacker.bodies_in_turn(COUNT_OF_BODIES):
        attack(operation, request)
    for request in costly_requests(ids, key):
        attack(None, request)
    print(f"seed {SEED}: {dict(statuses)}; peak of the API: {peak_bytes(api.pid) / 1e6:.0f} MB")  # noqa: T201

    assert not faults, "\n\n".join(faults[:20])
    assert sum(by_operation.values()) >= 1000, "these have reached the application"
    assert by_operation.keys() == set(operations)
    assert sum(count for status, count in statuses.items() if 400 <= status < 500) >= 1000
    assert api.is_running
    assert peak_bytes(api.pid) < MOST_API_BYTES
    log = api.log_file.read_text()
    assert not [told for told in ("Traceback", "X-Amz-Signature", secret, "request.failed") if told in log]
    assert not [line for line in log.splitlines() if not re.match(r"\d{4}-\d\d-\d\dT\S+Z \[", line)], "feigned lines"
    again = stack.client.submit({"items": [{"upload_id": ids["upload_id"][0]}], "defaults": {"model": NEVER_SERVED}})
    assert again["counts"]["queued"] == 1


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # pyright: ignore[reportOptionalSubscript]
