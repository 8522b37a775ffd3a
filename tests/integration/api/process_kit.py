"""`restage api` as a process, as several files of this folder start it."""

import os
import subprocess
import sys
from typing import Any

from server.ports import free_ports


def spawn_api(valkey: Any, s3: Any, *, stdout: int, **environment: str) -> tuple["subprocess.Popen[str]", int]:
    """Start an API on a free port, which logs JSON; returns the process and the port, before it answers."""
    [port] = free_ports(1)
    settings = {
        "RESTAGE_ENV": "test",
        "RESTAGE__REDIS__URL": valkey.url,
        "RESTAGE__SERVER__PORT": str(port),
        "RESTAGE__LOG__FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "api"],
        env=os.environ | settings | s3.environment | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, port
