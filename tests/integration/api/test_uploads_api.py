"""Forms for uploads: who gets one, and what the store then takes."""

import hashlib
import io

import httpx
import pytest
from PIL import Image


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


def test_fifty_forms_cost_one_round_trip(api):
    """As many forms as a batch has items are written to Redis in one transaction."""
    before = api.redis.info("commandstats").get("cmdstat_exec", {"calls": 0})["calls"]
    response = ask(api, *[announced(b"x" * (number + 1)) for number in range(50)])
    assert response.status_code == 201
    assert len({form["upload_id"] for form in response.json()["uploads"]}) == 50
    assert api.redis.info("commandstats")["cmdstat_exec"]["calls"] == before + 1
    ttl = api.redis.ttl(f"restage:upload:{response.json()['uploads'][0]['upload_id']}")
    assert 86_000 < ttl <= 86_400
