"""Where a refusal points to: into the item, or into `defaults` where the item has it from there."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import FieldError, ItemError, NotFound, RequestError
from server.model_entry import InvalidParams
from server.prompts import UnknownPreset
from server.submit.refusals import ItemRefused, about, item_error
from server.submit.request import BatchRequest, Place

DEFAULTS: dict[str, Any] = {
    "model": "shared",
    "style": None,
    "params": {"seed": 1, "a/b~": 2},
    "loras": [{"id": "oak"}],
    "output": {"size": "input"},
}
ITEM: dict[str, Any] = {"upload_ids": ["x", "y"], "model": "own", "params": {"seed": 2}, "output": {"format": "png"}}


def batch(defaults: dict[str, Any], *items: dict[str, Any]) -> BatchRequest:
    return BatchRequest.model_validate({"defaults": defaults, "items": list(items)})


@pytest.mark.parametrize(
    ("place", "location"),
    [
        ((), "/items/1"),
        (("model",), "/items/1/model"),
        (("room_type",), "/items/1"),
        (("style",), "/defaults/style"),
        (("params",), "/items/1/params"),
        (("params", "seed"), "/items/1/params/seed"),
        (("params", "a/b~"), "/defaults/params/a~1b~0"),
        (("params", "cut off name"), "/items/1/params"),
        (("loras", 0, "id"), "/defaults/loras/0/id"),
        (("loras", 0, "scale"), "/defaults/loras/0"),
        (("loras", 7, "id"), "/defaults/loras"),
        (("output", "size"), "/defaults/output/size"),
        (("output", "format"), "/items/1/output/format"),
        (("upload_ids", 1), "/items/1/upload_ids/1"),
        (("upload_id",), "/items/1"),
    ],
)
def test_a_refusal_points_to_what_the_client_wrote(place: Place, location: str) -> None:
    """The pointer leads to the value that counts, else to the closest thing around it that the body has."""
    request = batch(DEFAULTS, {"upload_id": "x"}, ITEM)

    assert item_error(request, 1, NotFound("gone"), place) == ItemError(1, location, "not_found", "gone")


def test_parameters_are_told_with_their_pointers() -> None:
    """The text names each wrong parameter where the client wrote it, and the location is that of the first."""
    request = batch(DEFAULTS, ITEM)
    error = InvalidParams(
        "m",
        (
            FieldError("/a~1b~0", "unknown_field", "is unknown"),
            FieldError("/seed", "invalid_value", "is odd"),
            FieldError("", "invalid_value", "do not fit"),
        ),
    )

    assert item_error(request, 0, error, ("params",)) == ItemError(
        0,
        "/defaults/params/a~1b~0",
        "invalid_params",
        "m does not take these parameters: /defaults/params/a~1b~0 is unknown; /items/0/params/seed is odd; "
        "/items/0/params do not fit",
    )


def test_a_preset_points_to_its_own_field() -> None:
    """Of room type and style the one that is unknown is pointed to, and the text stays as it is."""
    error = UnknownPreset("no such style", (FieldError("/style", "invalid_value", "no such style"),))

    found = item_error(batch({"room_type": "x"}, {"upload_id": "x", "style": "y"}), 0, error)

    assert (found.location, found.detail) == ("/items/0/style", "no such style")


def test_what_is_refused_in_a_block_is_about_its_place() -> None:
    """A refusal leaves the block with its place; what is no refusal leaves it as it is."""
    error = RequestError("no")
    with pytest.raises(ItemRefused) as caught, about("loras", 0):
        raise error
    assert (caught.value.error, caught.value.place) == (error, ("loras", 0))
    with pytest.raises(KeyError), about("model"):
        raise KeyError("a bug")


NAMES = st.text(max_size=5) | st.sampled_from(["~", "/", "~1", "", "params"])
PARAMS = st.dictionaries(NAMES, st.none() | st.integers(), max_size=3)


@given(PARAMS, PARAMS, NAMES)
def test_every_pointer_leads_somewhere(shared: dict[str, Any], own: dict[str, Any], name: str) -> None:
    """Whatever the names are, a pointer, followed as RFC 6901 says, must lead to a value of the body."""
    body = {"defaults": {"params": shared}, "items": [{"upload_id": "x", "params": own}]}
    pointer = name.replace("~", "~0").replace("/", "~1")
    error = InvalidParams("m", (FieldError(f"/{pointer}", "invalid_value", "is odd"),))

    location = item_error(BatchRequest.model_validate(body), 0, error, ("params",)).location

    value: Any = body
    for step in location.split("/")[1:]:
        value = value[int(step) if isinstance(value, list) else step.replace("~1", "/").replace("~0", "~")]
    expected = own if name in own else shared if name in shared else None
    assert value == (own if expected is None else expected[name])


def test_a_kept_refusal_is_the_same_again() -> None:
    """What an idempotency record holds as JSON comes back as the same refusal."""
    error = ItemError(3, "/items/3/params/a~1b", "invalid_params", "näh")

    assert ItemError(**json.loads(json.dumps(asdict(error)))) == error
