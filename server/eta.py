"""How long a batch will still take, from what the runs of its models took lately."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from server.jobs import Batch, Job, JobStatus

# What COMMIT keeps for each model: seconds of a whole run, and seconds of a step by the size of the output.
RUN = "run"
_STEP = "step:"


@dataclass(frozen=True)
class ModelLoad:
    """What stands between a batch and its end at one of its models.

    Attributes:
        num_ahead: jobs that will be claimed before the last one of the batch that is ready, its own included.
        num_workers: live workers that serve the model.
        speeds: seconds by what was measured; empty when nothing was yet.
    """

    num_ahead: int
    num_workers: int
    speeds: Mapping[str, float]


def measured_speeds(run_seconds: float, num_steps: int, height: int, width: int) -> dict[str, float]:
    """Return what a run tells about the next ones.

    Args:
        run_seconds: on the device, encoding and decoding included.
        num_steps: of the run; with none, its steps tell nothing.
        height: of the output in pixels.
        width: likewise.
    """
    speeds = {RUN: run_seconds}
    return speeds if num_steps < 1 else speeds | {f"{_STEP}{_size(height, width)}": run_seconds / num_steps}


def estimate_seconds(batch: Batch, loads: Mapping[str, ModelLoad]) -> float | None:
    """Estimate when the last job of a batch will have ended, in seconds from now.

    The jobs of a model are shared by its workers. Jobs of others that come first are taken for average ones; what the
    batch itself waits for goes by steps and size. Retries, loads of models and work that is still to come are unknown.

    Args:
        batch: with its jobs.
        loads: by model, for each model that has open jobs in the batch.

    Returns:
        None when nothing is open, a model was never measured, or no worker serves it.
    """
    if not loads:
        return None
    seconds = 0.0
    for model, load in loads.items():
        jobs = [job for job in batch.jobs if job.model == model]
        if load.num_workers < 1 or RUN not in load.speeds:
            return None
        seconds += _seconds_of_model(jobs, load)
    return round(seconds, 1)


def _seconds_of_model(jobs: list[Job], load: ModelLoad) -> float:
    queued = [job for job in jobs if job.status == JobStatus.QUEUED]
    running = [job for job in jobs if job.status == JobStatus.RUNNING]
    own = sum(_job_seconds(job, load.speeds) for job in queued)
    # Where some are ready, the last of them is not ahead of itself; those that wait for another try are in no line.
    num_own_ahead = max(0, sum(job.queue_position is not None for job in queued) - 1)
    others = (load.num_ahead - num_own_ahead) * load.speeds[RUN]
    under_way = [_job_seconds(job, load.speeds) * _share_left(job) for job in running]
    # Shared by all workers, but one job does not get faster by a second one.
    return max([(own + others + sum(under_way)) / load.num_workers, *under_way])


def _job_seconds(job: Job, speeds: Mapping[str, float]) -> float:
    steps = job.params.get("num_inference_steps")
    height, width = job.params.get("height"), job.params.get("width")
    if not isinstance(steps, int) or not isinstance(height, int) or not isinstance(width, int):
        return speeds[RUN]
    measured = {float(name.removeprefix(_STEP)): one for name, one in speeds.items() if name.startswith(_STEP)}
    if not measured:
        return speeds[RUN]
    wanted = _size(height, width)
    nearest = min(measured, key=lambda size: abs(size - wanted))
    # A size that was never measured is taken to cost as its pixels do.
    return steps * measured[nearest] * 2 ** (wanted - nearest)


def _share_left(job: Job) -> float:
    if job.step is None or not job.total_steps:
        return 1.0
    return 1 - job.step / job.total_steps


def _size(height: int, width: int) -> float:
    """The power of two that the number of pixels is nearest to, in steps of a half: few sizes, each measured often."""
    return round(2 * math.log2(height * width)) / 2
