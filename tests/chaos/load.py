"""Clients of a run: each belongs to an owner, and sees every batch that it submits to its end, whatever it takes."""

import hashlib
import io
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from PIL import Image

from tests.chaos.caller import Caller, GaveUp
from tests.chaos.chaos_worker import FLAKY, POISON
from tests.chaos.stack import FLUX, QWEN

_ROLES: Final = {"honest": 90, "flaky": 5, "hostile": 5}
_PROMPTS: Final = {"flaky": FLAKY, "poison": POISON}
_PARAMS: Final[Mapping[str, Any]] = {"num_inference_steps": 2, "height": 64, "width": 64}


@dataclass
class Habits:
    """What clients do, and how often: shares are from 0 to 1.

    Attributes:
        max_items: of a batch.
        pause_seconds: between two batches, on average.
        stopping: set when no more batches are to be submitted.
    """

    max_items: int = 6
    pause_seconds: float = 0.5
    follows: float = 0.4
    cancels: float = 0.15
    retries: float = 0.5
    lists: float = 0.1
    webhooks: float = 0.3
    stopping: threading.Event = field(default_factory=threading.Event)


def make_photo(number: int, *, is_hostile: bool = False) -> bytes:
    """Draw a small PNG; of a hostile one only the head is a photo's."""
    colors = [(37 * number + 80 * place) % 256 for place in range(3)]
    image = Image.linear_gradient("L").resize((64 + number % 40, 64 + number % 23))
    buffer = io.BytesIO()
    Image.merge("RGB", [image.point([(value + color) % 256 for value in range(256)]) for color in colors]).save(
        buffer, "PNG"
    )
    data = buffer.getvalue()
    # A chunk of pixels that no decoder can read, of the same length.
    return data[:60] + b"\xff" * (len(data) - 80) + data[-20:] if is_hostile else data


class Client(Caller):
    """One client, for a thread of its own.

    Args:
        webhook_url: where the ends of some batches are told.
        habits: what it does.
        seed: of all that it draws.
        **caller: as `Caller` takes them.
    """

    def __init__(self, *, webhook_url: str, habits: Habits, seed: int, **caller: Any) -> None:
        super().__init__(**caller)
        self._webhook_url = webhook_url
        self._habits = habits
        self._draw = random.Random(seed)
        self._uploads: list[tuple[str, str]] = []
        self._num_streams = 0

    def run(self) -> None:
        """Submit batches, one after the other, until it is told to stop; the last one is seen to its end."""
        self._history.add("client.begun", client=self.name)
        try:
            while not self._habits.stopping.is_set():
                self.live_through_batch()
                self._habits.stopping.wait(self._draw.expovariate(1 / self._habits.pause_seconds))
        except GaveUp as error:
            self._history.add("client.gave_up", client=self.name, reason=str(error))
            return
        self._history.add("client.done", client=self.name)

    def live_through_batch(self) -> None:
        """Submit a batch and see it to its end; some are cancelled on the way, and retried afterwards."""
        chance = self._draw.random
        roles = self._draw.choices([*_ROLES], [*_ROLES.values()], k=self._draw.randint(1, self._habits.max_items))
        batch = self.submit(roles)
        if chance() < self._habits.lists:
            self.look_at_lists()
        if chance() < self._habits.cancels:
            time.sleep(self._draw.uniform(0, 1))
            self._cancel(batch)
        self.see_to_end(batch["id"])
        ended = self.read(batch["id"])
        if any(job["status"] != "succeeded" for job in ended["jobs"]) and chance() < self._habits.retries:
            self._history.add("retry.sent", owner=self.owner, batch_id=batch["id"])
            self.call("POST", f"/v1/batches/{batch['id']}/retry")
            self.see_to_end(batch["id"])

    def submit(self, roles: Sequence[str]) -> dict[str, Any]:
        """Submit a batch with a job for each role, and insist until it is accepted.

        Raises:
            GaveUp: it never was.
        """
        key = f"{self._draw.getrandbits(128):032x}"
        items = [self._item(role) for role in roles]
        body: dict[str, Any] = {"items": items, "priority": self._draw.choice(("low", "normal", "normal", "high"))}
        if self._draw.random() < self._habits.webhooks:
            body["webhook"] = {"url": self._webhook_url}
        self._history.add("submit.sent", owner=self.owner, key=key, roles=[*roles])
        answer = self.call("POST", "/v1/batches", json=body, headers={"Idempotency-Key": key})
        if answer.status_code != 201:
            raise GaveUp(f"a batch is answered {answer.status_code}: {answer.text[:300]}")
        batch = answer.json()["batch"]
        self._history.add(
            "submit.accepted",
            owner=self.owner,
            key=key,
            batch_id=batch["id"],
            roles={job["id"]: roles[job["index"]] for job in batch["jobs"]},
            has_webhook="webhook" in body,
        )
        return batch

    def see_to_end(self, batch_id: str) -> None:
        """Follow a batch, or look at it now and then, until it has finished.

        Raises:
            GaveUp: it has not when the run is over.
        """
        if self._draw.random() < self._habits.follows:
            self._follow(batch_id)
        while self.read(batch_id)["status"] != "finished":
            if time.monotonic() > self.give_up_at:
                raise GaveUp(f"batch {batch_id} does not end")
            time.sleep(0.3)

    def _item(self, role: str) -> dict[str, Any]:
        model = self._draw.choice((FLUX, FLUX, QWEN))
        upload_id = self._upload(role)
        output = {"format": self._draw.choice(("webp", "png", "jpeg"))}
        prompt = _PROMPTS.get(role, "A bright room.")
        return {"upload_id": upload_id, "model": model, "prompt": prompt, "params": {**_PARAMS}, "output": output}

    def _upload(self, role: str) -> str:
        """Return the id of a photo in the store: now and then of one that was used before."""
        kind = "hostile" if role == "hostile" else "photo"
        known = [upload_id for one, upload_id in self._uploads if one == kind]
        if known and self._draw.random() < 0.7:
            return self._draw.choice(known)
        data = make_photo(self._draw.randrange(10_000), is_hostile=kind == "hostile")
        upload_id = self._send(data)
        self._uploads.append((kind, upload_id))
        return upload_id

    def _send(self, data: bytes) -> str:
        file = {"filename": "room.png", "content_type": "image/png", "size_bytes": len(data)}
        if self._draw.random() < 0.5:
            file["sha256"] = hashlib.sha256(data).hexdigest()
        form = self.call("POST", "/v1/uploads", json={"files": [file]}).json()["uploads"][0]
        while not form.get("exists") and time.monotonic() < self.give_up_at:
            try:
                answer = self._store.post(form["url"], data=form["fields"], files={"file": data})
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if answer.is_success:
                break
            time.sleep(0.2)
        return form["upload_id"]

    def _cancel(self, batch: Mapping[str, Any]) -> None:
        job_ids = [job["id"] for job in batch["jobs"]]
        if self._draw.random() < 0.5:
            job_ids = [self._draw.choice(job_ids)]
            path = f"/v1/jobs/{job_ids[0]}/cancel"
        else:
            path = f"/v1/batches/{batch['id']}/cancel"
        self._history.add("cancel.sent", owner=self.owner, job_ids=job_ids)
        self.call("POST", path)

    def _follow(self, batch_id: str) -> None:
        """Follow a batch to its end, going on behind the last event after each cut."""
        self._num_streams += 1
        stream, last_id, is_over = f"{self.name}-{self._num_streams}", None, False
        while not is_over and time.monotonic() < self.give_up_at:
            try:
                for event_id, kind, _ in self.events(batch_id, last_id):
                    if event_id:
                        last_id = event_id
                        self._history.add("followed", stream=stream, batch_id=batch_id, type=kind, event_id=event_id)
                    is_over = kind in {"batch.finished", "nothing.more"}
            except httpx.TransportError:
                pass
            if not is_over:
                self._wait(0.2)
