"""Whether the device still computes, and how many CPU threads go with it."""

import os

import structlog
import torch

from server.worker.watchdog import watchdog

EXIT_DEVICE_LOST = 5
# Beside a GPU the CPU only makes inputs ready: more threads would wait for each other, and keep those of the other
# workers of the machine from running.
THREADS_BESIDE_GPU = 4

log = structlog.stdlib.get_logger()


def end_if_lost(device: str, error: Exception, *, limit_seconds: float) -> None:
    """End the process when its device cannot be used after an error that nothing else explains.

    A CUDA context that has failed once fails for the rest of its process: only another process can use the device, and
    the leases bring the jobs back. Only to be called by the lane, between steps.
    """
    with watchdog(limit_seconds):
        works = device_works(device)
    if not works:
        log.critical("device.lost", device=device, exc_info=error)
        os._exit(EXIT_DEVICE_LOST)


def device_works(device: str) -> bool:
    """Tell whether the device still computes."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # after an illegal access, every later call reports it again
        return False
    return True


def cpu_threads(configured: int | None, device: str) -> int | None:
    """Return how many CPU threads torch uses for a run; None leaves it to torch, which takes all cores."""
    if configured is None and device.startswith("cuda"):
        return min(THREADS_BESIDE_GPU, torch.get_num_threads())
    return configured
