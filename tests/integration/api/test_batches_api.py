"""From uploads to an accepted batch over HTTP: what is accepted, what is refused, and what the answer says."""

import io
import json

import httpx
import pytest
from PIL import Image

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"


def picture(image_format="JPEG", size=(160, 120), **options):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, image_format, **options)
    return buffer.getvalue()


def codes(response):
    return {error["index"]: error["code"] for error in response.json()["errors"]}


def test_a_batch_is_accepted_with_every_setting_resolved(api):
    """Defaults, overrides and what both leave out end up in the record; the answer names where the batch is."""
    turned = picture(size=(160, 120), exif=_turned())
    first, second = api.upload(picture(), turned)
    response = api.submit(
        {"upload_id": first, "name": "hall.jpg"},
        {
            "upload_id": second,
            "room_type": "bedroom",
            "model": FLUX,
            "params": {"guidance_scale": 3, "num_inference_steps": 2},
            "output": {"format": "png"},
            "metadata": {"sku": "7"},
        },
        defaults={
            "model": QWEN,
            "room_type": "living_room",
            "style": "industrial",
            "params": {"seed": 7},
            "output": {"quality": 90, "metadata": False},
        },
        label="12 Oak St",
        metadata={"mls": "123"},
        priority="low",
    )
    assert response.status_code == 201, response.text
    assert response.json()["errors"] == []
    batch = response.json()["batch"]
    assert response.headers["location"] == f"/v1/batches/{batch['id']}"
    assert (batch["status"], batch["label"], batch["metadata"], batch["priority"]) == (
        "queued",
        "12 Oak St",
        {"mls": "123"},
        "low",
    )
    assert batch["counts"] == {"total": 2, "queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    hall, bedroom = batch["jobs"]
    assert (hall["index"], hall["name"], hall["model"], hall["status"]) == (0, "hall.jpg", QWEN, "queued")
    assert hall["params"] == {
        "seed": 7,
        "aspect_ratio": "match_input",
        "height": 112,
        "width": 144,
        "num_inference_steps": hall["params"]["num_inference_steps"],
        "true_cfg_scale": hall["params"]["true_cfg_scale"],
    }
    assert "living" in hall["prompt"]
    assert hall["input"] == {"upload_id": first, "sha256": None, "width": 160, "height": 120}
    assert (bedroom["model"], bedroom["metadata"]) == (FLUX, {"sku": "7"})
    assert "bedroom" in bedroom["prompt"]
    assert bedroom["params"]["guidance_scale"] == 3
    assert bedroom["params"]["seed"] == 7
    # The photo is shown upright: height and width change places.
    assert bedroom["input"] == {"upload_id": second, "sha256": None, "width": 120, "height": 160}
    assert bedroom["params"]["height"] > bedroom["params"]["width"]
    stored = json.loads(api.redis.hget(f"restage:job:{bedroom['id']}", "request"))
    assert stored["output_spec"] == {"format": "png", "quality": 90, "size": "model", "metadata": False}
    assert api.http.get(response.headers["location"]).json() == batch


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_what_is_left_out_is_chosen_and_recorded(api):
    """Model, prompt, seed and sizes are in the record even when the request names none; seeds differ."""
    [upload_id] = api.upload(picture())
    batch = api.accept({"upload_id": upload_id}, {"upload_id": upload_id})
    one, other = batch["jobs"]
    assert one["model"] == api.settings.models.default
    assert one["model_version"]
    presets = api.http.get("/v1/presets").json()["data"]
    [preset] = [one["prompt"] for one in presets if (one["room_type"], one["style"]) == ("default", "modern")]
    assert one["prompt"] == other["prompt"] == preset
    assert one["params"]["seed"] != other["params"]["seed"]
    assert (one["negative_prompt"], one["loras"], one["attempts"], one["output"], one["error"]) == (
        None,
        [],
        0,
        None,
        None,
    )
    assert (one["queue_position"], other["queue_position"]) == (1, 2)
    assert batch["webhook"] is None
    assert batch["expires_at"] is None


def test_bad_items_are_refused_by_index_and_the_others_go_on(api):
    """Each kind of mistake in an item has a code, a place and a text of its own, and costs no other item."""
    good, text, small, sent_never = (
        *api.upload(picture(), b"These are words. " * 20, picture(size=(160, 20))),
        api.announce(picture())[0]["upload_id"],
    )
    response = api.submit(
        {"upload_id": good},
        {"upload_id": text},
        {"upload_id": small},
        {"upload_id": sent_never},
        {"upload_id": "0" * 32},
        {"upload_id": "restage:job"},
        {"upload_id": good, "model": "sdxl"},
        {"upload_id": good, "room_type": "garage"},
        {"upload_id": good, "style": "baroque", "prompt": "Anything."},
        {"upload_id": good, "params": {"num_inference_steps": 0}},
        {"upload_id": good, "params": {"stepz": 3}},
        {"upload_id": good, "prompt": "x" * 4001},
        {"upload_id": good, "prompt": "  "},
        {"upload_id": good, "negative_prompt": "people"},
        {"upload_ids": [good, good]},
        {"upload_id": good, "loras": [{"id": "oak", "scale": 0.5}]},
        {"upload_ids": [text]},
        {"upload_id": good, "name": "last"},
        defaults={"model": FLUX},
    )
    assert response.status_code == 207, response.text
    assert codes(response) == {
        1: "unsupported_format",
        2: "photo_too_small",
        3: "upload_not_received",
        4: "upload_not_found",
        5: "upload_not_found",
        6: "unknown_model",
        7: "unknown_preset",
        8: "unknown_preset",
        9: "invalid_params",
        10: "invalid_params",
        11: "invalid_prompt",
        12: "invalid_prompt",
        13: "negative_prompt_not_supported",
        14: "too_many_photos",
        15: "unknown_lora",
        16: "unsupported_format",
    }
    errors = {error["index"]: error for error in response.json()["errors"]}
    assert {index: error["location"].removeprefix(f"/items/{index}/") for index, error in errors.items()} == {
        **dict.fromkeys(range(1, 6), "upload_id"),
        6: "model",
        7: "room_type",
        8: "style",
        9: "params/num_inference_steps",
        10: "params/stepz",
        11: "prompt",
        12: "prompt",
        13: "negative_prompt",
        14: "upload_ids",
        15: "loras/0/id",
        16: "upload_ids/0",
    }
    assert all(len(error["detail"]) > 15 for error in errors.values())
    assert "/items/9/params/num_inference_steps needs a whole number from 1 to 100, not 0" in errors[9]["detail"]
    assert errors[15]["detail"] == f"model {FLUX} has no LoRA 'oak'; allowed are style"
    jobs = response.json()["batch"]["jobs"]
    assert [(job["index"], job["name"]) for job in jobs] == [(0, None), (17, "last")]


def test_a_mistake_in_the_defaults_is_pointed_to_there(api):
    """What items have from `defaults` is pointed to in `defaults`, for each item that it refuses."""
    [upload_id] = api.upload(picture())
    shared = {"model": "sdxl", "params": {"seed": -1, "a/b": 1}, "loras": [{"id": "oak"}], "style": "modern"}
    response = api.submit(
        {"upload_id": upload_id},
        {"upload_id": upload_id, "model": QWEN, "loras": []},
        {"upload_id": upload_id, "model": QWEN, "params": None},
        {"upload_id": upload_id, "model": QWEN, "params": {"a/b": None, "seed": 4}, "loras": None},
        defaults=shared,
    )
    assert response.status_code == 207, response.text
    errors = response.json()["errors"]
    assert [(error["index"], error["location"], error["code"]) for error in errors] == [
        (0, "/defaults/model", "unknown_model"),
        (1, "/defaults/params/seed", "invalid_params"),
        (2, "/defaults/loras/0/id", "unknown_lora"),
    ]
    assert "; /defaults/params/a~1b is unknown" in errors[1]["detail"]
    [job] = response.json()["batch"]["jobs"]
    assert (job["index"], job["params"]["seed"], job["loras"]) == (3, 4, [])


def test_photos_over_a_limit_are_refused_by_their_header(open_api):
    """Pixels and bytes are counted before a photo is decoded."""
    with open_api(RESTAGE__LIMITS__MAX_IMAGE_PIXELS="10000") as api:
        small, large = api.upload(picture(size=(100, 100)), picture(size=(101, 100)))
        response = api.submit({"upload_id": small}, {"upload_id": large})
    assert response.status_code == 207
    assert codes(response) == {1: "photo_too_large"}


def test_a_size_behind_a_long_preview_is_found(api):
    """A JPEG whose first 64 kB are a preview is looked at once more, and one that stays silent is called damaged."""
    photo = picture()
    preview = b"\xff\xe2\xff\xfe" + bytes(65532)
    far, too_far = photo[:2] + preview * 3 + photo[2:], photo[:2] + preview * 20 + photo[2:]
    far_id, too_far_id, cut_id = api.upload(far, too_far, far[:100_000])
    response = api.submit({"upload_id": far_id}, {"upload_id": too_far_id}, {"upload_id": cut_id})
    assert response.status_code == 207
    assert codes(response) == {1: "damaged_image", 2: "truncated_image"}
    assert response.json()["batch"]["jobs"][0]["input"]["width"] == 160


def test_a_batch_of_nothing_usable_is_refused_whole(api):
    """When every item is refused, no batch is made, and each reason has its place in the request."""
    response = api.submit({"upload_id": "0" * 32}, {"upload_id": "1" * 32, "model": "sdxl"})
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "nothing_accepted"
    assert [(error["location"], error["index"], error["code"]) for error in problem["errors"]] == [
        ("/items/0/upload_id", 0, "upload_not_found"),
        ("/items/1/model", 1, "unknown_model"),
    ]
    assert api.redis.keys("restage:batch:*") == []


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({}, [("/items", "missing")]),
        ({"items": []}, [("/items", "invalid_value")]),
        ({"items": [{"upload_id": "a"}], "itms": 1}, [("/itms", "unknown_field")]),
        ({"items": [{"upload_id": "a", "modelx": "x"}]}, [("/items/0/modelx", "unknown_field")]),
        ({"items": [{"upload_id": "a"}, {"upload_id": 5}]}, [("/items/1/upload_id", "invalid_value")]),
        ({"items": [{}]}, [("/items/0", "invalid_value")]),
        ({"items": [{"upload_id": "a", "upload_ids": ["b"]}]}, [("/items/0", "invalid_value")]),
        (
            {"items": [{"upload_id": "a"}], "defaults": {"output": {"qualty": 1}}},
            [("/defaults/output/qualty", "unknown_field")],
        ),
        ({"items": [{"upload_id": "a", "output": {"quality": 101}}]}, [("/items/0/output/quality", "invalid_value")]),
        ({"items": [{"upload_id": "a", "output": {"quality": True}}]}, [("/items/0/output/quality", "invalid_value")]),
        ({"items": [{"upload_id": "a"}], "priority": "urgent"}, [("/priority", "invalid_value")]),
        ({"items": [{"upload_id": "a", "metadata": {"a/b~": 1}}]}, [("/items/0/metadata/a~1b~0", "invalid_value")]),
        ({"items": [{"upload_id": "a", "params": [1]}]}, [("/items/0/params", "invalid_value")]),
        ({"items": [{"upload_id": "a", "metadata": {"a": "x" * 1025}}]}, [("/items/0/metadata/a", "invalid_value")]),
        (
            {"items": [{"upload_id": "a"}], "metadata": {str(number): number for number in range(65)}},
            [("/metadata", "invalid_value")],
        ),
        (
            {"items": [{"upload_id": "a", "name": "x" * 256}], "label": 5},
            [("/items/0/name", "invalid_value"), ("/label", "invalid_value")],
        ),
        (
            {
                "items": [{"upload_id": "a", "loras": [{"id": "b", "scale": 3}]}],
                "defaults": {"loras": [{"id": "c"}] * 2},
            },
            [("/defaults/loras", "invalid_value"), ("/items/0/loras/0/scale", "invalid_value")],
        ),
        ({"items": [{"upload_id": "a"}] * 51}, [("/items", "too_many_items")]),
        ([], [("", "invalid_value")]),
    ],
)
def test_a_wrong_envelope_is_refused_with_pointers(api, body, errors):
    """Unknown fields, wrong types and wrong counts refuse the whole request and name their place."""
    response = api.http.post("/v1/batches", json=body)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    problem = response.json()
    assert (problem["status"], problem["code"]) == (422, "invalid_request")
    assert [(error["location"], error["code"]) for error in problem["errors"]] == errors


def test_unknown_fields_are_answered_with_those_that_exist(api):
    """Who mistypes a field is told what may stand there."""
    response = api.http.post("/v1/batches", json={"items": [{"upload_id": "a", "modelx": "x"}], "colour": {}})
    details = [error["detail"] for error in response.json()["errors"]]
    assert "did you mean model?" in details[0]
    assert "allowed are defaults, items, label, metadata, priority, webhook" in details[1]


def test_fifty_items_of_one_upload_are_accepted(api):
    """The limit of 50 holds from the start, and an upload may stand in any number of items."""
    [upload_id] = api.upload(picture())
    batch = api.accept(*[{"upload_id": upload_id, "name": str(number)} for number in range(50)])
    assert [job["name"] for job in batch["jobs"]] == [str(number) for number in range(50)]
    assert api.redis.hget(f"restage:upload:{upload_id}", "references") == "50"


def test_a_null_in_an_item_takes_the_shared_setting_away(api):
    """Shared defaults of one model can be taken back for an item of another."""
    [upload_id] = api.upload(picture())
    shared = {"model": QWEN, "negative_prompt": "people", "params": {"true_cfg_scale": 2.0}, "prompt": "Shared."}
    batch = api.accept(
        {"upload_id": upload_id},
        {"upload_id": upload_id, "model": FLUX, "negative_prompt": None, "params": None, "prompt": None},
        defaults=shared,
    )
    own, other = batch["jobs"]
    assert (own["prompt"], own["negative_prompt"], own["params"]["true_cfg_scale"]) == ("Shared.", "people", 2.0)
    assert (other["model"], other["negative_prompt"]) == (FLUX, None)
    assert other["prompt"] != "Shared."


def test_several_photos_make_one_job(api):
    """A model that reads several photos gets them in order; the first one decides on the size."""
    first, second = api.upload(picture(), picture(size=(80, 160)))
    [job] = api.accept({"upload_ids": [first, second], "model": QWEN, "prompt": "Put both together."})["jobs"]
    assert [one["upload_id"] for one in job["inputs"]] == [first, second]
    assert job["input"] == job["inputs"][0]
    assert job["params"]["width"] > job["params"]["height"]


def test_a_photo_that_is_all_edge_is_refused(api):
    """A photo too narrow for the models is refused at submission, also as the second of several."""
    normal, narrow = api.upload(picture(), picture(size=(6400, 64)))
    response = api.submit({"upload_ids": [normal, narrow], "model": QWEN}, {"upload_id": narrow, "model": FLUX})
    assert response.status_code == 422
    assert codes(response) == {0: "unusable_shape", 1: "unusable_shape"}


def test_too_many_open_jobs_answer_503(open_api):
    """A full queue refuses the batch whole and says when to come back; nothing of it is kept."""
    with open_api(RESTAGE__LIMITS__MAX_OPEN_JOBS="2") as api:
        [upload_id] = api.upload(picture())
        api.accept({"upload_id": upload_id})
        response = api.submit({"upload_id": upload_id}, {"upload_id": upload_id})
        assert (response.status_code, response.json()["code"]) == (503, "queue_full")
        assert int(response.headers["retry-after"]) > 0
        api.accept({"upload_id": upload_id})


def test_the_stored_object_is_pinned_by_its_etag(api):
    """What is accepted is what was looked at: the job remembers the object's ETag, size and true type."""
    photo = picture("PNG")
    [upload_id] = api.upload(photo)
    [job] = api.accept({"upload_id": upload_id})["jobs"]
    stored = httpx.Response(200, text=api.redis.hget(f"restage:job:{job['id']}", "inputs")).json()
    assert stored[0]["etag"] == api.store.read_start(upload_id, 16).etag
    assert (stored[0]["size_bytes"], stored[0]["content_type"]) == (len(photo), "image/png")


def test_what_could_only_fail_later_is_refused_at_once(api):
    """A negative prompt that guidance would not use, and a photo too long for its format, never reach a GPU."""
    wide, small = api.upload(picture(size=(17000, 400)), picture())
    response = api.submit(
        {"upload_id": small, "model": QWEN, "negative_prompt": "people", "params": {"true_cfg_scale": 1.0}},
        {"upload_id": wide, "model": QWEN, "output": {"size": "input"}},
        {"upload_id": wide, "model": QWEN, "output": {"size": "input", "format": "png"}},
    )
    assert response.status_code == 207
    assert codes(response) == {0: "negative_prompt_not_supported", 1: "unusable_shape"}
