"""Run `restage worker` so that it can be asked what memory it cannot do without; for soak_lane.py alone.

On SIGUSR1 it collects garbage, lets the allocator give back what it keeps, and adds the bytes of memory that remain
resident to the file that `SOAK_MEMORY` names, as a line.
"""

import ctypes
import gc
import os
import signal
from pathlib import Path
from types import FrameType


def report(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 (a signal handler)
    """Write down what is resident once all that can go has gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    with Path(os.environ["SOAK_MEMORY"]).open("a") as file:
        file.write(f"{num_pages * os.sysconf('SC_PAGE_SIZE')}\n")


if __name__ == "__main__":
    # Before the command starts its threads: only the main one hears signals, and it waits for them.
    signal.signal(signal.SIGUSR1, report)
    from server.cli import restage

    restage()
