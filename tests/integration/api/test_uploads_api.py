"""Forms for uploads: who gets one, and what the store then takes."""

import hashlib
import io

import httpx
import pytest
from PIL import Image

from server.errors import ObjectNotFound
from server.keys import KeyStore


def picture(size=(80, 80)):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def ask(api, *files):
    return api.http.post("/v1/uploads", json={"files": list(files)})


def announced(data, **changes):
    return {"filename": "a.png", "content_type": "image/png", "size_bytes": len(data)} | changes


def test_a_form_lets_the_photo_straight_into_the_store(api):
    """The store takes the announced bytes, and refuses other sizes and, with a digest, other bytes."""
    data = picture()
    other = data[:-1] + b"x"
    response = ask(api, announced(data, sha256=hashlib.sha256(data).hexdigest().upper()))
    assert response.status_code == 201
    [form] = response.json()["uploads"]
    assert (form["index"], form["method"], form["max_size_bytes"]) == (0, "POST", len(data))
    for wrong in (other, data + b"x", data[:-1]):
        assert not httpx.post(form["url"], data=form["fields"], files={"file": wrong}).is_success
    assert httpx.post(form["url"], data=form["fields"], files={"file": data}).is_success
    [job] = api.accept({"upload_id": form["upload_id"]})["jobs"]
    assert job["input"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_files_that_cannot_be_taken_are_named_and_the_others_get_forms(open_api):
    """A type that is no photo and a size over the limit are refused by index."""
    with open_api(RESTAGE__LIMITS__MAX_UPLOAD_BYTES="1000") as api:
        response = ask(
            api,
            announced(b"x", content_type="image/gif"),
            announced(b"x", content_type="IMAGE/PNG"),
            announced(b"x" * 1001),
        )
        assert response.status_code == 207
        assert [form["index"] for form in response.json()["uploads"]] == [1]
        assert [(error["index"], error["code"]) for error in response.json()["errors"]] == [
            (0, "unsupported_content_type"),
            (2, "file_too_large"),
        ]
        refused = ask(api, announced(b"x" * 1001))
    assert (refused.status_code, refused.json()["code"]) == (422, "nothing_accepted")
    assert refused.json()["errors"][0]["location"] == "/files/0"


@pytest.mark.parametrize(
    ("body", "locations"),
    [
        ({"files": []}, ["/files"]),
        ({"files": [announced(b"x")] * 51}, ["/files"]),
        ({"files": [announced(b"")]}, ["/files/0/size_bytes"]),
        ({"files": [announced(b"x", size_bytes="5")]}, ["/files/0/size_bytes"]),
        ({"files": [announced(b"x", sha256="5")]}, ["/files/0/sha256"]),
        ({"files": [announced(b"x", name="a")]}, ["/files/0/name"]),
        ({"files": [{}]}, ["/files/0/filename", "/files/0/content_type", "/files/0/size_bytes"]),
    ],
)
def test_a_wrong_request_for_forms_is_refused_with_pointers(api, body, locations):
    """Mistakes in the request itself refuse it whole."""
    response = api.http.post("/v1/uploads", json=body)
    assert response.status_code == 422
    assert [error["location"] for error in response.json()["errors"]] == locations


def test_fifty_forms_cost_one_round_trip(open_api):
    """As many forms as a batch has items are written to Redis in one script."""
    with open_api(RESTAGE__SWEEP__INTERVAL_SECONDS="1000", RESTAGE__WORKER__LEASE_SECONDS="5000") as api:
        ask(api, announced(b"x"))

        def num_scripts():
            return api.redis.info("commandstats")["cmdstat_evalsha"]["calls"]

        def count():
            before = num_scripts()
            response = ask(api, *[announced(b"x" * (number + 1)) for number in range(50)])
            assert response.status_code == 201
            assert len({form["upload_id"] for form in response.json()["uploads"]}) == 50
            return num_scripts() - before

        # Others that use this Redis now and then are counted too.
        assert min(count() for _ in range(3)) == 1


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def photo(number):
    """Draw a photo that no other test has sent."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (80, 80), (number % 256, number // 256, 77))
    image.save(buffer, "PNG", pnginfo=None)
    return buffer.getvalue()


def announce_one(api, data, headers=None, **changes):
    """Ask for one form; returns the entry of the answer."""
    file = announced(data, sha256=sha256(data)) | changes
    response = api.http.post("/v1/uploads", json={"files": [file]}, headers=headers)
    assert response.status_code == 201, response.text
    [upload] = response.json()["uploads"]
    return upload


def send(form, data):
    sent = httpx.post(form["url"], data=form["fields"], files={"file": data})
    assert sent.is_success, sent.text
    return form["upload_id"]


def upload_is_stored(api, upload_id):
    try:
        api.store.read_start(upload_id, 1)
    except ObjectNotFound:
        return False
    return True


def test_bytes_that_are_known_need_not_be_sent_again(api, pass_time):
    """Once a batch has named an upload and its form has ended, the same file is answered with its id alone."""
    data = photo(1)
    first = send(announce_one(api, data), data)
    assert "url" in announce_one(api, data), "nobody has looked at the photo yet"
    api.accept({"upload_id": first})
    assert "url" in announce_one(api, data), "its form could still change it"
    pass_time(api.redis, api.settings.limits.form_ttl_seconds - 60)
    assert "url" in announce_one(api, data)
    pass_time(api.redis, 150)

    upload = announce_one(api, data, filename="another name.png", sha256=sha256(data).upper())
    assert upload == {"upload_id": first, "index": 0, "exists": True}
    [job] = api.accept({"upload_id": upload["upload_id"]})["jobs"]
    assert job["input"] == {"upload_id": first, "sha256": sha256(data), "width": 80, "height": 80}
    assert api.run_next()


def test_known_and_new_files_are_answered_in_one_list(api, pass_time):
    """Each entry says by its index which file it is for, whether it is a form or not; 201 also when all exist."""
    known, new = photo(2), photo(3)
    upload_id = send(announce_one(api, known), known)
    api.accept({"upload_id": upload_id})
    pass_time(api.redis, 1000)
    files = [announced(data, sha256=sha256(data)) for data in (new, known, b"x", known)]
    files[2]["content_type"] = "text/plain"
    response = ask(api, *files)
    assert response.status_code == 207
    assert [(one["index"], one.get("exists", False)) for one in response.json()["uploads"]] == [
        (0, False),
        (1, True),
        (3, True),
    ]
    assert [error["index"] for error in response.json()["errors"]] == [2]
    response = ask(api, *[announced(known, sha256=sha256(known))] * 50)
    assert (response.status_code, response.json()["errors"]) == (201, [])
    assert response.json()["uploads"] == [
        {"upload_id": upload_id, "index": index, "exists": True} for index in range(50)
    ]


def test_only_the_very_same_file_counts_as_known(api, pass_time):
    """Another type or size under the same digest, and a file without a digest, get forms."""
    data = photo(4)
    api.accept({"upload_id": send(announce_one(api, data), data)})
    pass_time(api.redis, 1000)
    assert "url" in announce_one(api, data, content_type="image/jpeg")
    assert "url" in announce_one(api, data, size_bytes=len(data) + 1)
    assert "url" in announce_one(api, data, sha256=None)
    assert "url" in announce_one(api, data, sha256="0" * 64)
    assert announce_one(api, data)["exists"] is True


def test_nobody_learns_whether_another_owner_has_a_file(open_api, tmp_path, pass_time):
    """The same bytes of another owner get a form like any others."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    drawn = {"ana": keys.add("ana", "user"), "ben": keys.add("ben", "user"), "op": keys.add("op", "admin")}
    who = {name: {"Authorization": f"Bearer {key}"} for name, key in drawn.items()}
    data = photo(5)
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path)) as api:
        upload_id = send(announce_one(api, data, who["ana"]), data)
        assert api.submit({"upload_id": upload_id}, headers=who["ana"]).status_code == 201
        pass_time(api.redis, 1000)
        assert announce_one(api, data, who["ana"])["exists"] is True
        for other in ("ben", "op"):
            form = announce_one(api, data, who[other])
            assert "url" in form
            refused = api.submit({"upload_id": upload_id}, headers=who[other])
            assert refused.json()["errors"][0]["code"] == "upload_not_found"
            # Their own copy is theirs alone, too.
            assert api.submit({"upload_id": send(form, data)}, headers=who[other]).status_code == 201


def test_a_file_that_was_never_sent_is_never_known(api, pass_time):
    """A form that nobody used, or that got other bytes, makes nothing known, whatever digest was announced."""
    data = photo(6)
    form = announce_one(api, data)
    refused = httpx.post(form["url"], data=form["fields"], files={"file": data[:-1] + b"x"})
    assert not refused.is_success
    assert api.submit({"upload_id": form["upload_id"]}).status_code == 422
    pass_time(api.redis, 1000)
    assert "url" in announce_one(api, data)


def test_an_offered_upload_outlives_the_batch_that_had_it(api, pass_time, wait_until):
    """Between the offer and the new batch the photo stays as long as any upload that waits for its batch."""
    data = photo(7)
    upload_id = send(announce_one(api, data), data)
    batch = api.accept({"upload_id": upload_id})
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    pass_time(api.redis, 1000)
    assert announce_one(api, data)["exists"] is True
    assert api.http.delete(f"/v1/batches/{batch['id']}").status_code == 204
    pass_time(api.redis, 23 * 3600)
    wait_until(lambda: api.redis.zcard("restage:unused") == 1)
    [job] = api.accept({"upload_id": upload_id})["jobs"]
    assert upload_is_stored(api, upload_id)
    api.http.post(f"/v1/batches/{job['batch_id']}/cancel")
    pass_time(api.redis, 8 * 24 * 3600)
    wait_until(lambda: not upload_is_stored(api, upload_id))
    assert api.redis.keys("restage:digest:*") == []
    assert "url" in announce_one(api, data)


def test_an_offer_that_nobody_takes_up_ends(api, pass_time, wait_until):
    """An offered upload without a batch goes after its time, and is then offered to nobody."""
    data = photo(8)
    upload_id = send(announce_one(api, data), data)
    batch = api.accept({"upload_id": upload_id})
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    pass_time(api.redis, 1000)
    announce_one(api, data)
    api.http.delete(f"/v1/batches/{batch['id']}")
    pass_time(api.redis, 25 * 3600)
    wait_until(lambda: not upload_is_stored(api, upload_id))
    response = api.submit({"upload_id": upload_id})
    assert response.json()["errors"][0]["code"] == "upload_not_found"
    assert "url" in announce_one(api, data)


def test_a_client_that_does_not_know_offers_is_served_with_forms(api, pass_time):
    """Without a digest in its request a client gets nothing but forms; a form that it kept past its time is refused."""
    data = photo(9)
    form = announce_one(api, data)
    api.accept({"upload_id": send(form, data)})
    pass_time(api.redis, 1000)
    [again] = api.announce(data, content_type="image/png")
    assert again["upload_id"] != form["upload_id"]
    api.accept({"upload_id": send(again, data)})


def test_an_unused_upload_goes_with_its_bytes(api, pass_time, wait_until):
    """A photo that no batch ever names is forgotten after a day, and its bytes with it; an unused form, too."""
    data = photo(10)
    sent = send(announce_one(api, data), data)
    announce_one(api, photo(11))
    pass_time(api.redis, 23 * 3600)
    assert upload_is_stored(api, sent)
    pass_time(api.redis, 2 * 3600)
    wait_until(lambda: not upload_is_stored(api, sent))
    wait_until(lambda: not list(api.redis.scan_iter("restage:upload:*")))
    assert api.submit({"upload_id": sent}).json()["errors"][0]["code"] == "upload_not_found"


def test_a_known_photo_that_the_store_has_lost_is_asked_for_again(api, pass_time):
    """Where somebody has removed it from the store, the batch says so, and the next request gets a form."""
    data = photo(12)
    upload_id = send(announce_one(api, data), data)
    api.accept({"upload_id": upload_id})
    pass_time(api.redis, 1000)
    assert api.store.delete([f"uploads/{upload_id}"])
    assert announce_one(api, data) == {"upload_id": upload_id, "index": 0, "exists": True}
    refused = api.submit({"upload_id": upload_id})
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "upload_not_found")
    assert "send it again" in refused.json()["errors"][0]["detail"]
    form = announce_one(api, data)
    api.accept({"upload_id": send(form, data)})
    pass_time(api.redis, 1000)
    assert announce_one(api, data) == {"upload_id": form["upload_id"], "index": 0, "exists": True}


def test_an_old_photo_is_not_offered(open_api, pass_time):
    """The store's own lifecycle may remove what is very old, so a photo is offered for a bounded time only."""
    retention = {f"RESTAGE__RETENTION__{name}_SECONDS": "5000" for name in ("INPUTS", "OUTPUTS", "RECORDS")}
    with open_api(**retention) as api:
        data = photo(13)
        upload_id = send(announce_one(api, data), data)
        api.accept({"upload_id": upload_id})
        pass_time(api.redis, 5000)
        assert announce_one(api, data)["upload_id"] == upload_id
        pass_time(api.redis, 1000)
        assert "url" in announce_one(api, data)
        api.accept({"upload_id": upload_id})
