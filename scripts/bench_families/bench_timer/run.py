"""A run whose steps wait on a timer: a stand-in for the time of a device, to measure what is lost between its steps.

Everything around the steps is real. The photo is brought to the model's area as the families do it, and is the result.
Each run adds a line of JSON to the file that `BENCH_TIMELINE` names: when its parts began and ended, by the machine's
monotonic clock, which all processes share.
"""

import json
import os
import time
from functools import cache
from types import SimpleNamespace
from typing import Any

from diffusers import FluxKontextPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from PIL import Image

from pipelines.photos import fit_area
from pipelines.running import PipelineCall, RunRequest


@cache
def _timeline() -> int:
    # Opened once: what is measured must not wait for the measurement.
    return os.open(os.environ["BENCH_TIMELINE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


class TimerPipeline(FluxKontextPipeline):
    """A pipeline that was loaded and checked as any other, and computes nothing."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Image.Image,
        seed: int,
        num_inference_steps: int,
        step_seconds: float,
        times: dict[str, float],
        callback_on_step_end: Any,
    ) -> Any:
        """Wait so many times, and give the image back."""
        self._num_timesteps = num_inference_steps
        times["called"] = time.monotonic()
        for step in range(num_inference_steps):
            time.sleep(step_seconds)
            times["waited"] = time.monotonic()
            callback_on_step_end(self, step, None, {})
        times["ended"] = time.monotonic()
        os.write(_timeline(), json.dumps({"seed": seed, **times}).encode() + b"\n")
        return SimpleNamespace(images=[image])


def build_call(pipe: Any, photos: list[Image.Image], request: RunRequest) -> PipelineCall:
    """Turn the pipeline into one that waits, and prepare its call as the family of Kontext does.

    Args:
        pipe: the pipeline in memory.
        photos: one, RGB, of any size.
        request: the job, resolved.
    """
    times = {"prepared": time.monotonic()}
    pipe.__class__ = TimerPipeline
    params = request.params
    image, size = fit_area(photos[0], request.area), (params["width"], params["height"])
    if image.size != size:
        image = image.resize(size)
    times["built"] = time.monotonic()
    return PipelineCall(
        {
            "image": image,
            "seed": params["seed"],
            "num_inference_steps": params["num_inference_steps"],
            "step_seconds": params["step_milliseconds"] / 1000,
            "times": times,
        }
    )
