"""How an item's settings lie over the shared ones, and when two requests are the same."""

from hypothesis import given
from hypothesis import strategies as st

from server.jobs import OutputSpec
from server.submit.request import BatchRequest, ItemRequest, ItemSettings, fingerprint, merge_settings, output_spec

settings = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["a", "b", None]),
        "room_type": st.sampled_from(["bedroom", None]),
        "prompt": st.sampled_from(["One.", "Two.", None]),
        "params": st.none() | st.dictionaries(st.sampled_from(["seed", "num_inference_steps"]), st.integers(0, 9)),
        "output": st.none()
        | st.fixed_dictionaries(
            {}, optional={"format": st.sampled_from(["png", "jpeg"]), "quality": st.integers(1, 99)}
        ),
    },
)


@given(settings, settings)
def test_an_item_wins_field_by_field(shared, own):
    """What the item names is taken, else what is shared; inside params and output as well."""
    merged = merge_settings(
        ItemSettings.model_validate(shared), ItemRequest.model_validate({"upload_id": "x", "name": "n", **own})
    )
    for name in ("model", "room_type", "prompt"):
        assert getattr(merged, name) == own.get(name, shared.get(name))
    for name in ("params", "output"):
        mine, theirs = own.get(name, {}), shared.get(name)
        expected = None if mine is None else (theirs or {}) | mine
        found = getattr(merged, name)
        if name == "output" and found is not None:
            found = found.model_dump(exclude_unset=True)
        assert (found or {}) == (expected or {})


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
