"""What the command line tells its user when a call does not work out; every message says what to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast


class ClientError(Exception):
    """Base of what ends a command; the message stands alone."""


class ServerUnreachable(ClientError):
    """Raised when no server answers, or none that works, within the client's patience."""


class BadPhotos(ClientError):
    """Raised when photos cannot be sent as they are; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class TransferFailed(ClientError):
    """Raised when a photo could not be sent to the store, or a result not fetched from it.

    `http_status` is the store's answer; None where there was none.
    """

    def __init__(self, detail: str, http_status: int | None = None) -> None:
        super().__init__(detail)
        self.http_status = http_status

    @property
    def is_worth_another_try(self) -> bool:
        """Whether the same request may succeed later."""
        return self.http_status is None or self.http_status >= 500 or self.http_status in {408, 429}


class WrongBytes(TransferFailed):
    """Raised when a photo is not what was announced any more, or a result not what was recorded."""

    @property
    def is_worth_another_try(self) -> bool:
        """The same request would end in the same way."""
        return False


class AlreadyRunning(ClientError):
    """Raised when the same command is under way in another process."""


@dataclass(frozen=True)
class ItemProblem:
    """Why one item of a request was refused."""

    index: int
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class ApiError(ClientError):
    """Raised when the server refuses a call for a reason that asking again would not change.

    `items` holds the reasons by item, where every item of a request was refused.
    """

    def __init__(self, http_status: int, problem: Mapping[str, Any]) -> None:
        self.http_status = http_status
        self.code = str(problem.get("code", "unknown"))
        self.items = tuple(read_item_problems(problem))
        detail = str(problem.get("detail") or problem.get("title") or "no reason was given")
        lines = [f"the server refused the call ({http_status} {self.code}): {detail}"]
        fields = [error for error in _errors(problem) if "location" in error]
        places = [f"{field['location']}: {field.get('detail')}" for field in fields]
        lines += [f"  {place}" for place in places if place not in detail]
        if http_status >= 500 and "request_id" in problem:
            lines.append(f"  the server's log has more under request id {problem['request_id']}")
        if http_status == 401:
            lines.append("  set RESTAGE_API_KEY to a key that `restage keys add` made on the server")
        super().__init__("\n".join(lines))


def read_item_problems(body: Mapping[str, Any]) -> list[ItemProblem]:
    """Read the refused items from an answer, if there are any."""
    return [
        ItemProblem(int(error["index"]), str(error.get("code")), str(error.get("detail")))
        for error in _errors(body)
        if "index" in error
    ]


def _errors(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", body.get("errors") or [])
