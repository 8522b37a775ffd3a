"""A ledger on an empty real Valkey."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.integration.ledger.kit import LedgerKit


@pytest.fixture
def new_ledger(valkey: Any) -> Callable[[str], LedgerKit]:
    """Give a function that opens a ledger under a key prefix of its own; whoever calls it closes the ledger."""
    return lambda prefix: LedgerKit(valkey.url, prefix=prefix)


@pytest.fixture
def ledger(valkey: Any) -> Iterator[LedgerKit]:
    """Give a ledger on an empty Valkey."""
    kit = LedgerKit(valkey.url)
    kit.run(kit.api.check_schema())
    yield kit
    kit.close()
