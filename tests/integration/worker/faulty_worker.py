"""A worker whose device fails in the midst of a job: `python -m tests.integration.worker.faulty_worker worker`.

Everything is the real worker's, but that the run of a job with the prompt `fault` does, at its tenth step, what the
variable FAULT names, and that its clock is CLOCK_SKEW_SECONDS ahead of the others'.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

AT_STEP = 10


def fail() -> None:
    """Do what FAULT names."""
    fault = os.environ["FAULT"]
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "segfault":
        ctypes.string_at(0)
    elif fault == "native_hang":
        # With the interpreter's lock held, as a library that hangs would: no thread of Python runs from now on.
        ctypes.PyDLL(None).pause()
    while fault == "python_hang":
        pass


def spoil(running: Any) -> None:
    """Let runs fail."""
    end_step = running.Run._end_step

    def end_step_or_fail(self: Any, pipeline: Any, step: int, *args: Any) -> Any:
        if step + 1 == AT_STEP and self._call.kwargs["prompt"] == "fault":
            fail()
        return end_step(self, pipeline, step, *args)

    running.Run._end_step = end_step_or_fail


class SpoilingFinder(importlib.abc.MetaPathFinder):
    """Spoils `pipelines.running` when the worker imports it, so that all is imported in the worker's own order."""

    def __init__(self, spoil: Callable[[Any], None]) -> None:
        self._spoil = spoil

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002
        """Find that module alone."""
        if fullname != "pipelines.running":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        exec_module = loader.exec_module

        def exec_and_spoil(module: Any) -> None:
            exec_module(module)
            self._spoil(module)

        loader.exec_module = exec_and_spoil
        return spec


def set_clock(seconds: float) -> None:
    """Let the clock of this process be so far ahead."""
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 10**9)


if __name__ == "__main__":
    set_clock(float(os.environ.get("CLOCK_SKEW_SECONDS", "0")))
    sys.meta_path.insert(0, SpoilingFinder(spoil))
    runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
