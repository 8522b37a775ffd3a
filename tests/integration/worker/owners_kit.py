"""Two owners on one running system: one sends thousands of jobs, the other a few through a real API process."""

import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from server.child import Child
from server.jobs import Batch
from server.keys import KeyStore
from server.ledger.records import UploadRecord
from server.ports import free_ports
from server.settings import RetentionSettings

BATCH_JOBS = 50


def flood(workers: Any, owner: str, num_batches: int) -> list[str]:
    """Let an owner submit full batches of quick jobs that share a photo; returns the ids of the jobs."""
    photo = workers.upload(workers.picture())
    job = workers.job(photo, params={"num_inference_steps": 1})
    upload = UploadRecord(photo.upload_id, owner, photo.key, "room.png", photo.content_type, photo.size_bytes)
    workers.wait(workers.api.announce_uploads([upload], form_ttl_seconds=60, unused_ttl_seconds=600, offer_seconds=600))
    job_ids: list[str] = []
    for _ in range(num_batches):
        jobs = tuple(replace(job, id=secrets.token_hex(16), owner=owner, index=index) for index in range(BATCH_JOBS))
        batch = Batch(id=secrets.token_hex(16), owner=owner, priority=job.priority, jobs=jobs)
        answer = workers.wait(workers.api.submit(batch, retention=RetentionSettings(), max_open_jobs=10**6))
        assert answer.kind == "accepted", answer
        job_ids += [one.id for one in jobs]
    return job_ids


@contextmanager
def client_of(workers: Any, owner: str, folder: Path) -> Iterator[httpx.Client]:
    """Start an API process beside the workers and yield a client with a key of this owner."""
    keys = KeyStore(folder / "keys.jsonl")
    port = free_ports(1)[0]
    own = {
        "RESTAGE__AUTH__MODE": "keys",
        "RESTAGE__AUTH__KEYS_FILE": str(keys.path),
        "RESTAGE__SERVER__PORT": str(port),
    }
    headers = {"Authorization": f"Bearer {keys.add(owner, 'user')}"}
    api = Child("api", [sys.executable, "-m", "server.cli", "api"], log_file=folder / "api.log")
    api.start(os.environ | workers.environment | own)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            workers.until("the API", lambda: api.poll() is None and _answers(client))
            yield client
    finally:
        api.stop(10)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health/live").is_success
    except httpx.TransportError:
        return False


def submit_photos(client: httpx.Client, data: bytes, count: int, model: str) -> dict[str, Any]:
    """Upload a photo and submit a batch that stages it several times."""
    file = {"filename": "den.png", "content_type": "image/png", "size_bytes": len(data)}
    [form] = client.post("/v1/uploads", json={"files": [file]}).raise_for_status().json()["uploads"]
    httpx.post(form["url"], data=form["fields"], files={"file": data}).raise_for_status()
    item = {"upload_id": form["upload_id"], "model": model, "params": {"num_inference_steps": 1}}
    return client.post("/v1/batches", json={"items": [item] * count}).raise_for_status().json()["batch"]


def claims(log_file: Path) -> list[str]:
    """List the jobs that a worker has claimed, in its own order."""
    return re.findall(r"job\.claimed\b.*\bjob=([0-9a-f]{32})", log_file.read_text())
