"""A worker with jobs that harm it: `python -m tests.chaos.chaos_worker worker`.

All is the real worker's, but that a run with the prompt `poison` kills the process amid its steps, and one with the
prompt `flaky` raises an error more often than not.
"""

import os
import random
import runpy
import signal
import sys
from typing import Any

from tests.integration.worker.faulty_worker import SpoilingFinder

POISON, FLAKY = "poison", "flaky"
FLAKY_SHARE = 0.6
# The last that a poisoned process says.
LAST_WORDS = '{"event": "poison.swallowed"}'
_HARMFUL_STEP = 2


def spoil(running: Any) -> None:
    """Let runs with these prompts go wrong."""
    end_step = running.Run._end_step

    def end_step_or_fail(self: Any, pipeline: Any, step: int, *args: Any) -> Any:
        prompt = self._call.kwargs["prompt"]
        if step + 1 == _HARMFUL_STEP and prompt == POISON:
            os.write(2, f"{LAST_WORDS}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if step + 1 == _HARMFUL_STEP and prompt == FLAKY and random.random() < FLAKY_SHARE:
            raise RuntimeError("this job is flaky")
        return end_step(self, pipeline, step, *args)

    running.Run._end_step = end_step_or_fail


if __name__ == "__main__":
    sys.meta_path.insert(0, SpoilingFinder(spoil))
    runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
