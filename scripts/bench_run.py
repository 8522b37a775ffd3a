"""The frame of a benchmark: the machine at its head, and the table, the time and the JSON at its end."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
from bench_report import Figure, as_json, as_markdown, describe_machine
from bench_servers import BenchFailed

from server.embedded import EmbeddedServerFailed

# What ends a benchmark with a line in place of a traceback.
FAILURES = (BenchFailed, EmbeddedServerFailed, httpx.TransportError)


class BenchRun:
    """One run of a benchmark.

    Args:
        options: from the command line; `seed` is printed, and `json` may name a file for everything.

    Attributes:
        machine: what it runs on, in words; more may be added.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        # Ends as Ctrl-C does, so that servers and folders go.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        self._options = options
        self._started = time.monotonic()
        self.machine = describe_machine()
        print("\n".join(f"{name}: {text}" for name, text in self.machine.items()))
        print(f"seed: {options.seed}\n", flush=True)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._started

    def finish(self, figures: Sequence[Figure], *, remark: str = "", **found: Any) -> None:
        """Print the table, and write the JSON where that was asked for.

        Args:
            figures: in the order of the table.
            remark: stands behind the time that the run took.
            found: goes into the JSON beside the options.
        """
        print(f"\n{as_markdown(figures)}\n\ntook {self.seconds:.0f} s{remark}")
        if self._options.json:
            run = {name: value for name, value in vars(self._options).items() if name != "json"}
            self._options.json.write_text(as_json(figures, self.machine, run | found) + "\n")
