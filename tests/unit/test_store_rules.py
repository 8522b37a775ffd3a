"""What the store's parts work out without a store: windows of signatures, days of a lifecycle, origins."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.settings import LimitsSettings, RetentionSettings, StoreSettings
from server.store import _window_start
from server.store_buckets import backstop_days

KEYS: dict[str, Any] = {"access_key": "a", "secret_key": "b"}
MOMENTS = st.floats(1.6e9, 4.1e9).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@given(now=MOMENTS, window_seconds=st.integers(1, 302_400), later=st.floats(0, 302_400))
def test_a_window_holds_the_moment_and_begins_alike_for_all(now, window_seconds, later):
    """A window begins at a whole second at or before each of its moments, all of which agree on it."""
    start = _window_start(now, window_seconds)
    assert start <= now < start + timedelta(seconds=window_seconds)
    assert start.microsecond == 0
    then = now + timedelta(seconds=later)
    is_within = then < start + timedelta(seconds=window_seconds)
    assert (_window_start(then, window_seconds) == start) == is_within


def test_the_shortest_url_has_five_minutes_left():
    """Clients may rely on five minutes, so no setting makes a URL whose second half is shorter."""
    assert LimitsSettings(output_url_ttl_seconds=600)
    with pytest.raises(ValidationError, match="600"):
        LimitsSettings(output_url_ttl_seconds=599)


@pytest.mark.parametrize(
    ("retention", "limits", "days"),
    [
        ({}, {}, (76, 74)),
        ({"records_seconds": 86_400, "inputs_seconds": 1, "outputs_seconds": 1}, {}, (5, 3)),
        ({"records_seconds": 2, "inputs_seconds": 1, "outputs_seconds": 1}, {"unused_upload_ttl_seconds": 900}, (1, 1)),
        ({"records_seconds": 315_360_000, "inputs_seconds": 315_360_000, "outputs_seconds": 1}, {}, (14_602, 7301)),
    ],
)
def test_the_store_waits_twice_as_long_as_the_server(retention, limits, days):
    """The lifecycle comes after anything that the server does by itself, in whole days, at least one."""
    assert backstop_days(RetentionSettings(**retention), LimitsSettings(**limits)) == days


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("*", "*"),
        ("https://app.example.com", "https://app.example.com"),
        ("https://App.Example.com/", "https://app.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://*.example.com", "https://*.example.com"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_origins_are_kept_as_browsers_write_them(written, kept):
    """An origin is compared letter by letter, so case and a slash at its end are taken off."""
    assert StoreSettings(**KEYS, cors_origins=[written]).cors_origins == [kept]


@pytest.mark.parametrize(
    "origin",
    ["", "app.example.com", "https://app.example.com/page", "https://", "https://*", "ftp://a", "https://a<b>", "null"],
)
def test_what_is_no_origin_is_refused(origin):
    """An origin that no browser sends would silently allow nothing."""
    with pytest.raises(ValidationError, match=r"needs an origin such as https://app\.example\.com"):
        StoreSettings(**KEYS, cors_origins=[origin])


def test_no_origin_is_a_choice():
    """An empty list leaves the buckets closed to pages, or to rules of the operator's own."""
    assert StoreSettings(**KEYS, cors_origins=[]).cors_origins == []
