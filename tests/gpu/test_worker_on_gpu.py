"""A real worker process on a real GPU: it does jobs, and ends when its CUDA context is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.jobs import JobStatus

EXIT_DEVICE_LOST = 5
LONG = {"num_inference_steps": 100, "height": 1024, "width": 1024}
# Breaks the CUDA context of its process as soon as a file is there: an index beyond a tensor's end is noticed by the
# kernel, and every later call fails. Python imports a module of this name at its start.
BREAKER = """
import os, sys, threading, time

def break_context():
    while not os.path.exists(os.environ["BREAK_CUDA_WHEN"]):
        time.sleep(0.01)
    import torch
    torch.zeros(2, device="cuda:0")[torch.full((1,), 10**6, device="cuda:0")]

if "BREAK_CUDA_WHEN" in os.environ and "worker" in sys.orig_argv:
    threading.Thread(target=break_context, daemon=True).start()
"""


def test_a_job_is_done_on_the_gpu(device: str, new_workers: Callable[..., Any], valkey: Any) -> None:
    """From the ledger to the stored picture; the worker says on which device."""
    workers = new_workers(valkey.url, RESTAGE__WORKER__DEVICE=device)
    workers.start()
    workers.wait_ready()
    photo = workers.upload(workers.picture())
    batch_id, *_ = workers.submit(*(workers.job(photo, model) for model in (workers.FLUX, workers.QWEN)))
    for job in workers.finished(batch_id).jobs:
        assert job.status is JobStatus.SUCCEEDED
        assert workers.image(job).size == (job.output.width, job.output.height)
    assert [one.device for one in workers.statuses()] == [device]


def test_a_lost_context_ends_the_process_and_the_job_comes_back(
    cuda: str, new_workers: Callable[..., Any], valkey: Any, tmp_path: Path
) -> None:
    """The error is sticky, so the worker ends with a status of its own; another does the job, which is a suspect."""
    folder, marker = tmp_path / "breaker", tmp_path / "now"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BREAKER)
    workers = new_workers(valkey.url, RESTAGE__WORKER__DEVICE=cuda)
    worker = workers.start(PYTHONPATH=str(folder), BREAK_CUDA_WHEN=str(marker))
    workers.wait_ready()
    photo = workers.upload(workers.picture())
    batch_id, job_id = workers.submit(workers.job(photo, params=LONG))
    workers.step(job_id)

    marker.touch()
    workers.until("the end of the worker", lambda: not worker.is_running)

    assert worker.poll() == EXIT_DEVICE_LOST, worker.tail()
    assert "device.lost" in worker.tail(200)
    workers.start()
    (job,) = workers.finished(batch_id).jobs
    assert (job.status, job.attempts, job.suspect) == (JobStatus.SUCCEEDED, 2, True)
