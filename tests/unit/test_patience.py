"""How a worker waits for what is away."""

import time

import pytest
from structlog.testing import capture_logs

from server.errors import LedgerUnavailable
from server.worker.patience import Outage


class Flaky:
    """Something that is away for the first few calls."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_calls = 0

    def __call__(self) -> str:
        """Fail, or answer."""
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise LedgerUnavailable("Redis does not serve")
        return "answer"


def nothing() -> None:
    """Say that the answer is still wanted."""


def test_call_is_repeated_until_it_is_served():
    """The answer comes as soon as there is one, and an outage is told once at its beginning and once at its end."""
    call = Flaky(3)
    outage = Outage("redis")

    with capture_logs() as logs:
        assert outage.outwait(call, check=nothing) == "answer"
        assert outage.outwait(call, check=nothing) == "answer"

    assert call.num_calls == 5
    assert [line["event"] for line in logs] == ["dependency.lost", "dependency.back"]


def test_waiting_ends_when_the_answer_is_not_wanted_any_more():
    """What `check` raises comes through before another try."""

    def give_up() -> None:
        raise KeyError("cancelled")

    call = Flaky(100)
    with pytest.raises(KeyError):
        Outage("redis").outwait(call, check=give_up)
    assert call.num_calls == 1


def test_waiting_ends_when_patience_does():
    """The dependency's own error is raised after `patience_seconds`."""
    started = time.monotonic()
    with pytest.raises(LedgerUnavailable):
        Outage("redis").outwait(Flaky(100), check=nothing, patience_seconds=0.2)
    assert 0.2 <= time.monotonic() - started < 5
