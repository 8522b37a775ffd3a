"""Ports of 127.0.0.1 for servers that start side by side, on one machine, without knowing of each other."""

import os
import socket
from collections.abc import Iterable
from random import SystemRandom

# Below the range from which Linux takes the ports of outgoing connections, so that none of those is in the way.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """Find `count` ports of 127.0.0.1 on which nothing listens and which nobody has claimed.

    Another process may take one before its new owner does: a server that then cannot start is started again
    with other ports.

    Returns:
        Distinct ports, in random order.
    """
    claims = claim_free_ports(count)
    for claim in claims:
        claim.release()
    return [claim.port for claim in claims]


def claim_free_ports(count: int) -> "list[PortClaim]":
    """Claim `count` ports of 127.0.0.1 on which nothing listens; distinct, in random order."""
    candidates = iter(SystemRandom().sample(range(_FIRST_PORT, _LAST_PORT), _LAST_PORT - _FIRST_PORT))
    claims = (PortClaim.take(candidates) for _ in range(count))
    return [claim for claim in claims if claim is not None]


def is_free(port: int) -> bool:
    """Tell whether a server could listen on `port` of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still winding down can be listened on.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class PortClaim:
    """A port that no other claimant takes, though nothing listens on it yet; given up with the object at the latest.

    Between looking for a free port and listening on it, a server may need seconds, in which another would find the
    same port free. The claim is a name that the kernel lets only one process hold.
    """

    def __init__(self, port: int, holder: socket.socket) -> None:
        self.port = port
        # No socket object, which would complain where the collector, not `release`, ends the claim.
        self._descriptor: int | None = holder.detach()

    @classmethod
    def take(cls, ports: Iterable[int]) -> "PortClaim | None":
        """Claim the first of `ports` that is free and not claimed; None if there is none."""
        for port in ports:
            holder = socket.socket(socket.AF_UNIX)
            try:
                holder.bind(f"\0restage-port-{port}")
            except OSError:
                holder.close()
                continue
            if is_free(port):
                return cls(port, holder)
            holder.close()
        return None

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the port; may be called again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
