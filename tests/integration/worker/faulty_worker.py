"""A worker whose device fails in the midst of a job: `python -m tests.integration.worker.faulty_worker worker`.

Everything is the real worker's, but that the run of a job with the prompt `fault` does, at its tenth step, what the
variable FAULT names.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import runpy
import signal
import sys
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
            spoil(module)

        loader.exec_module = exec_and_spoil
        return spec


if __name__ == "__main__":
    sys.meta_path.insert(0, SpoilingFinder())
    runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
