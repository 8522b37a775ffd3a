"""A day of two agencies and their operator, in miniature: at its end every counter is exact, and later all is gone."""

import hashlib
import io
import json
import zipfile
from collections import Counter
from typing import Any

import httpx
import pytest
from PIL import Image

from server.keys import KeyStore
from server.settings import StoreSettings
from server.store import Store

FLUX, QWEN = "tiny-flux-kontext", "tiny-qwen-image-edit-2511"
DAY_SECONDS = 24 * 3600
# What remains in the ledger while processes run: what they say of themselves.
STANDING = ("restage:schema", "restage:swept", "restage:worker", "restage:served", "restage:weights")


def photo(index: int, size: tuple[int, int] = (96, 80)) -> bytes:
    """Draw a photo that is like no other."""
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.putpixel((0, 0), (index % 256, 7, 7))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cut_jpeg() -> bytes:
    """Return the first half of a photo: its header is right, and it cannot be decoded."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


class Day:
    """What the three of them did; every batch that was accepted is remembered."""

    def __init__(self, stack, make_client, keys: KeyStore) -> None:
        self.oak = self._open(stack, make_client, keys.add("oak", "user"))
        self.elm = self._open(stack, make_client, keys.add("elm", "user"))
        self.boss = self._open(stack, make_client, keys.add("boss", "admin"))
        self.accepted: dict[str, Any] = {}
        self.num_photos = 0

    def _open(self, stack, make_client, key: str) -> Any:
        client = make_client(str(stack.client.http.base_url))
        client.http.headers["Authorization"] = f"Bearer {key}"
        return client

    def photos(self, count: int) -> dict[str, bytes]:
        """Take photos that nobody has taken before."""
        first = self.num_photos
        self.num_photos += count
        return {f"room-{index}.png": photo(index) for index in range(first, first + count)}

    def submit(self, client, files: dict[str, bytes], item_settings: list[dict[str, Any]] | None = None, **body) -> Any:
        """Upload and submit; `item_settings` go into the items one by one."""
        settings = item_settings or [{} for _ in files]
        items = [
            {"upload_id": upload_id, "name": name, **one}
            for upload_id, name, one in zip(client.upload(files), files, settings, strict=True)
        ]
        return self.remember(client, client.call("POST", "/v1/batches", json={"items": items, **body}))

    def remember(self, client, response: httpx.Response) -> Any:
        """Keep an accepted batch."""
        assert response.status_code in {201, 207}, response.text
        batch = response.json()["batch"]
        self.accepted[batch["id"]] = client
        return batch


@pytest.fixture
def keys(tmp_path) -> KeyStore:
    """Give the API's file of keys."""
    return KeyStore(tmp_path / "keys.jsonl")


@pytest.fixture
def stack(unstarted, keys: KeyStore):
    """Give an API with keys and buckets of its own."""
    unstarted.environment |= {
        "RESTAGE__AUTH__MODE": "keys",
        "RESTAGE__AUTH__KEYS_FILE": str(keys.path),
        "RESTAGE__STORE__UPLOADS_BUCKET": "day-uploads",
        "RESTAGE__STORE__OUTPUTS_BUCKET": "day-outputs",
    }
    unstarted.start("api")
    unstarted.wait_api()
    return unstarted


@pytest.fixture
def day(stack, make_client, keys: KeyStore) -> Day:
    """Open the day, before the workers come in."""
    return Day(stack, make_client, keys)


def cut_and_resume(client, batch_id: str) -> list[tuple[str, str]]:
    """Follow a batch over connections that are cut after each third event; returns its changes of state."""
    told: list[tuple[str, str]] = []
    last_id: str | None = None
    for _ in range(200):
        headers = dict(client.http.headers) | ({} if last_id is None else {"Last-Event-ID": last_id})
        with httpx.stream(
            "GET", f"{client.http.base_url}/v1/batches/{batch_id}/events", headers=headers, timeout=60
        ) as stream:
            kind, num_here = "", 0
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    last_id = value
                elif name == "event":
                    kind = value
                elif name == "data" and kind not in {"snapshot", "job.progress"}:
                    told.append((last_id or "", kind))
                    num_here += 1
                    if num_here == 3 or kind == "batch.finished":
                        break
        if told and told[-1][1] == "batch.finished":
            return told
    pytest.fail(f"no end after {told}")


@pytest.mark.timeout(400)
def test_a_day_in_miniature(day: Day, stack, valkey, s3, pass_time, wait_until) -> None:
    """Ten batches of two agencies go their ways; nothing is miscounted or shown to a stranger, and all goes in time."""
    redis_client = valkey.client(decode_responses=True)
    expected = before_the_workers_come(day)
    stack.start_worker()
    stack.start_worker()
    expected |= what_oak_does(day, redis_client)
    expected |= what_elm_does(day, wait_until)
    assert len(day.accepted) == 10

    ends = {batch_id: client.finished(batch_id) for batch_id, client in day.accepted.items()}
    check_counters(ends, redis_client)
    counted = {batch_id: end["counts"] for batch_id, end in ends.items()}
    names = ("succeeded", "failed", "cancelled")
    assert {batch_id: tuple(counts[name] for name in names) for batch_id, counts in counted.items()} == expected
    check_walls(day, ends)
    labelled = next(end for end in ends.values() if end["label"] == "12 Oak St")
    check_archive(day.oak, labelled)
    check_deletion(day.oak, ends)

    store = Store(own_buckets(s3.settings))
    try:
        # A week later photos and results are gone, and the records remain.
        pass_time(redis_client, 8 * DAY_SECONDS)
        wait_until(lambda: not objects(store), 60)
        check_a_week_later(day, ends, labelled)
        # A month later nothing is left, and an hour after that no word of it either.
        pass_time(redis_client, 30 * DAY_SECONDS)
        wait_until(lambda: not redis_client.exists("restage:shelf:*:all"), 60)
        pass_time(redis_client, 2 * 3600)
        assert left_in(redis_client) == []
        assert objects(store) == []
    finally:
        store.close()
    for client in (day.oak, day.elm):
        assert walk(client, "/v1/batches") == walk(client, "/v1/jobs") == []
    assert walk(day.boss, "/v1/jobs") == []
    assert not [status for client in (day.oak, day.elm, day.boss) for status in client.received if status >= 500]


def before_the_workers_come(day: Day) -> dict[str, tuple[int, int, int]]:
    """One batch is cancelled while it waits, another too but is wanted after all; returns how they must end."""
    never_mind = day.submit(day.elm, day.photos(2), defaults={"model": FLUX})
    assert day.elm.call("POST", f"/v1/batches/{never_mind['id']}/cancel").json()["counts"]["cancelled"] == 2
    after_all = day.submit(day.oak, day.photos(2), defaults={"model": FLUX})
    assert day.oak.call("POST", f"/v1/batches/{after_all['id']}/cancel").status_code == 200
    assert day.oak.call("POST", f"/v1/batches/{after_all['id']}/retry").json()["counts"]["queued"] == 2
    return {never_mind["id"]: (0, 0, 2), after_all["id"]: (2, 0, 0)}


def what_oak_does(day: Day, redis_client) -> dict[str, tuple[int, int, int]]:
    """Own settings for each photo, the same photos again, a request sent twice, a batch followed over a bad line."""
    oak = day.oak
    settings: list[dict[str, Any]] = [
        {"model": QWEN, "room_type": "bedroom", "params": {"seed": 1, "num_inference_steps": 2}},
        {"model": FLUX, "style": "industrial", "output": {"format": "png"}},
        {"model": FLUX, "prompt": "a red sofa", "output": {"format": "jpeg", "quality": 90, "size": "input"}},
        {"params": {"aspect_ratio": "1:1"}, "metadata": {"sku": "7"}},
    ]
    mixed = day.submit(oak, day.photos(4), settings, defaults={"model": FLUX}, label="12 Oak St")

    items = [{"upload_id": job["input"]["upload_id"], "style": "traditional"} for job in mixed["jobs"][:2]]
    body = {"defaults": {"model": FLUX}, "items": items}
    again = day.remember(oak, oak.call("POST", "/v1/batches", json=body | {"label": "again"}))
    first, second = (
        day.remember(oak, oak.call("POST", "/v1/batches", json=body, headers={"Idempotency-Key": "one"}))
        for _ in range(2)
    )
    assert first["id"] == second["id"]

    watched = day.submit(oak, day.photos(3), defaults={"model": FLUX}, priority="high")
    told = cut_and_resume(oak, watched["id"])
    stream: Any = redis_client.xrange(f"restage:batch:{watched['id']}:events")
    assert told == [(entry_id, fields["type"]) for entry_id, fields in stream]
    return {mixed["id"]: (4, 0, 0), again["id"]: (2, 0, 0), first["id"]: (2, 0, 0), watched["id"]: (3, 0, 0)}


def what_elm_does(day: Day, wait_until) -> dict[str, tuple[int, int, int]]:
    """Bad photos among good ones, a retry that fails again, a job stopped while it runs, and a form from a shell."""
    elm = day.elm
    partly = day.submit(elm, day.photos(2) | {"text.png": b"no photo at all"}, defaults={"model": FLUX})
    broken = day.submit(elm, day.photos(1) | {"cut.jpg": cut_jpeg()}, defaults={"model": FLUX})
    assert elm.finished(broken["id"])["counts"]["failed"] == 1
    assert elm.call("POST", f"/v1/batches/{broken['id']}/retry").json()["status"] in {"queued", "running"}

    long = {"params": {"num_inference_steps": 100, "height": 384, "width": 384}}
    stopped = day.submit(elm, day.photos(3), [long, {}, {}], defaults={"model": FLUX})
    long_id = stopped["jobs"][0]["id"]
    wait_until(lambda: elm.call("GET", f"/v1/jobs/{long_id}").json()["progress"], 120)
    assert elm.call("POST", f"/v1/jobs/{long_id}/cancel").status_code == 200

    form = {"items": [{"file": "photo1", "name": "den.png"}], "defaults": {"model": FLUX}}
    parts = {
        "batch": (None, json.dumps(form), "application/json"),
        "photo1": ("den.png", photo(1000), "image/png"),
    }
    as_form = day.remember(elm, elm.call("POST", "/v1/batches", files=parts))
    return {
        partly["id"]: (2, 0, 0),
        broken["id"]: (1, 1, 0),
        stopped["id"]: (2, 0, 1),
        as_form["id"]: (1, 0, 0),
    }


def check_deletion(oak, ends: dict[str, Any]) -> None:
    """A deleted batch is gone at once; what another batch needs of it stays."""
    again = next(end for end in ends.values() if end["label"] == "again")
    shared = again["jobs"][0]["input"]["upload_id"]
    assert oak.call("DELETE", f"/v1/batches/{again['id']}").status_code == 204
    assert oak.call("GET", f"/v1/batches/{again['id']}").status_code == 404
    item = {"upload_id": shared, "model": FLUX}
    reused = oak.submit({"items": [item]})
    assert oak.finished(reused["id"])["counts"]["succeeded"] == 1


def check_a_week_later(day: Day, ends: dict[str, Any], labelled: dict[str, Any]) -> None:
    """The record still says how it went, and that the pictures are gone."""
    oak, elm = day.oak, day.elm
    job = oak.call("GET", f"/v1/batches/{labelled['id']}").json()["jobs"][0]
    assert (job["status"], job["output"]) == ("succeeded", None)
    assert oak.call("GET", f"/v1/jobs/{job['id']}/output").json()["code"] == "output_expired"
    assert oak.call("GET", f"/v1/batches/{labelled['id']}/archive").json()["code"] == "output_expired"
    broken_id = next(batch_id for batch_id, end in ends.items() if end["counts"]["failed"])
    assert elm.call("POST", f"/v1/batches/{broken_id}/retry").json()["code"] == "input_expired"


def check_counters(ends: dict[str, Any], redis_client) -> None:
    """Each batch counts what its jobs are, and each of its rounds has ended once."""
    for batch_id, end in ends.items():
        found = Counter(job["status"] for job in end["jobs"])
        assert {status: number for status, number in end["counts"].items() if number and status != "total"} == found
        assert end["counts"]["total"] == len(end["jobs"])
        told = redis_client.xrange(f"restage:batch:{batch_id}:events")
        rounds = [json.loads(fields["data"])["round"] for _, fields in told if fields["type"] == "batch.finished"]
        assert rounds == list(range(1, len(rounds) + 1))
        assert len(rounds) == int(redis_client.hget(f"restage:batch:{batch_id}", "round"))
    assert redis_client.scard("restage:open") == 0


def check_archive(client, batch: dict[str, Any]) -> None:
    """The zip holds every result under a name that tells its place, and the record of the batch."""
    response = client.call("GET", f"/v1/batches/{batch['id']}/archive")
    assert response.status_code == 200
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert [name[:4] for name in names] == ["001-", "002-", "003-", "004-", "mani"]
        assert [name.rsplit(".")[-1] for name in names] == ["webp", "png", "jpg", "webp", "json"]
        manifest = json.loads(archive.read("manifest.json"))
        assert manifest["id"] == batch["id"]
        for job, shown in zip(batch["jobs"], manifest["jobs"], strict=True):
            assert hashlib.sha256(archive.read(shown["output"]["file"])).hexdigest() == job["output"]["sha256"]
            assert shown["params"] == job["params"]
            assert "url" not in shown["output"]


def check_walls(day: Day, ends: dict[str, Any]) -> None:
    """Each agency lists its own work only, and the other's is as if it were not there; the operator sees all jobs."""
    for client in (day.oak, day.elm):
        own = {batch_id for batch_id, who in day.accepted.items() if who is client}
        assert {batch["id"] for batch in walk(client, "/v1/batches")} == own
        assert {job["batch_id"] for job in walk(client, "/v1/jobs")} == own
        for batch_id in ends.keys() - own:
            job_id = ends[batch_id]["jobs"][0]["id"]
            for method, path in (
                ("GET", f"/v1/batches/{batch_id}"),
                ("GET", f"/v1/batches/{batch_id}/events"),
                ("GET", f"/v1/batches/{batch_id}/archive"),
                ("POST", f"/v1/batches/{batch_id}/cancel"),
                ("POST", f"/v1/batches/{batch_id}/retry"),
                ("DELETE", f"/v1/batches/{batch_id}"),
                ("GET", f"/v1/jobs/{job_id}"),
                ("GET", f"/v1/jobs/{job_id}/output"),
                ("POST", f"/v1/jobs/{job_id}/cancel"),
                ("POST", f"/v1/jobs/{job_id}/retry"),
            ):
                assert client.call(method, path).status_code == 404, (method, path)
    failed = walk(day.boss, "/v1/jobs?status=failed")
    assert [job["error"]["code"] for job in failed] == ["invalid_input"]
    assert {job["batch_id"] for job in walk(day.boss, "/v1/jobs")} == ends.keys()


def walk(client, path: str) -> list[dict[str, Any]]:
    """Read a list to its end, in small pages."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        params = {"limit": 3} if cursor is None else {"limit": 3, "cursor": cursor}
        response = client.http.get(path, params=httpx.URL(path).params.merge(params))
        assert response.status_code == 200, response.text
        page = response.json()
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def own_buckets(settings: StoreSettings) -> StoreSettings:
    return settings.model_copy(update={"uploads_bucket": "day-uploads", "outputs_bucket": "day-outputs"})


def objects(store: Store) -> list[str]:
    """List everything in both buckets."""
    buckets = ("day-uploads", "day-outputs")
    return [
        found.object_name or "" for bucket in buckets for found in store._client.list_objects(bucket, recursive=True)
    ]


def left_in(redis_client) -> list[str]:
    """List the ledger's keys that are nobody's by now; tests beside this one have ledgers of other names."""
    return [key for key in redis_client.scan_iter("restage:*") if not key.startswith(STANDING)]
