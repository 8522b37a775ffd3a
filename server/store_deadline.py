"""Ends a call of the store that takes too long in all: where a byte comes now and then, no read ever times out."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar


class Transfer:
    """One call of the store, and the connection that it uses now.

    Args:
        seconds: that it may take, with all that is tried again.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends_at = time.monotonic() + seconds
        self.is_over = False
        self._line: socket.socket | None = None
        self._changing = threading.Lock()

    def use(self, line: socket.socket) -> None:
        """Say over which connection it goes on."""
        with self._changing:
            self._line = line
            if self.is_over:  # and is begun anew: that ends at once, too
                self._shut()

    def leave(self, line: socket.socket | None) -> None:
        """Say that a connection is given back, before another call may take it: from now on it is not cut."""
        with self._changing:
            if self._line is line:
                self._line = None

    def cut(self) -> None:
        """End it: whoever reads from the connection or writes to it goes on at once, with an error or an end."""
        with self._changing:
            self.is_over = True
            self._shut()

    def _shut(self) -> None:
        if self._line is not None:
            with suppress(OSError):  # it has ended by itself
                # TLS' own way of shutting down would first take away what another thread is reading with.
                socket.socket.shutdown(self._line, socket.SHUT_RDWR)


_running: ContextVar[Transfer | None] = ContextVar("transfer", default=None)


def running_transfer() -> Transfer | None:
    """Return the call that this thread is in, if it has an end."""
    return _running.get()


class Deadlines:
    """Cuts the calls whose time is over, from a thread that sleeps until one may be."""

    def __init__(self) -> None:
        self._transfers: set[Transfer] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = float("inf")
        self._is_closed = False

    def close(self) -> None:
        """End the thread; calls that still run have no end any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def limited(self, seconds: float) -> Generator[Transfer]:
        """Run a call that may take so long."""
        transfer = Transfer(seconds)
        self._add(transfer)
        token = _running.set(transfer)
        try:
            yield transfer
        finally:
            _running.reset(token)
            with self._changed:
                self._transfers.discard(transfer)

    def _add(self, transfer: Transfer) -> None:
        with self._changed:
            self._transfers.add(transfer)
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._watch, name="store-deadlines", daemon=True)
                self._thread.start()
            # Most calls may take equally long: then the thread has an earlier one to wait for, and is left to sleep.
            if transfer.ends_at < self._wakes_at:
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                for transfer in self._transfers:
                    if transfer.ends_at <= now:
                        transfer.cut()
                left = [one.ends_at for one in self._transfers if not one.is_over]
                self._wakes_at = min(left, default=float("inf"))
                self._changed.wait(self._wakes_at - now if left else None)
