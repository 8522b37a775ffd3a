"""What only a GPU can show; on a machine without one every test here is skipped, and says so.

`RESTAGE_GPU_TEST_DEVICE=cpu` tries the code of the tests themselves where there is no GPU; it shows nothing of one.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.pipelines.conftest import Twin, photos, twin_spec
from tests.integration.worker.conftest import environment, new_workers

__all__ = ["environment", "new_workers", "photos"]

DEVICE = os.environ.get("RESTAGE_GPU_TEST_DEVICE", "cuda:0")


@pytest.fixture(autouse=True, scope="session")
def device() -> str:
    """Give the device; skips every test where it is not there."""
    import torch

    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU with a driver that torch can use is here")
    return DEVICE


@pytest.fixture
def cuda(device: str) -> str:
    """Give the device to a test that means nothing on another than a GPU."""
    if not device.startswith("cuda"):
        pytest.skip("this needs a GPU even to be tried")
    return device


@pytest.fixture(params=["qwen", "kontext", "klein"])
def gpu_twin(request: pytest.FixtureRequest, device: str, weights_dir: Path) -> Iterator[Twin]:
    """Give a twin on the GPU, of each family in turn."""
    import importlib

    from pipelines.loading import load_model

    spec = twin_spec(weights_dir, request.param)
    params_model = importlib.import_module(f"pipelines.{spec.family}.params").Params
    twin = Twin(request.param, load_model(spec, device), params_model)
    yield twin
    twin.model.close()


@pytest.fixture
def allocated() -> Callable[[], int]:
    """Give a function that tells how many bytes tensors hold on the GPU."""
    import gc

    import torch

    def count() -> int:
        gc.collect()
        torch.cuda.synchronize(DEVICE)
        return torch.cuda.memory_allocated(DEVICE)

    return count
