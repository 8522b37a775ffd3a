"""When a webhook is tried again, and when it is given up: a pure function of what came of an attempt."""

from dataclasses import dataclass
from typing import Final, Literal

Outcome = Literal["delivered", "retrying", "gave_up"]

_DELAYS_SECONDS: Final = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0)
_LONGEST_DELAY_SECONDS: Final = 4 * 3600.0
# A quarter either way: receivers that failed together are not called together again.
_SPREAD: Final = 0.25
_SHORTEST_DELAY_SECONDS: Final = 1.0
_GONE: Final = 410


@dataclass(frozen=True)
class Answer:
    """What came of one attempt.

    Attributes:
        http_status: None where no answer came.
        detail: what went wrong, in our own words, never in the receiver's; at most 200 characters.
    """

    http_status: int | None
    detail: str | None

    @property
    def is_success(self) -> bool:
        """Whether the receiver has taken it: any status of the 200s."""
        return self.http_status is not None and 200 <= self.http_status < 300


@dataclass(frozen=True)
class Decision:
    """How an attempt is noted, and when the next one follows; None where there is none."""

    outcome: Outcome
    delay_seconds: float | None = None


def next_delay_seconds(attempt: int, jitter: float) -> float:
    """Give the pause after an attempt that failed: 5 s, 30 s, 2, 10, 30 min, 1 h, 2 h, then 4 h each.

    Args:
        attempt: counted from 1.
        jitter: random, from 0 to 1.
    """
    delay = _DELAYS_SECONDS[attempt - 1] if attempt <= len(_DELAYS_SECONDS) else _LONGEST_DELAY_SECONDS
    return delay * (1 - _SPREAD + 2 * _SPREAD * jitter)


def decide(answer: Answer, *, attempt: int, elapsed_seconds: float, give_up_seconds: float, jitter: float) -> Decision:
    """Decide what follows from an answer.

    Args:
        answer: of the attempt that was just made.
        attempt: its number, counted from 1.
        elapsed_seconds: since the first attempt was due.
        give_up_seconds: for so long it is tried; the last attempt is made at the end of that time.
        jitter: random, from 0 to 1.
    """
    if answer.is_success:
        return Decision("delivered")
    left_seconds = give_up_seconds - elapsed_seconds
    if answer.http_status == _GONE or left_seconds <= 0:
        return Decision("gave_up")
    delay = min(next_delay_seconds(attempt, jitter), max(left_seconds, _SHORTEST_DELAY_SECONDS))
    return Decision("retrying", delay)
