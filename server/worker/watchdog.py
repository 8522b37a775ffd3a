"""Ends the process when the device does not answer: no Python code could do that while a kernel hangs."""

import faulthandler
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def watchdog(limit_seconds: float) -> Generator[None]:
    """End the process, with a traceback of all threads, if the block takes longer than `limit_seconds`.

    The lease then brings the job back. There is one such timer in a process, so only the lane may use it.
    """
    # It writes to a file descriptor: a standard error that was replaced may have none.
    faulthandler.dump_traceback_later(limit_seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
