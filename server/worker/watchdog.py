"""Ends the process when the device does not answer: no Python code could do that while a kernel hangs."""

import faulthandler
import sys
from collections.abc import Generator
from contextlib import contextmanager


def arm(limit_seconds: float) -> None:
    """End the process, with a traceback of all threads, in so long, unless it is disarmed or armed anew before.

    The lease then brings the job back. There is one such timer in a process, so only the lane may use it.
    """
    # It writes to a file descriptor: a standard error that was replaced may have none.
    faulthandler.dump_traceback_later(limit_seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def disarm() -> None:
    """Let the process live."""
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def watchdog(limit_seconds: float) -> Generator[None]:
    """End the process if the block takes longer than `limit_seconds`; afterwards nothing is armed."""
    arm(limit_seconds)
    try:
        yield
    finally:
        disarm()
