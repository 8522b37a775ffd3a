"""Child processes that never outlive us: each dies with its parent, has a session of its own and writes to a log."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# Runs between fork and exec, in a Python of its own: `preexec_fn` may deadlock when the parent has threads.
# A parent that died before the kernel was told has been replaced by another, hence the look at the parent's id.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process has gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be started: {error}")
"""
_TAIL_BYTES = 64_000


class Child:
    """One child process.

    It is killed by the kernel when the **thread** that started it ends, so start it from a thread that lives as long
    as it shall (Linux ties the two, whichever way the thread ends).

    Args:
        name: what messages call it.
        command: program (absolute path) and arguments.
        log_file: its standard output and error are appended here.
        cwd: its working directory; the parent's when left out.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._command = list(command)
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id, also that of its session and process group; None before the first start."""
        return None if self._process is None else self._process.pid

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the process; returns at once.

        Args:
            environment: all of its variables; the parent's when left out.

        Raises:
            OSError: the log file cannot be written or no process can be made.
        """
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 (the command is ours)
                [*launcher, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._cwd,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process, if it still runs."""
        if self._process is not None:
            self._process.send_signal(signum)

    def stop(self, timeout_seconds: float) -> int | None:
        """Ask it to end with SIGTERM, kill it after `timeout_seconds`, and kill whatever it left in its session.

        Safe to call again, and before the first start.

        Returns:
            Its exit status, negative for a signal; None if it was never started.
        """
        if self._process is None:
            return None
        self._process.terminate()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.kill_group()
        return self._process.returncode

    def kill_group(self) -> None:
        """Kill the process, at once, and all that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # all have ended, which is what was asked for
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def describe_end(self, end: str) -> str:
        """Tell how it ended (such as "ended with status 1"), with the last that it wrote."""
        return f"{self.name} {end}; its last output:\n{self.tail()}"

    def tail(self, num_lines: int = 20) -> str:
        """Last lines that it wrote since it was last started."""
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as log:
            size_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size_bytes - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-num_lines:])
