"""JSON is read strictly, whatever it looks like, and mistakes are told by their place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_bodies import decode_model, parse_json
from server.errors import InvalidRequest, MalformedBody, json_pointer
from server.submit.request import BatchRequest

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@given(values)
def test_ordinary_json_is_read_as_every_reader_does(value):
    """What is neither ambiguous nor forbidden comes out unchanged."""
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data):
    """Any bytes are either read or refused with one of two errors."""
    try:
        parse_json(data)
    except (MalformedBody, InvalidRequest) as error:
        assert error.detail  # noqa: PT017 (either outcome is right)


@given(
    st.recursive(st.just("[]"), lambda inner: st.builds("[{}]".format, inner) | st.builds('{{"a":{}}}'.format, inner))
)
def test_depth_is_bounded(text):
    """Nesting up to sixteen levels is read, deeper is refused."""
    deep = text * 1
    for _ in range(20):
        deep = f"[{deep}]"
    with pytest.raises(MalformedBody, match="deeper than 16"):
        parse_json(deep.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"\\u0061": 1, "a": 2}}', "'a' stands twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e400]", "64 bits"),
        ("[" + "1" * 21 + "]", "at most 20"),
        ("[1,]", "line 1, column"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_what_readers_understand_differently_is_refused(text, message):
    """Double names, numbers that are none, and near-JSON are named."""
    with pytest.raises(MalformedBody, match=message):
        parse_json(text.encode())


@pytest.mark.parametrize(
    ("value", "location"),
    [
        ({"a": ["ok", "x\0"]}, "/a/1"),
        ({"a": {"b\x1b": 1}}, "/a"),
        ("\ud800", ""),
        ({"a": "line\nbreak\ttab\r"}, None),
    ],
)
def test_texts_with_forbidden_characters_are_refused_by_place(value, location):
    """NUL, control characters and lone surrogates are refused; tabs and line ends are text."""
    body = json.dumps(value).encode()
    if location is None:
        assert parse_json(body) == value
        return
    with pytest.raises(InvalidRequest) as refused:
        parse_json(body)
    assert [error.location for error in refused.value.errors] == [location]


def test_pointers_escape_what_pointers_use():
    """`~` and `/` in names are written as RFC 6901 says."""
    assert json_pointer(("items", 3, "a/b~c")) == "/items/3/a~1b~0c"
    assert json_pointer(()) == ""


@given(values)
def test_any_json_is_a_batch_or_a_list_of_mistakes(value):
    """Whatever the body is, checking it either gives a batch or tells at least one mistake."""
    for body in (value, {"items": value}, {"items": [value]}, {"items": [{"upload_id": "a", "params": value}]}):
        try:
            decode_model(BatchRequest, body, max_items=2)
        except InvalidRequest as error:
            assert error.errors  # noqa: PT017 (either outcome is right)


def test_a_name_that_stands_twice_is_found_among_thousands():
    """Finding it takes one look at each name: with a look at all others, these would take minutes."""
    names = ",".join(f'"{number:x}":1' for number in range(75_000))
    with pytest.raises(MalformedBody, match="'last'"):
        parse_json(f'{{{names},"last":1,"last":1}}'.encode())


def test_a_flood_of_forbidden_texts_is_cut():
    """Of a hundred thousand mistakes fifty are told: the answer to a hostile body stays small."""
    with pytest.raises(InvalidRequest) as refused:
        parse_json(b"[" + b",".join([b'"\\u0000"'] * 100_000) + b"]")
    assert len(refused.value.errors) == 50
