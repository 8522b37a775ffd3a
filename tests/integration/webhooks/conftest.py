"""Receivers that are closed after the test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.integration.webhooks.receiving import Receiver


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    """Give a function that starts a receiver: `receive(behave, tls=…)`."""
    started: list[Receiver] = []

    def start(*arguments: Any, **options: Any) -> Receiver:
        started.append(Receiver(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()
