"""Writes a host in one way, so that what an operator allows and what a client names can be compared."""

import re
from ipaddress import IPv6Address
from typing import Final

import idna

_MOST_CHARACTERS: Final = 253
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")


def normalise_host(host: str) -> str:
    """Write a host the one way it is compared and called.

    Args:
        host: a name, an IPv4 address, or an IPv6 address with or without brackets.

    Returns:
        In lower case, without brackets or a last dot; names that are not ASCII as `xn--…`.

    Raises:
        ValueError: it is no host.
    """
    if ":" in host:
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if "%" in bare:
            raise ValueError("names an interface of one machine")
        return str(IPv6Address(bare))
    name = host.lower().removesuffix(".")
    if not name.isascii() and len(name) <= _MOST_CHARACTERS:
        name = idna.encode(name).decode("ascii")
    if len(name) > _MOST_CHARACTERS or not _NAME.fullmatch(name):
        raise ValueError("is no name of a host")
    return name
