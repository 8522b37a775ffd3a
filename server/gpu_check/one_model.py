"""Measures one model in one variant, in a process that nothing else depends on: it may run out of memory, or crash."""

import os
import sys
import time
from pathlib import Path
from typing import Any

# Before torch: it may load the libraries that read these.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as a worker sets it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from pipelines.architectures import Architecture, Component
from pipelines.errors import OutOfMemory, PipelineError
from pipelines.loading import LoadedModel, load_model, prepare_pipeline
from pipelines.measuring import (
    Figures,
    largest_edit,
    measure_cancel,
    measure_peak,
    measure_preemption,
    measure_speed,
    measure_stepped,
    ordinary_edit,
    synchronize,
    torch_threads,
)
from pipelines.optimization_params import Optimizations
from pipelines.optimizations import check_optimizations, place_pipeline
from pipelines.random_weights import build_with_random_weights, save_with_padded_tokenizers
from pipelines.running import is_out_of_memory, one_line
from pipelines.weights import ModelSpec
from server.gpu_check.task import PLAIN, UNFINISHED, Result, Task

# Of cancels and preemptions; each costs a few steps.
_REACTIONS = 5
_EXIT_FAILED = 1


class Measurement:
    """One task under way; every figure is written down as soon as it is known.

    Args:
        task: what to measure.
        result_file: is replaced with each further figure.
    """

    def __init__(self, task: Task, result_file: Path) -> None:
        self._task = task
        self._result_file = result_file
        self._figures: Figures = {}
        self._spec = ModelSpec(
            id=task.model,
            family=task.family,
            pipeline=task.pipeline,
            weights_dir=Path(task.load_dir or ""),
            dtype=task.dtype,
            area=task.area,
            optimizations=Optimizations.model_validate(task.optimizations),
        )

    def run(self) -> Result:
        """Measure everything that the task asks for."""
        try:
            model = self._build()
            self._measure(model)
            self._measure_loading(model)
        except OutOfMemory as error:
            return self._write("failed", f"out of memory: {error}")
        except PipelineError as error:
            # Refused is only what was told before anything was measured.
            return self._write("failed" if self._figures else "skipped", str(error))
        except OSError as error:  # such as a disk that is full
            return self._write("failed", one_line(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return self._write("failed", f"out of memory: {one_line(error)}")
        return self._write("measured")

    def _build(self) -> LoadedModel:
        task = self._task
        parts = {
            name: Component(part["library"], part["class_name"], part["config"])
            for name, part in task.components.items()
        }
        started = time.perf_counter()
        pipeline: Any = build_with_random_weights(self._spec, Architecture(parts), task.build_device or task.device)
        check_optimizations(self._spec, pipeline, task.device)
        synchronize(task.device)
        self._note({"build_seconds": time.perf_counter() - started})
        place_pipeline(self._spec, pipeline, task.device)
        prepare_pipeline(pipeline)
        return LoadedModel(self._spec, pipeline)

    def _measure(self, model: LoadedModel) -> None:
        task = self._task
        edit, device = ordinary_edit(task.params, task.area), task.device
        size: dict[str, int] = {"num_steps": task.num_steps, "repeats": task.repeats}
        if task.variant != PLAIN:
            self._note(measure_stepped(model, edit, device, **size))
            self._note(measure_peak(model, edit.of_steps(task.num_steps), device))
            return
        self._note(measure_speed(model, edit, device, **size))
        step_seconds = self._figures["step_seconds"]
        reactions: dict[str, Any] = {"step_seconds": step_seconds, "repeats": _REACTIONS}
        self._note(measure_cancel(model, edit.of_steps(task.num_steps), device, **reactions))
        self._note(measure_preemption(model, edit.of_steps(task.num_steps), device, **reactions))
        self._note(measure_peak(model, largest_edit(model, task.params, task.num_photos), device))

    def _measure_loading(self, model: LoadedModel) -> None:
        if self._task.load_dir is None:
            return
        started = time.perf_counter()
        save_with_padded_tokenizers(model.pipeline, Path(self._task.load_dir))
        self._note({"save_seconds": time.perf_counter() - started})
        model.close()
        for name in ("load_seconds", "load_again_seconds"):
            started = time.perf_counter()
            loaded = load_model(self._spec, self._task.device)
            synchronize(self._task.device)
            self._note({name: time.perf_counter() - started})
            loaded.close()

    def _note(self, figures: Figures) -> None:
        self._figures |= figures
        # Should this process end here, this is what is known of it.
        self._write("failed", UNFINISHED)

    def _write(self, outcome: Any, reason: str = "") -> Result:
        result = Result(self._task.model, self._task.variant, outcome, reason, self._figures)
        result.write(self._result_file)
        return result


def main(task_file: Path, result_file: Path) -> int:
    """Measure what a file asks for, and write what was found into another."""
    task = Task.read(task_file)
    if task.device.startswith("cuda"):
        torch.cuda.set_device(task.device)
    elif (num_threads := torch_threads(task.device)) is not None:
        torch.set_num_threads(num_threads)
    result = Measurement(task, result_file).run()
    return _EXIT_FAILED if result.outcome == "failed" else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
