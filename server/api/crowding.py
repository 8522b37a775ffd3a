"""How many clients one process serves at once: who comes beyond that is told so, and when to come back."""

from contextlib import AsyncExitStack
from typing import Any, ClassVar

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler
from litestar.types import Scope

from server.errors import DependencyError

# A body of JSON has seldom more, even of fifty items with prompts of their own.
LARGE_BYTES = 64 * 1024
# An archive holds a whole result in memory, where an event stream holds next to nothing.
_STREAMS_PER_ARCHIVE = 10
# In the state of a request whose connection is one too many.
CROWDED = "is_crowded"


class TooManyConnections(DependencyError):
    """Raised when more connections are open than `server.max_connections`."""

    code: ClassVar[str] = "too_many_connections"
    title: ClassVar[str] = "Too many connections are open"
    retry_after_seconds: ClassVar[int] = 5


class TooManyStreams(DependencyError):
    """Raised when as many event streams and archives are open as `server.max_streams`, or a tenth as many archives."""

    code: ClassVar[str] = "too_many_streams"
    title: ClassVar[str] = "Too many streams are open"
    retry_after_seconds: ClassVar[int] = 10


class TooManyLargeBodies(DependencyError):
    """Raised when a body of JSON is large, and as many large ones as there may be are in memory."""

    code: ClassVar[str] = "too_many_large_bodies"
    title: ClassVar[str] = "Too many large requests at once"


def is_crowded(scope: Scope) -> bool:
    """Tell whether a request came over a connection that is one too many."""
    return bool(scope["state"].get(CROWDED))


def refuse_when_crowded(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Let a request pass unless its connection is one too many; nothing of it is read.

    Probes of the process' health do not come here: a process that is crowded is not ill.

    Raises:
        TooManyConnections: it is.
    """
    if is_crowded(connection.scope):
        raise TooManyConnections("more connections are open than server.max_connections allows; close those not in use")


class LargeBodies:
    """Counts the bodies of JSON that take much memory: clients that send them slowly could else fill it.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_taken = 0

    def take(self, until: AsyncExitStack) -> None:
        """Take a place for a body that turned out to be large.

        Args:
            until: gives the place back.

        Raises:
            TooManyLargeBodies: there is none.
        """
        if self._num_taken >= self._most:
            raise TooManyLargeBodies(
                f"{self._most} requests with more than {LARGE_BYTES} bytes of JSON are being read; try again"
            )
        self._num_taken += 1
        until.callback(self._give_back)

    def _give_back(self) -> None:
        self._num_taken -= 1


class OpenStreams:
    """Counts the answers that last as long as their clients like.

    Args:
        most: how many there may be; a tenth of them, but one at least, may be archives.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_archives = max(1, most // _STREAMS_PER_ARCHIVE)
        self._num_open = 0
        self._num_archives = 0

    def take(self, until: AsyncExitStack) -> None:
        """Take a place for an answer before it is begun.

        Args:
            until: gives the place back.

        Raises:
            TooManyStreams: there are as many as there may be.
        """
        if self._num_open >= self._most:
            raise TooManyStreams(
                f"{self._most} event streams and archives are open, which is what server.max_streams allows; "
                "GET /v1/batches/{id} tells the same without a stream"
            )
        self._num_open += 1
        until.callback(self._give_back)

    def take_for_archive(self, until: AsyncExitStack) -> None:
        """Take a place for an archive before it is begun; as `take`, and raises TooManyStreams sooner."""
        if self._num_archives >= self._most_archives:
            raise TooManyStreams(
                f"{self._most_archives} archive(s) are open, a tenth of what server.max_streams allows; GET "
                "/v1/jobs/{id}/output gives each result by itself"
            )
        self.take(until)
        self._num_archives += 1
        until.callback(self._give_back_archive)

    def _give_back(self) -> None:
        self._num_open -= 1

    def _give_back_archive(self) -> None:
        self._num_archives -= 1
