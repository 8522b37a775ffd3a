"""A batch and its photos in one form: what is accepted, what is refused, and that nothing is stored twice."""

import asyncio
import hashlib
import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

QWEN = "tiny-qwen-image-edit-2511"
HEIC = b"\0\0\0\x18ftypheic" + bytes(200)
FORM = "multipart/form-data; boundary=x"


def picture(color: Any = "red", size=(160, 120), image_format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, image_format)
    return buffer.getvalue()


def submit(api, items, files, *, headers=None, **body):
    """Send a form; `files` are (part, filename, bytes), and a part named `batch` says where the JSON shall stand."""
    batch = ("batch", (None, json.dumps({"items": items, **body}).encode(), "application/json"))
    parts = [batch if part == "batch" else (part, (filename, data)) for part, filename, data in files]
    return api.http.post("/v1/batches", files=parts if batch in parts else [batch, *parts], headers=headers)


def send(api, body, content_type=FORM):
    return api.http.post("/v1/batches", content=body, headers={"Content-Type": content_type})


def codes(response):
    return {error["index"]: error["code"] for error in response.json()["errors"]}


def places(response):
    return [(error["location"], error["code"]) for error in response.json()["errors"]]


def uploads(api):
    """The records of all uploads."""
    keys = [key for key in api.redis.keys("restage:upload:*") if key.count(":") == 2]
    return [api.redis.hgetall(key) for key in keys]


def num_batches(api):
    return len([key for key in api.redis.keys("restage:batch:*") if key.count(":") == 2])


def check_problem(response, status, code, text=""):
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert text in response.json()["detail"]


def test_a_form_becomes_a_batch(api):
    """Photos beside the JSON are staged like uploads; the item names the result, else its file does."""
    hall, bedroom = picture("red"), picture("blue", (120, 160), "PNG")
    response = submit(
        api,
        [{"file": "photo1", "name": "The hall"}, {"file": "photo2", "room_type": "bedroom"}, {"file": "photo1"}],
        [("photo2", '../rooms/Küche "2".png', bedroom), ("batch", None, b""), ("photo1", "hall.jpg", hall)],
        label="12 Oak St",
        priority="low",
        defaults={"model": QWEN, "params": {"seed": 7}},
    )
    assert response.status_code == 201, response.text
    batch = response.json()["batch"]
    assert response.headers["location"] == f"/v1/batches/{batch['id']}"
    assert (batch["label"], batch["priority"], batch["counts"]["total"]) == ("12 Oak St", "low", 3)
    first, second, again = batch["jobs"]
    assert [job["name"] for job in batch["jobs"]] == ["The hall", 'Küche "2".png', "hall.jpg"]
    assert first["input"]["upload_id"] == again["input"]["upload_id"] != second["input"]["upload_id"]
    assert second["input"]["sha256"] == hashlib.sha256(bedroom).hexdigest()
    assert (second["input"]["height"], second["input"]["width"]) == (160, 120)
    assert "bedroom" in second["prompt"]
    assert api.http.get(response.headers["location"]).json() == batch
    job = api.run_next()
    assert api.store.fetch_upload(job.inputs[0].key, job.inputs[0].etag) == hall
    stored = {record["filename"]: record for record in uploads(api)}
    assert {name: record["content_type"] for name, record in stored.items()} == {
        "hall.jpg": "image/jpeg",
        'Küche "2".png': "image/png",
    }
    assert stored["hall.jpg"]["references"] == "2"


def test_the_same_bytes_are_stored_once(api):
    """Two parts of the same bytes become one upload, and a later form finds it."""
    data = picture("green")
    first = submit(api, [{"file": "a"}, {"file": "b"}], [("a", "a.jpg", data), ("b", "b.jpg", data)]).json()["batch"]
    later = submit(api, [{"file": "c"}], [("c", "c.jpg", data)]).json()["batch"]
    assert len({job["input"]["upload_id"] for job in [*first["jobs"], *later["jobs"]]}) == 1
    assert [job["name"] for job in [*first["jobs"], *later["jobs"]]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert len(uploads(api)) == 1


def test_a_form_may_name_uploads_too(api):
    """Items of one form take their photos from where they say; a form without any file is a batch as well."""
    [upload_id] = api.upload(picture())
    mixed = submit(api, [{"upload_id": upload_id}, {"file": "a"}], [("a", "a.jpg", picture("blue"))])
    assert mixed.status_code == 201, mixed.text
    alone = submit(api, [{"upload_id": upload_id}], [])
    assert alone.status_code == 201, alone.text


def test_files_that_are_no_photos_cost_their_items_only(open_api):
    """Each bad file is refused as it would be from the store, none of them goes there, and the others go on."""
    files = {
        "good": picture(),
        "empty": b"",
        "heic": HEIC,
        "text": b"These are words. " * 20,
        "cut": picture()[:30],
        "small": picture(size=(160, 20)),
        "large": picture() + bytes(50_001),
        "form": b"--y\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--y--",
        "many pixels": picture(size=(2000, 1000), image_format="PNG"),
    }
    with open_api(RESTAGE__LIMITS__MAX_UPLOAD_BYTES="50000", RESTAGE__LIMITS__MAX_IMAGE_PIXELS="1000000") as api:
        items = [{"file": name} for name in files]
        response = submit(
            api, [*items, {"file": "good", "model": "sdxl"}], [(name, "a.jpg", files[name]) for name in files]
        )
        assert response.status_code == 207, response.text
        assert codes(response) == {
            1: "unsupported_format",
            2: "unsupported_format",
            3: "unsupported_format",
            4: "truncated_image",
            5: "photo_too_small",
            6: "file_too_large",
            7: "unsupported_format",
            8: "photo_too_large",
            9: "unknown_model",
        }
        assert response.json()["errors"][0]["location"] == "/items/1/file"
        details = [error["detail"] for error in response.json()["errors"]]
        assert "empty" in details[0]
        assert "HEIC" in details[1]
        assert f"{len(files['large'])} bytes; at most 50000" in details[5]
        assert [job["index"] for job in response.json()["batch"]["jobs"]] == [0]
        assert [record["sha256"] for record in uploads(api)] == [hashlib.sha256(files["good"]).hexdigest()]


def test_a_form_of_which_nothing_can_be_done_stores_nothing(api):
    """Files of items that are refused for their settings stay here, and a batch without jobs is none."""
    response = submit(
        api,
        [{"file": "a", "model": "sdxl"}, {"file": "b"}],
        [("a", "a.jpg", picture()), ("b", "b.heic", HEIC)],
    )
    check_problem(response, 422, "nothing_accepted")
    assert codes(response) == {0: "unknown_model", 1: "unsupported_format"}
    assert (uploads(api), num_batches(api)) == ([], 0)


def test_items_and_files_must_fit_together(api):
    """A file that nobody names, and a name that no file has, are mistakes that are told with their places."""
    photo = picture()
    response = submit(api, [{"file": "a"}, {"file": "c"}], [("a", "a.jpg", photo), ("b", "b.jpg", photo)])
    check_problem(response, 422, "invalid_request", "/items/1/file: the form has no file in a part 'c'")
    assert places(response) == [("/items/1/file", "invalid_value"), ("", "invalid_value")]
    assert "'b'" in response.json()["errors"][1]["detail"]
    check_problem(submit(api, [{"file": "batch"}], []), 422, "invalid_request", "part 'batch'")
    both = submit(api, [{"file": "a", "upload_id": "0" * 32}], [("a", "a.jpg", photo)])
    check_problem(both, 422, "invalid_request", "either upload_id or upload_ids")
    assert uploads(api) == []


def test_json_cannot_name_a_file(api):
    """In a request without files, `file` says what to do instead."""
    response = api.submit({"file": "photo1"}, {"upload_id": "0" * 32})
    check_problem(response, 422, "invalid_request", "multipart/form-data")
    assert places(response) == [("/items/0/file", "invalid_value")]
    assert "POST /v1/uploads" in response.json()["detail"]


def test_mistakes_in_the_json_have_their_places(api):
    """The part `batch` is read as strictly as a JSON request, and what is said of it names the part."""
    photo = ("a", "a.jpg", picture())
    response = submit(api, [{"file": "a", "rooms": "x"}], [photo], label=7)
    check_problem(response, 422, "invalid_request")
    assert places(response) == [("/items/0/rooms", "unknown_field"), ("/label", "invalid_value")]
    many = submit(api, [{"file": "a"}] * 51, [photo])
    assert places(many) == [("/items", "too_many_items")]
    for text in (b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"items": NaN}', b'{"a": 1, "a": 1}'):
        broken = api.http.post("/v1/batches", files=[("batch", (None, text)), ("a", ("a.jpg", picture()))])
        check_problem(broken, 400, "malformed_body", "in the part batch: ")
    for text in (b"null", b'"x"', b"[]"):
        check_problem(api.http.post("/v1/batches", files=[("batch", (None, text))]), 422, "invalid_request")


def test_a_form_has_no_more_files_than_a_batch_has_items(api):
    """50 files are taken, and the 51st is refused whatever else the form holds."""
    photos = [picture((number, 0, 0), (64, 64), "PNG") for number in range(51)]
    files = [(f"p{number}", f"{number}.png", photo) for number, photo in enumerate(photos)]
    items = [{"file": part} for part, _, _ in files]
    refused = submit(api, items[:50], files)
    check_problem(refused, 422, "invalid_request", "at most 50 files")
    assert places(refused) == [("", "too_many_items")]
    assert uploads(api) == []
    accepted = submit(api, items[:50], files[:50])
    assert accepted.status_code == 201, accepted.text
    jobs = accepted.json()["batch"]["jobs"]
    assert [job["input"]["sha256"] for job in jobs] == [hashlib.sha256(photo).hexdigest() for photo in photos[:50]]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code", "text"),
    [
        (b"", FORM, 400, "malformed_body", "last boundary"),
        (b"--x--", FORM, 400, "malformed_body", "no part batch"),
        (b"{}", "multipart/form-data", 400, "malformed_body", "boundary"),
        (b"{}", 'multipart/form-data; boundary=""', 400, "malformed_body", "boundary"),
        (b"{}", f"multipart/form-data; boundary={'x' * 100}", 400, "malformed_body", "boundary"),
        (b"{}", "multipart/mixed; boundary=x", 415, "unsupported_media_type", "multipart/mixed"),
        (b"{}", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "multipart/form-data"),
    ],
)
def test_what_is_no_form_is_refused(api, body, content_type, status, code, text):
    """Mistakes about the form itself have their own texts."""
    check_problem(send(api, body, content_type), status, code, text)


def test_a_text_beside_the_batch_is_refused(api):
    """A setting as a field of its own would silently do nothing, so it is a mistake; a huge one is not held."""
    response = api.http.post("/v1/batches", data={"batch": "{}", "label": "x" * 30_000_000})
    # Without files, clients do not make a form of parts.
    check_problem(response, 415, "unsupported_media_type")
    response = api.http.post("/v1/batches", files=[("label", (None, b"x" * 30_000_000)), ("batch", (None, b"{}"))])
    check_problem(response, 422, "invalid_request", "'label' is not a file")
    response = api.http.post("/v1/batches", files=[("batch", (None, b" " * 1_000_001))])
    check_problem(response, 413, "payload_too_large", "limits.max_body_bytes")


def test_a_form_has_a_limit_as_a_whole(open_api):
    """What no allowed parts can add up to is refused on its announcement, or where it passes the limit."""
    limits = {"RESTAGE__LIMITS__MAX_BATCH_ITEMS": "2", "RESTAGE__LIMITS__MAX_UPLOAD_BYTES": "100000"}
    with open_api(**limits, RESTAGE__LIMITS__MAX_BODY_BYTES="1000") as api:
        item = [{"file": "a"}]
        just_right = submit(api, item, [("a", "a.jpg", picture() + bytes(200_000))])
        assert codes(just_right) == {0: "file_too_large"}
        announced = submit(api, item, [("a", "a.jpg", bytes(400_000))])
        check_problem(announced, 413, "payload_too_large", "321000 bytes")

        def chunks():
            yield b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\n'
            for _ in range(10):
                yield bytes(40_000)

        check_problem(send(api, chunks()), 413, "payload_too_large", "321000 bytes")
        # JSON keeps a limit of its own.
        check_problem(send(api, b" " * 1001, "application/json"), 413, "payload_too_large", "max_body_bytes")


def call_by_hand(api, receive, content_type=FORM):
    """Call the application as a server does whose client sends what `receive` returns; returns status and body."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/batches", "query_string": b"", "headers": headers}
    scope |= {"scheme": "http", "server": ("a", 80), "client": ("b", 1), "root_path": "", "http_version": "1.1"}
    api.http.blocking_portal.call(api.http.app, scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_a_client_that_goes_silent_is_given_up(open_api):
    """A form may take long while bytes come; when none come, its time is up."""
    num_received = 0

    async def receive():
        nonlocal num_received
        num_received += 1
        await asyncio.sleep(0.02 if num_received < 20 else 60)
        return {"type": "http.request", "body": b"\r\n", "more_body": True}

    # Twenty times 20 ms are more than 200; each two bytes earn what they took.
    patience = {"RESTAGE__SERVER__BODY_TIMEOUT_SECONDS": "0.2", "RESTAGE__SERVER__MIN_BODY_BYTES_PER_SECOND": "1"}
    with open_api(**patience) as api:
        status, body = call_by_hand(api, receive)
    assert (status, json.loads(body)["code"], num_received) == (408, "request_timeout", 20)


def test_nothing_is_read_from_strangers(open_api, tmp_path):
    """A form without a key is refused before a byte of it is taken."""
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(tmp_path / "keys.jsonl")) as api:
        num_received = 0

        async def receive():
            nonlocal num_received
            num_received += 1
            return {"type": "http.disconnect"}

        status, body = call_by_hand(api, receive)
        assert (status, json.loads(body)["code"], num_received) == (401, "unauthorized", 0)


def test_a_client_that_vanishes_is_told_apart(api):
    """A connection that ends in the middle of a file ends the request, and nothing is stored."""
    head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\nabc'
    messages = [{"type": "http.request", "body": head, "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    status, body = call_by_hand(api, receive)
    assert (status, json.loads(body)["code"]) == (400, "malformed_body")
    assert uploads(api) == []


def num_open_files():
    targets = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - the listing's own entry is gone when it is read
        try:
            targets.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
        except FileNotFoundError:
            continue
    return sum(target.endswith("(deleted)") for target in targets)


def test_no_file_stays_open(api):
    """Whatever becomes of a form, the room that its files took is free again."""
    before = num_open_files()
    photo = ("a", "a.jpg", picture())
    item = {"file": "a"}
    answers = [
        submit(api, [item], [photo]),
        submit(api, [item], [("a", "a.jpg", HEIC)]),
        submit(api, [item, {"file": "b"}], [photo]),
        submit(api, [{"file": "a", "x": 1}], [photo]),
        submit(api, [item], [photo, photo]),
        api.http.post("/v1/batches", files=[("a", ("a.jpg", picture())), ("batch", (None, b"{"))]),
        send(api, b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\nabc'),
        submit(api, [item], [photo], headers={"Idempotency-Key": "\t"}),
    ]
    assert [answer.status_code for answer in answers] == [201, 422, 422, 422, 400, 400, 400, 422]
    assert num_open_files() == before


def test_a_form_that_comes_again_is_the_same_request(api):
    """The same key, JSON and bytes answer the first result; other bytes or another JSON are refused."""
    key = {"Idempotency-Key": "key-1"}
    items = [{"file": "a"}, {"file": "b"}]
    a, b = ("a", "a.jpg", picture("red")), ("b", "b.heic", HEIC)
    first = submit(api, items, [a, b], headers=key)
    assert first.status_code == 207, first.text
    stored = uploads(api)
    [record] = stored
    # Nothing is sent to the store again: not even what it has lost meanwhile.
    api.store._client.remove_object(api.settings.store.uploads_bucket, record["key"])
    again = submit(api, items, [b, a, ("batch", None, b"")], headers=key)
    assert (again.status_code, again.json()) == (207, first.json())
    assert again.headers["location"] == first.headers["location"]
    for other in (
        submit(api, items, [("a", "a.jpg", picture("blue")), b], headers=key),
        submit(api, items, [("a", "a.jpg", HEIC), ("b", "b.heic", a[2])], headers=key),
        submit(api, items, [a, b], headers=key, label="x"),
        api.submit({"upload_id": record["id"]}, headers=key),
    ):
        check_problem(other, 409, "idempotency_conflict")
    assert uploads(api) == stored
    assert num_batches(api) == 1


def test_a_form_without_files_is_the_same_request_as_its_json(api):
    """How the same body comes makes no difference to its key."""
    [upload_id] = api.upload(picture())
    key = {"Idempotency-Key": "key-1"}
    first = api.submit({"upload_id": upload_id}, headers=key)
    again = submit(api, [{"upload_id": upload_id}], [], headers=key)
    assert (again.status_code, again.json()["batch"]["id"]) == (201, first.json()["batch"]["id"])


def test_forms_that_race_under_one_key_make_one_batch(api):
    """Twenty identical forms at once name the same batch, and only one exists."""
    photos = [("a", "a.jpg", picture("red")), ("b", "b.jpg", picture("blue"))]
    items = [{"file": "a"}, {"file": "b"}]
    with ThreadPoolExecutor(20) as threads:
        answers = list(
            threads.map(lambda _: submit(api, items, photos, headers={"Idempotency-Key": "key-1"}), range(20))
        )
    assert {answer.status_code for answer in answers} == {201}, [answer.text for answer in answers]
    assert len({answer.json()["batch"]["id"] for answer in answers}) == 1
    assert num_batches(api) == 1
    # What lost the race is named by nobody, so it expires like any unused upload.
    used = [record for record in uploads(api) if record["references"] != "0"]
    assert [record["references"] for record in used] == ["1", "1"]


def test_a_batch_that_is_refused_leaves_only_unused_uploads(open_api):
    """When the queue is full, the photos that were stored for the batch are named by nobody."""
    with open_api(RESTAGE__LIMITS__MAX_OPEN_JOBS="1") as api:
        response = submit(api, [{"file": "a"}] * 2, [("a", "a.jpg", picture())])
        check_problem(response, 503, "queue_full")
        assert [record["references"] for record in uploads(api)] == ["0"]
        assert submit(api, [{"file": "a"}], [("a", "a.jpg", picture())]).status_code == 201


def test_without_the_store_nothing_is_accepted(open_api, s3):
    """A silent store makes the form 503, and the same form is accepted when the store is back."""
    photos = [(f"p{number}", "a.png", picture((number, 0, 0), image_format="PNG")) for number in range(8)]
    items = [{"file": part} for part, _, _ in photos]
    with open_api(RESTAGE__STORE__READ_TIMEOUT_SECONDS="1") as api:
        os.kill(s3.server.child.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            check_problem(submit(api, items, photos), 503, "store_unavailable")
            assert time.monotonic() - started < 10
        finally:
            os.kill(s3.server.child.pid, signal.SIGCONT)
        assert num_batches(api) == 0
        assert submit(api, items, photos).status_code == 201


def test_the_openapi_document_describes_both_bodies(api):
    """Programs that read the document find the JSON and the form, with the same JSON in both."""
    document = api.http.get("/openapi.json").json()
    content = document["paths"]["/v1/batches"]["post"]["requestBody"]["content"]
    reference = {"$ref": "#/components/schemas/BatchRequest"}
    assert content["application/json"]["schema"] == reference
    form = content["multipart/form-data"]
    assert form["schema"]["properties"]["batch"] == reference
    assert form["schema"]["properties"]["photo1"]["format"] == "binary"
    assert form["schema"]["required"] == ["batch"]
    assert form["schema"]["additionalProperties"]["format"] == "binary"
    assert form["encoding"]["batch"]["contentType"] == "application/json"
    assert "file" in document["components"]["schemas"]["ItemRequest"]["properties"]
    for path, item in document["paths"].items():
        if path != "/v1/batches" and "requestBody" in item.get("post", {}):
            assert list(item["post"]["requestBody"]["content"]) == ["application/json"], path
