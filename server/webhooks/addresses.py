"""Which addresses may be called for a webhook: whatever clients and name servers say, none inside our own network."""

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final

from server.errors import FieldError, InvalidRequest
from server.hosts import normalise_host

_MOST_CHARACTERS: Final = 2048
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)([^#]*)(#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
_PATH = re.compile(r"[\x21-\x7e]*")

# Beside what `is_global` knows; it takes NAT64, 6to4, IPv4 inside IPv6 and site-local addresses for public ones.
_INSIDE: Final = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's own service, inside each of its machines
        "192.0.0.0/24",  # protocol assignments; Oracle's cloud has a service here
        "192.88.99.0/24",  # relays of 6to4
        # All of IPv6 but 2000::/3, which alone is given out: IPv4-mapped and -compatible addresses, NAT64, fec0::/10, …
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/23",  # protocol assignments, Teredo among them
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)


class InvalidWebhook(InvalidRequest):
    """Raised when a batch's webhook cannot be called: its URL is not allowed, or there is no secret to sign with."""

    code = "invalid_webhook"
    title = "The webhook cannot be used"

    def __init__(self, detail: str, location: str = "/webhook/url") -> None:
        super().__init__(f"webhook: {detail}", (FieldError(location, self.code, detail),))


@dataclass(frozen=True)
class Target:
    """A webhook's URL, taken apart.

    Attributes:
        host: as `normalise_host` writes it.
        path: with the query; begins with a slash.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """The host as HTTP names it: an IPv6 address in brackets, and the port where it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str, allowed_hosts: Iterable[str]) -> Target:
    """Check a webhook's URL without asking any name server; what a name means is looked at when it is called.

    Args:
        url: as the client wrote it.
        allowed_hosts: `webhooks.allowed_hosts`; these may be called by http, and inside our own network.

    Raises:
        InvalidWebhook: it is not allowed; the text says what is.
    """
    target = _take_apart(url)
    if target.host in {normalise_host(host) for host in allowed_hosts}:
        return target
    if target.scheme != "https":
        raise InvalidWebhook("url needs https; http is for the hosts in webhooks.allowed_hosts only")
    literal = _numeric_address(target.host)
    if literal is not None and not is_public(literal):
        raise InvalidWebhook("url names an address that is not public and not in webhooks.allowed_hosts")
    return target


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, and carries no other address inside it."""
    ip = ip_address(address)
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _INSIDE)


def _take_apart(url: str) -> Target:
    if len(url) > _MOST_CHARACTERS:
        raise InvalidWebhook(f"url has {len(url)} characters; at most {_MOST_CHARACTERS} are allowed")
    match = _URL.fullmatch(url)
    if match is None or match[1].lower() not in _DEFAULT_PORTS:
        raise InvalidWebhook("url needs a URL such as https://example.com/staged")
    scheme, authority, path, fragment = match[1].lower(), match[2], match[3], match[4]
    if "@" in authority:
        raise InvalidWebhook("url must not hold a user or a password; requests are signed instead")
    if fragment is not None:
        raise InvalidWebhook("url must not hold a fragment (#)")
    if not _PATH.fullmatch(path):
        raise InvalidWebhook("url holds spaces or letters that are not ASCII; write them as %20 and the like")
    host, port = _split_authority(authority)
    return Target(scheme, host, _DEFAULT_PORTS[scheme] if port is None else port, f"/{path.removeprefix('/')}")


def _split_authority(authority: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    port = int(match[2]) if match and match[2] else None
    if match is None or (port is not None and not 1 <= port <= 65535):
        raise InvalidWebhook("url needs a host, and after a colon nothing but a port from 1 to 65535")
    try:
        return normalise_host(match[1]), port
    except ValueError as error:
        raise InvalidWebhook("url needs the name of a host, or an address; IPv6 in brackets") from error


def _numeric_address(host: str) -> str | None:
    """Read a host that is an address, also in odd ways such as 127.1 and 0x7f000001; None where it is a name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return None
    return str(found[0][4][0])
