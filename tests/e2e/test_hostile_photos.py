"""A thousand hostile photos, sent as any others: each is refused or fails alone, and nothing else is touched."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.hostile_photos import HostilePhoto, make_hostile_photos

SEED = 20261125
COUNT = 1020
MODEL = "tiny-flux-kontext"
MOST_API_BYTES = 300_000_000
# What may be said of a photo at submission.
PHOTO_CODES = {
    "unsupported_format",
    "damaged_image",
    "truncated_image",
    "photo_too_small",
    "photo_too_large",
    "unusable_shape",
}
# The cheapest run there is. The file is to hold nothing that differs from job to job.
DEFAULTS = {
    "model": MODEL,
    "params": {"seed": 7, "num_inference_steps": 1, "width": 64, "height": 64},
    "output": {"format": "png", "metadata": False},
}


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # pyright: ignore[reportOptionalSubscript]


def honest_photos() -> list[bytes]:
    photos = []
    for image_format, size in (("JPEG", (160, 120)), ("PNG", (90, 130)), ("WEBP", (200, 80))):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, image_format)
        photos.append(buffer.getvalue())
    return photos


class Sender:
    """Sends photos as a program would that trusts nobody's names and types."""

    def __init__(self, stack: Any) -> None:
        self.client = stack.client
        self.secrets: set[str] = set()
        # httpx takes more time for each of a thousand forms than the store does.
        self._store = httpx.Client(timeout=60)
        self._pool = ThreadPoolExecutor(4)

    def close(self) -> None:
        self._pool.shutdown()
        self._store.close()

    def submit(self, photos: list[bytes]) -> httpx.Response:
        """Send up to 50 files to forms, and name all of them in a batch."""
        files = [
            {"filename": f"{number}.jpg", "content_type": "image/jpeg", "size_bytes": len(data)}
            for number, data in enumerate(photos)
        ]
        answer = self.client.call("POST", "/v1/uploads", json={"files": files})
        assert answer.status_code == 201, answer.text
        forms = answer.json()["uploads"]
        self.secrets |= {form["fields"][name] for form in forms for name in ("policy", "x-amz-signature")}
        for sent in self._pool.map(self._send, forms, photos):
            assert sent.is_success, sent.text
        items = [{"upload_id": form["upload_id"]} for form in forms]
        return self.client.call("POST", "/v1/batches", json={"defaults": DEFAULTS, "items": items})

    def _send(self, form: dict[str, Any], data: bytes) -> httpx.Response:
        return self._store.post(form["url"], data=form["fields"], files={"file": data})


@pytest.fixture
def sender(stack) -> Iterator[Sender]:
    sender = Sender(stack)
    yield sender
    sender.close()


def pictures(client: Any, batch: dict[str, Any]) -> list[str]:
    """Wait for honest photos and return what their results are, to the bit."""
    jobs = client.finished(batch["id"])["jobs"]
    assert [job["status"] for job in jobs] == ["succeeded"] * len(jobs), jobs
    return [job["output"]["sha256"] for job in jobs]


def check_answer(photos: list[HostilePhoto], answer: httpx.Response) -> dict[int, HostilePhoto]:
    """See that exactly those are refused that their header is enough for; returns the others by their place."""
    body = answer.json()
    refused = {error["index"]: error["code"] for error in body["errors"]}
    wrong = {photos[index].trick: code for index, code in refused.items() if code not in PHOTO_CODES}
    assert not wrong
    expected = {index for index, photo in enumerate(photos) if photo.fate == "refused"}
    assert {photos[index].trick for index in expected ^ set(refused)} == set()
    assert answer.status_code == (422 if len(refused) == len(photos) else 207 if refused else 201)
    return {index: photo for index, photo in enumerate(photos) if index not in refused}


def check_jobs(accepted: dict[int, HostilePhoto], batch: dict[str, Any]) -> None:
    """See that each accepted photo became a picture, or failed for what it is, at its first and only attempt."""
    wrong = {}
    for job in batch["jobs"]:
        photo = accepted[job["index"]]
        expected = ("failed", "invalid_input") if photo.fate == "damaged" else ("succeeded", None)
        if (job["status"], (job["error"] or {}).get("code")) != expected or job["attempts"] != 1:
            wrong[photo.trick] = (job["status"], job["attempts"], job["error"])
    assert not wrong


@pytest.mark.timeout(300)
def test_a_thousand_hostile_photos_touch_nobody_else(stack, sender: Sender) -> None:
    """Each is refused by its header, or fails as `invalid_input`, or is a photo; an honest batch among them is as ever.

    No process ends, the API needs little memory, and no log tells a secret or a traceback.
    """
    photos = make_hostile_photos(SEED, COUNT, most_damaged=170, most_staged=90)
    fates = Counter(photo.fate for photo in photos)
    print(f"seed {SEED}: {dict(fates)}")  # noqa: T201 (shown with a failure)
    assert len(photos) >= 1000
    assert min(fates.values()) >= 50
    api = stack.children[0]
    worker = stack.start_worker(RESTAGE__MODELS__ENABLED=json.dumps([MODEL]), RESTAGE__MODELS__DEFAULT=MODEL)
    stack.wait_ready()
    honest = honest_photos()
    alone = pictures(sender.client, sender.submit(honest).json()["batch"])

    batches: list[tuple[dict[int, HostilePhoto], str]] = []
    among: list[dict[str, Any]] = []
    for start in range(0, COUNT, 50):
        some = photos[start : start + 50]
        answer = sender.submit([photo.data for photo in some])
        accepted = check_answer(some, answer)
        if accepted:
            batches.append((accepted, answer.json()["batch"]["id"]))
        if start % 400 == 0:
            among.append(sender.submit(honest).json()["batch"])

    assert [pictures(sender.client, batch) for batch in among] == [alone] * len(among)
    for accepted, batch_id in batches:
        check_jobs(accepted, sender.client.finished(batch_id))
    assert max(sender.client.received) < 500
    assert api.is_running
    assert worker.is_running
    print(f"peak of the API: {peak_bytes(api.pid) / 1e6:.0f} MB")  # noqa: T201
    assert peak_bytes(api.pid) < MOST_API_BYTES
    logs = "".join(child.log_file.read_text() for child in stack.children)
    told = {"X-Amz-Signature", "Traceback", stack.environment["RESTAGE__STORE__SECRET_KEY"], *sender.secrets}
    assert not [secret for secret in told if secret in logs]
