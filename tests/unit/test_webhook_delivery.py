"""When a webhook is tried again and when it is given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.webhooks.delivery import Answer, Decision, decide, next_delay_seconds

DAY_SECONDS = 86400.0


def decided(status: int | None, *, attempt: int = 1, elapsed_seconds: float = 0, jitter: float = 0.5) -> Decision:
    return decide(
        Answer(status, None),
        attempt=attempt,
        elapsed_seconds=elapsed_seconds,
        give_up_seconds=DAY_SECONDS,
        jitter=jitter,
    )


def test_pauses_grow_to_four_hours() -> None:
    """The pauses must be those that are documented."""
    pauses = [next_delay_seconds(attempt, 0.5) for attempt in range(1, 11)]

    assert pauses == [5, 30, 120, 600, 1800, 3600, 7200, 14400, 14400, 14400]


@given(st.integers(1, 1000), st.floats(0, 1))
def test_jitter_is_a_quarter(attempt: int, jitter: float) -> None:
    """Chance must move a pause by a quarter at most, either way."""
    middle = next_delay_seconds(attempt, 0.5)

    assert 0.75 * middle <= next_delay_seconds(attempt, jitter) <= 1.25 * middle
    assert next_delay_seconds(attempt, 0) < middle < next_delay_seconds(attempt, 1)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_status_of_the_200s_is_a_delivery(status: int) -> None:
    """A receiver that takes it ends the matter, however late."""
    assert decided(status) == decided(status, elapsed_seconds=2 * DAY_SECONDS) == Decision("delivered")


@pytest.mark.parametrize("status", [None, 199, 300, 301, 302, 307, 400, 401, 404, 409, 411, 429, 500, 503])
def test_anything_else_is_tried_again(status: int | None) -> None:
    """No answer, or another status, must be tried again after the pause."""
    assert decided(status) == Decision("retrying", 5.0)
    assert decided(status, attempt=4, elapsed_seconds=1000) == Decision("retrying", 600.0)


def test_a_receiver_that_is_gone_is_given_up() -> None:
    """410 says that nobody wants to hear it: there must be no second attempt."""
    assert decided(410) == Decision("gave_up")


def test_after_a_day_it_is_given_up() -> None:
    """The last attempt is made at the end of the time; what fails then is given up."""
    assert decided(500, attempt=12, elapsed_seconds=DAY_SECONDS - 100) == Decision("retrying", 100.0)
    assert decided(500, attempt=12, elapsed_seconds=DAY_SECONDS - 0.001) == Decision("retrying", 1.0)
    assert decided(500, attempt=13, elapsed_seconds=DAY_SECONDS) == Decision("gave_up")


@given(st.lists(st.floats(0, 1), min_size=60, max_size=60), st.floats(0.1, 20))
def test_every_delivery_comes_to_an_end(jitters: list[float], seconds_each: float) -> None:
    """For any chance and any slowness, a receiver that always fails must be given up soon after a day, not before."""
    elapsed_seconds = 0.0
    for attempt, jitter in enumerate(jitters, start=1):
        elapsed_seconds += seconds_each
        decision = decided(500, attempt=attempt, elapsed_seconds=elapsed_seconds, jitter=jitter)
        if decision.delay_seconds is None:
            break
        elapsed_seconds += decision.delay_seconds
    else:
        pytest.fail("never given up")
    assert decision.outcome == "gave_up"
    assert DAY_SECONDS <= elapsed_seconds < DAY_SECONDS + 60
    assert 10 <= attempt <= 25
