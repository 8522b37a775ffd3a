"""The HTTP process stays light: it never loads the engine, and starts in about a second."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys, time
started = time.perf_counter()
from server.main import create_app
from server.settings import load_settings
env = {"RESTAGE_ENV": "test", "RESTAGE__STORE__ACCESS_KEY": "a", "RESTAGE__STORE__SECRET_KEY": "b"}
create_app(load_settings(env=env)).openapi_schema
print(json.dumps({"seconds": time.perf_counter() - started, "modules": sorted(sys.modules)}))
"""
ENGINE = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "safetensors", "numpy"}


def test_the_api_starts_without_the_engine():
    """After the app was made and described, nothing of torch and its companions is loaded."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    print(f"create_app() took {answer['seconds']:.2f} s with its imports")  # noqa: T201 (for `pytest -s`)
    assert ENGINE.isdisjoint(answer["modules"])
    assert answer["seconds"] < 10


def test_decoders_start_without_the_engine():
    """A worker starts its decoding processes, and they begin, before anything of torch is loaded."""
    script = "import json, sys, server.worker.decoding, server.worker.decoding_child; print(json.dumps([*sys.modules]))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert (ENGINE - {"numpy"}).isdisjoint(json.loads(done.stdout))
