"""How an item's settings lie over the shared ones, and when two requests are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.api.json_bodies import decode_model
from server.errors import InvalidRequest
from server.jobs import OutputSpec
from server.submit.request import BatchRequest, ItemRequest, ItemSettings, fingerprint, merge_settings, output_spec

settings = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["a", "b", None]),
        "room_type": st.sampled_from(["bedroom", None]),
        "prompt": st.sampled_from(["One.", "Two.", None]),
        "params": st.none()
        | st.dictionaries(st.sampled_from(["seed", "num_inference_steps"]), st.none() | st.integers(0, 9)),
        "loras": st.none() | st.just([]) | st.sampled_from(["oak", "ash"]).map(lambda name: [{"id": name}]),
        "output": st.none()
        | st.fixed_dictionaries(
            {}, optional={"format": st.sampled_from(["png", "jpeg", None]), "quality": st.none() | st.integers(1, 99)}
        ),
    },
)


@given(settings, settings)
def test_an_item_wins_field_by_field(shared, own):
    """What the item names is taken, null too, else what is shared; inside params and output as well."""
    merged = merge_settings(
        ItemSettings.model_validate(shared), ItemRequest.model_validate({"upload_id": "x", "name": "n", **own})
    )
    for name in ("model", "room_type", "prompt"):
        assert getattr(merged, name) == own.get(name, shared.get(name))
    assert merged.loras == (ItemSettings(loras=own.get("loras", shared.get("loras")))).loras
    for name in ("params", "output"):
        mine, theirs = own.get(name, {}), shared.get(name)
        expected = {} if mine is None else (theirs or {}) | mine
        found = getattr(merged, name)
        if name == "output" and found is not None:
            found = found.model_dump(exclude_unset=True)
        # In params a null is gone once it has taken something away.
        if name == "params" and mine and theirs:
            expected = {
                key: value
                for key, value in expected.items()
                if not (value is None and key in mine.keys() & theirs.keys())
            }
        assert (found or {}) == expected


def test_a_size_replaces_a_size():
    """An item's aspect ratio takes the place of a shared width and height, which exclude it."""
    merged = merge_settings(
        ItemSettings(params={"width": 640, "height": 480, "seed": 1}),
        ItemRequest(upload_id="x", params={"aspect_ratio": "1:1"}),
    )
    assert merged.params == {"seed": 1, "aspect_ratio": "1:1"}


def test_results_are_webp_of_quality_80_unless_asked():
    """What a request leaves open about its result, also as null, is filled in."""
    assert output_spec(None) == OutputSpec("webp", 80, "model", metadata=True)
    request = ItemRequest.model_validate({"upload_id": "x", "output": {"format": "png", "quality": None}})
    assert output_spec(request.output) == OutputSpec("png", 80, "model", metadata=True)


def test_fingerprints_follow_meaning_not_spelling():
    """Order of fields does not matter; every value does, and so does whether a field was written."""
    one = BatchRequest.model_validate({"label": "a", "items": [{"upload_id": "x", "params": {"a": 1, "b": 2}}]})
    same = BatchRequest.model_validate({"items": [{"params": {"b": 2, "a": 1}, "upload_id": "x"}], "label": "a"})
    others = [
        {"items": [{"upload_id": "x", "params": {"a": 1, "b": 3}}], "label": "a"},
        {"items": [{"upload_id": "x", "params": {"a": 1, "b": 2}}]},
        {"items": [{"upload_id": "x", "params": {"a": 1, "b": 2}, "name": None}], "label": "a"},
    ]
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) not in {fingerprint(BatchRequest.model_validate(other)) for other in others}


def test_the_bytes_of_files_are_part_of_a_request():
    """A form is the same as another with the same JSON and bytes, in whatever order; without files, as its JSON."""
    request = BatchRequest.model_validate({"items": [{"file": "a"}, {"file": "b"}]})
    mine = fingerprint(request, {"a": "1" * 64, "b": "2" * 64})
    assert mine == fingerprint(request, {"b": "2" * 64, "a": "1" * 64})
    others = [{"a": "2" * 64, "b": "1" * 64}, {"a": "1" * 64, "b": "3" * 64}, {"a": "1" * 64}, {}]
    assert len({mine, *(fingerprint(request, other) for other in others)}) == 5
    assert fingerprint(request, {}) == fingerprint(request)


@pytest.mark.parametrize(
    "sources",
    [{}, {"upload_id": "x", "file": "a"}, {"upload_ids": ["x"], "file": "a"}, {"upload_id": "x", "upload_ids": ["x"]}],
)
def test_an_item_has_one_source(sources):
    """Its photo comes from one place, and a request that names none or two is a mistake."""
    with pytest.raises(ValidationError, match="either upload_id or upload_ids, or in a form file"):
        ItemRequest.model_validate(sources)


def refused(fields, place=""):
    """Return where (relative to the batch) and why a batch of one item is refused."""
    batch = fields if place else {"items": [{"upload_id": "x", **fields}]}
    with pytest.raises(InvalidRequest) as caught:
        decode_model(BatchRequest, {"items": [{"upload_id": "x"}], **batch}, max_items=50)
    return [(mistake.location.removeprefix("/items/0"), mistake.detail) for mistake in caught.value.errors]


def accepted(**fields):
    return decode_model(BatchRequest, {"items": [{"upload_id": "x", **fields}]}, max_items=50).items[0]


@pytest.mark.parametrize(
    ("loras", "location", "words"),
    [
        ([{"id": "oak"}] * 2, "", "names 'oak' more than once"),
        ([{"id": ""}] * 2, "", "names '' more than once"),
        ([{"id": str(number)} for number in range(9)], "", "at most 8 items"),
        ([{"id": number} for number in range(100_000)], "", "at most 8 items"),
        ([{"scale": 1}], "/0/id", "is needed"),
        ([{"id": 5}], "/0/id", "valid string"),
        ([{"id": "oak", "weight": 1}], "/0/weight", "there is no such field here; allowed are id, scale"),
        ([{"id": "oak", "scale": 2.1}], "/0/scale", "less than or equal to 2"),
        ([{"id": "oak", "scale": -2.1}], "/0/scale", "greater than or equal to -2"),
        ([{"id": "oak", "scale": float("nan")}], "/0/scale", "finite"),
        ([{"id": "oak", "scale": float("inf")}], "/0/scale", "finite"),
        ([{"id": "oak", "scale": 10**19}], "/0/scale", "less than or equal to 2"),
        ([{"id": "oak", "scale": True}], "/0/scale", "valid number"),
        ([{"id": "oak", "scale": "1"}], "/0/scale", "valid number"),
        ([{"id": "oak", "scale": None}], "/0/scale", "valid number"),
        (["oak"], "/0", "valid dictionary"),
        ({"id": "oak"}, "", "valid list"),
        ("oak", "", "valid list"),
    ],
)
def test_loras_of_another_shape_are_refused(loras, location, words):
    """Each mistake in a list of LoRAs is told once, with its place, in an item and in the defaults alike."""
    [(found, detail)] = refused({"loras": loras})
    assert found == f"/loras{location}"
    assert words in detail
    assert refused({"defaults": {"loras": loras}}, "defaults") == [(f"/defaults/loras{location}", detail)]


def test_loras_are_read():
    """Up to eight LoRAs between -2 and 2 are taken, of scale 1 unless they say otherwise; whole numbers will do."""
    loras = [{"id": "a"}, {"id": "b", "scale": -2}, {"id": "c", "scale": 2}, {"id": "d", "scale": 0.0}]
    loras += [{"id": str(number)} for number in range(4)]
    found = accepted(loras=loras).loras or []
    assert [lora.scale for lora in found] == [1.0, -2.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert accepted(loras=[]).loras == []
    assert accepted(loras=None).loras is None


@pytest.mark.parametrize(
    ("metadata", "location", "words"),
    [
        ({str(number): "x" for number in range(65)}, "", "at most 64 entries are allowed, not 65"),
        ({str(number): number for number in range(100_000)}, "", "at most 64 entries are allowed, not 100000"),
        ({"": "x"}, "", "a name has 1 to 64 characters; '' has 0"),
        ({"x" * 65: "x"}, "", "a name has 1 to 64 characters; 'xxxxxx"),
        ({"x" * 500_000: 5}, "", "has 500000"),
        ({"a": "x" * 1025}, "/a", "at most 1024 characters"),
        ({"a/b~": 5}, "/a~1b~0", "valid string"),
        ({"[key]": 5}, "/[key]", "valid string"),
        ({"a": None}, "/a", "valid string"),
        ({"a": {"b": "c"}}, "/a", "valid string"),
        (None, "", "valid dictionary"),
        (["a"], "", "valid dictionary"),
        ("a", "", "valid dictionary"),
    ],
)
def test_metadata_out_of_bounds_is_refused(metadata, location, words):
    """Too many, too long or wrongly typed metadata are told once, with a place and a short text, of batch and item."""
    [(found, detail)] = refused({"metadata": metadata})
    assert found == f"/metadata{location}"
    assert words in detail
    assert len(detail) < 200
    assert refused({"metadata": metadata}, "batch") == [(f"/metadata{location}", detail)]


def test_parameters_that_no_model_could_read_are_refused_at_once():
    """A flood of them costs one look, not one for each item; what two places hold together is for the model."""
    many = {f"param{number}": 1 for number in range(40)}
    more = {f"other{number}": 1 for number in range(40)}
    for place, body in (
        ("/defaults/params", {"defaults": {"params": many | more}, "items": [{"upload_id": "x"}]}),
        ("/items/0/params", {"items": [{"upload_id": "x", "params": many | more}]}),
    ):
        with pytest.raises(InvalidRequest, match="holds 80 parameters; at most 64 are read") as refused:
            decode_model(BatchRequest, body, max_items=50)
        assert [(error.location, error.code) for error in refused.value.errors] == [(place, "invalid_value")]
    merged = merge_settings(ItemSettings(params=many), ItemRequest(upload_id="x", params=more))
    assert merged.params == many | more


def test_metadata_is_read_up_to_its_bounds():
    """64 entries, names of 64 and values of 1,024 characters are taken as they are, whatever the language."""
    metadata = {f"{number:02d}" + "ä" * 62: "数" * 1024 for number in range(63)} | {"a.b/[key]~": ""}
    assert accepted(metadata=metadata).metadata == metadata
    assert accepted(metadata={}).metadata == accepted().metadata == {}


@pytest.mark.parametrize("field", ["label", "name"])
def test_names_have_at_most_255_characters(field):
    """Label and name are told with their place when they are too long; empty and null are what they are."""
    place, location = ("batch", "/label") if field == "label" else ("", "/name")
    [(found, detail)] = refused({field: "x" * 256}, place)
    assert (found, "at most 255 characters" in detail) == (location, True)
    for value in ("", "x" * 255, None):
        of_batch, of_item = ({field: value}, {}) if field == "label" else ({}, {field: value})
        batch = decode_model(BatchRequest, {"items": [{"upload_id": "x", **of_item}], **of_batch}, max_items=50)
        assert (batch.label if field == "label" else batch.items[0].name) == value
