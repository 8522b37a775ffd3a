"""How benchmarks read their command lines."""

import argparse
from collections.abc import Callable, Sequence


def list_of(read: Callable[[str], object]) -> Callable[[str], list[object]]:
    """Read values with commas between them."""

    def read_list(text: str) -> list[object]:
        return [read(part) for part in text.split(",")]

    return read_list


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Read one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {','.join(names)}")
        return text

    return read


def count(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
