"""A worker that takes LOAD_SECONDS more for each model after its first: `python -m …slow_worker worker`."""

import os
import runpy
import time
from typing import Any

import pipelines.loading

if __name__ == "__main__":
    load_model = pipelines.loading.load_model
    pauses = iter([0.0])

    def load_slowly(*args: Any, **options: Any) -> Any:
        """Wait as one does for a large file, then load the tiny one."""
        time.sleep(next(pauses, float(os.environ["LOAD_SECONDS"])))
        return load_model(*args, **options)

    pipelines.loading.load_model = load_slowly
    runpy.run_module("server.cli", run_name="__main__", alter_sys=True)
