"""Which models are in the memory of this worker's device, and why others are not."""

import time
from collections.abc import Callable, Mapping

import structlog

from pipelines.errors import OutOfMemory, PipelineError, WeightsError
from pipelines.loading import LoadedModel, ModelSpec, check_weights, load_model
from server.ledger.status import WorkerModel
from server.worker.errors import ModelUnavailable
from server.worker.placement import Swap
from server.worker.run_job import failure_of
from server.worker.watchdog import watchdog

STARTING = "The worker is starting."

log = structlog.stdlib.get_logger()


class Residency:
    """The loaded models. Only the lane changes it; every thread may ask.

    Args:
        specs: the enabled models, by id, in the order in which they are loaded at the start.
        device: as torch names it.
        capacity: number of models that fit into memory.
        load_timeout_seconds: a load that takes longer ends the process.
        on_change: called after each change, from the lane.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        *,
        device: str,
        capacity: int,
        load_timeout_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self._specs = specs
        self._device = device
        self._capacity = capacity
        self._load_timeout_seconds = load_timeout_seconds
        self._on_change = on_change
        self._loaded: dict[str, LoadedModel] = {}
        # These two are replaced as a whole, so that other threads always see a finished one.
        self._loaded_at: Mapping[str, float] = {}
        self._reasons: Mapping[str, str] = dict.fromkeys(specs, STARTING)

    @property
    def resident(self) -> dict[str, float]:
        """The models in memory, and for how many seconds each has been there."""
        now = time.monotonic()
        return {model: now - since for model, since in self._loaded_at.items()}

    @property
    def usable(self) -> list[str]:
        """The models that are loaded or against which nothing is known."""
        reasons = self._reasons
        return [model for model in self._specs if reasons.get(model, STARTING) == STARTING]

    def statuses(self) -> dict[str, WorkerModel]:
        """Return what the worker announces of each model."""
        reasons, resident = self._reasons, self._loaded_at
        return {
            model: WorkerModel(ready=model not in reasons, resident=model in resident, reason=reasons.get(model))
            for model in self._specs
        }

    def check_all(self) -> None:
        """Look at the weights of every model without loading any."""
        for model, spec in self._specs.items():
            try:
                check_weights(spec)
            except WeightsError as error:
                self._refuse(model, error)
            except OSError as error:
                # Files of another user, a disk that is gone: as good as missing, and no reason to serve nothing.
                self._refuse(model, WeightsError(f"{model}: {spec.weights_dir} cannot be read: {error}"))

    def preload(self) -> None:
        """Load models until memory is full; one that cannot be loaded leaves its place to the next."""
        for model in self.usable:
            if len(self._loaded) < self._capacity:
                self._load(model)
        self._reasons = {model: why for model, why in self._reasons.items() if why != STARTING}
        self._on_change()

    def require(self, model: str) -> LoadedModel:
        """Return a model, loaded first if need be; the one that was loaded longest ago makes room for it.

        Raises:
            ModelUnavailable: it cannot be loaded.
        """
        if model not in self._loaded and model in self.usable:
            self._make_place()
            self._load(model)
        if model not in self._loaded:
            raise ModelUnavailable(self._reasons[model])
        return self._loaded[model]

    def swap(self, swap: Swap) -> None:
        """Do what placement decided, within the capacity: since the decision other models may have been loaded."""
        if swap.evict in self._loaded:
            self._evict(swap.evict)
        if swap.load not in self._loaded:
            self._make_place()
            self._load(swap.load)

    def evict_others(self, model: str | None) -> None:
        """Put all models but `model` out of memory."""
        for other in [one for one in self._loaded if one != model]:
            self._evict(other)

    def _make_place(self) -> None:
        while len(self._loaded) >= self._capacity:
            self._evict(min(self._loaded, key=self._loaded_at.__getitem__))

    def _load(self, model: str) -> None:
        error = failure_of(lambda: self._read(model))
        if isinstance(error, OutOfMemory) and self._loaded:
            # Whatever the setting says, what is there may have left no room. The error's frames hold tensors.
            error = None
            self.evict_others(None)
            error = failure_of(lambda: self._read(model))
        if error is not None:
            self._refuse(model, error)
        self._on_change()

    def _read(self, model: str) -> None:
        started = time.monotonic()
        with watchdog(self._load_timeout_seconds):
            self._loaded[model] = load_model(self._specs[model], self._device)
        self._loaded_at = {**self._loaded_at, model: time.monotonic()}
        log.info("model.loaded", model=model, device=self._device, seconds=round(time.monotonic() - started, 1))

    def _evict(self, model: str) -> None:
        self._loaded_at = {one: since for one, since in self._loaded_at.items() if one != model}
        self._loaded.pop(model).close()
        log.info("model.evicted", model=model)
        self._on_change()

    def _refuse(self, model: str, error: Exception) -> None:
        expected = isinstance(error, PipelineError)
        log.error("model.refused", model=model, reason=str(error), exc_info=None if expected else error)
        reason = str(error) if expected else f"{model} cannot be loaded ({type(error).__name__}); see the worker's log"
        self._reasons = {**self._reasons, model: reason}
