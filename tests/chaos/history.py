"""The history of a run: what clients sent and were answered, what workers said, which faults there were.

It lies in a file of its own, outside of everything that is hurt, and only ever grows.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]


class History:
    """Adds entries to a file of JSON lines; any number of threads and processes may write at the same time.

    Args:
        path: made if missing; what is there already stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, kind: str, *, at: float | None = None, **fields: Any) -> None:
        """Add an entry in one write, so that no two of them ever mix.

        Args:
            kind: such as `submit.answered`.
            at: when it was, in seconds since 1970; now when left out.
            **fields: whatever JSON can say.
        """
        entry = {"at": round(time.time() if at is None else at, 4), "kind": kind, **fields}
        os.write(self._descriptor, json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Write no more."""
        os.close(self._descriptor)


def read_history(path: Path) -> Iterator[Entry]:
    """Yield the entries in the order in which they were written; a last one that was cut off is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
