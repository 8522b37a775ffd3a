"""What the models of this worker take of its device, as planned, and what of its memory is really taken."""

import os
from collections.abc import Iterable, Mapping, Sequence

import structlog
import torch

from pipelines.architectures import architecture_of_folder
from pipelines.counting import size_model
from pipelines.errors import OutOfMemory, WeightsError
from pipelines.memory_plan import RESERVE_BYTES, ModelMemory, PlannedRun
from pipelines.weights import ModelSpec
from server.ledger.status import WorkerMemory
from server.worker.placement import Room

GIB = 2**30

log = structlog.stdlib.get_logger()


class DeviceMemory:
    """A plan of the device's memory. Only the lane changes it; every thread may ask.

    Args:
        device: as torch names it.
        memory_bytes: to plan into; None: all that a GPU has, or half of what the machine has.
        max_models: that may be in memory together; None: as many as fit.
    """

    def __init__(self, device: str, *, memory_bytes: int | None, max_models: int | None) -> None:
        self._device = device
        self._budget_bytes = memory_bytes
        self._max_models = max_models
        # Replaced as a whole, so that other threads always see a finished one.
        self._sizes: Mapping[str, ModelMemory] = {}
        self._runs: dict[str, PlannedRun] = {}

    @property
    def sizes(self) -> Mapping[str, ModelMemory]:
        """What was counted, by name of the model."""
        return self._sizes

    @property
    def room(self) -> Room:
        """What fits."""
        return Room(self._sizes, budget_bytes=self._budget_bytes, max_models=self._max_models)

    def look(self) -> None:
        """Find out how much memory there is to plan into.

        Raises:
            Exception: whatever torch says of a device that is not there, or cannot be used.
        """
        if self._budget_bytes is None:
            self._budget_bytes = total_bytes(self._device)

    def count(self, name: str, spec: ModelSpec) -> None:
        """Count a model whose folder has been checked; what cannot be counted takes nothing, as far as anybody knows.

        Raises:
            OutOfMemory: its weights alone take more than there is.
        """
        try:
            size = size_model(spec, architecture_of_folder(spec.weights_dir), num_photos=spec.num_photos)
        except WeightsError as error:
            log.warning("model.uncounted", model=name, missing=str(error))
            return
        if size.not_counted:
            log.info("model.uncounted", model=name, missing="; ".join(size.not_counted))
        self._sizes = {**self._sizes, name: size.memory}
        self._runs[name] = PlannedRun(spec.area, spec.num_photos, size.phases, size.moved)
        self._check_fits(name)

    def _check_fits(self, name: str) -> None:
        weights_bytes, budget_bytes = self._sizes[name].weights_bytes, self._budget_bytes
        if budget_bytes is not None and weights_bytes > budget_bytes:
            raise OutOfMemory(
                f"{name}: its weights take {weights_bytes / GIB:.2f} GiB, and this worker has {budget_bytes / GIB:.2f} "
                f"GiB for models on {self._device} (worker.memory_bytes)"
            )

    def can_run(self, name: str, loaded: Iterable[str], *, height: int, width: int, num_photos: int) -> bool:
        """Tell whether a run fits beside the weights that are in memory, by estimate.

        Args:
            name: of its model.
            loaded: names of all models in memory.
            height: of the output in pixels.
            width: likewise.
            num_photos: that it reads.
        """
        if self._budget_bytes is None or name not in self._runs:
            return True
        weights_bytes = sum(self._sizes[one].weights_bytes for one in loaded if one in self._sizes)
        run_bytes = self._runs[name].bytes_for(height, width, num_photos)
        return weights_bytes + run_bytes + RESERVE_BYTES <= self._budget_bytes

    def by_model(self, ids: Mapping[str, str], loaded: Sequence[str]) -> Room:
        """Return what fits with versions that are in memory counted as one with the model they are of.

        Args:
            ids: name → id of the model.
            loaded: names of what is in memory.
        """
        sizes = {model: size for model, size in self._sizes.items() if ids[model] == model}
        for name in loaded:
            model = ids[name]
            if name != model and name in self._sizes:
                one, more = sizes.get(model, ModelMemory(model, 0, 0)), self._sizes[name]
                activation_bytes = max(one.activation_bytes, more.activation_bytes)
                sizes[model] = ModelMemory(model, one.weights_bytes + more.weights_bytes, activation_bytes)
        return Room(sizes, budget_bytes=self._budget_bytes, max_models=self._max_models)

    def status(self) -> WorkerMemory:
        """Return what the worker announces."""
        if not (self._device.startswith("cuda") and torch.cuda.is_initialized()):
            return WorkerMemory(self._budget_bytes)
        allocated_bytes = torch.cuda.memory_allocated(self._device)
        return WorkerMemory(self._budget_bytes, allocated_bytes, torch.cuda.memory_reserved(self._device))


def total_bytes(device: str) -> int:
    """Return how much memory models may be planned into.

    Raises:
        Exception: whatever torch says of a device that is not there, or cannot be used.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    # The other half is for the photos, for the libraries, and for everybody else.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
