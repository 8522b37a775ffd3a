"""Which models are in the memory of this worker's device, and why others are not."""

import gc
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import structlog
import torch

from pipelines.errors import OutOfMemory, PipelineError, WeightsMissing
from pipelines.loading import LoadedModel, ModelSpec, check_loadable, load_model
from server.ledger.status import WorkerMemory, WorkerModel
from server.worker.device import end_if_lost
from server.worker.errors import ModelUnavailable
from server.worker.memory import DeviceMemory
from server.worker.placement import Resident, Room, Swap
from server.worker.refusals import STARTING, Refusals
from server.worker.run_job import failure_of
from server.worker.versions import Versions
from server.worker.watchdog import watchdog

log = structlog.stdlib.get_logger()


@dataclass(frozen=True)
class _Stay:
    """A model's stay in memory: clock readings in seconds."""

    since: float
    used_at: float


class Residency:
    """The loaded models. Only the lane changes it; every thread may ask.

    Args:
        specs: the enabled models, by id, in the order in which they are loaded at the start; versions that were
            replaced under another name, `id@version`. These are not announced, and loaded only for jobs of theirs.
        device: as torch names it.
        capacity: most models in memory; None: as many as fit.
        memory_bytes: to plan into; None: what the device has.
        load_timeout_seconds: a load that takes longer ends the process.
        retry_seconds: until a model that could not be loaded is looked at again; doubled each time.
        on_change: called after each change, from the lane.
        in_hand: gives the models that jobs in hand still need: they leave memory last.

    Attributes:
        versions: of the models, and which weights each has.
        let_go: called with the name of what is about to leave memory; the lane closes its runs.
        swapped: the last swap that was done, or given up.
        is_preloading: whether the lane may be in the load of a model that nobody waits for.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        *,
        device: str,
        load_timeout_seconds: float,
        on_change: Callable[[], None],
        capacity: int | None = None,
        memory_bytes: int | None = None,
        retry_seconds: float = 30.0,
        in_hand: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._specs = specs
        self._ids = {name: spec.id for name, spec in specs.items()}
        self._device = device
        self._load_timeout_seconds = load_timeout_seconds
        self._on_change = on_change
        self._in_hand = in_hand
        self.versions = Versions(specs)
        self._memory = DeviceMemory(device, memory_bytes=memory_bytes, max_models=capacity)
        self._refusals = Refusals(specs, retry_seconds=retry_seconds)
        self._loaded: dict[str, LoadedModel] = {}
        # Replaced as a whole, so that other threads always see a finished one.
        self._stays: Mapping[str, _Stay] = {}
        self._left_at: Mapping[str, float] = {}
        self._load_seconds: Mapping[str, float] = {}
        self.let_go: Callable[[str], None] = lambda name: None  # noqa: ARG005
        self.swapped: Swap | None = None
        self.is_preloading = False
        self._to_preload: list[str] = []

    @property
    def loaded(self) -> list[str]:
        """What is in memory, by name: models, and versions that were replaced."""
        return list(self._stays)

    @property
    def resident(self) -> dict[str, Resident]:
        """The models in memory, with their ages; of one that is there in two versions, the older and the busier one."""
        now, found = time.monotonic(), dict[str, Resident]()
        for name, stay in self._stays.items():
            model = self._ids[name]
            before = found.get(model, Resident(0.0, float("inf")))
            age_seconds = max(before.age_seconds, now - stay.since)
            found[model] = Resident(age_seconds, min(before.idle_seconds, now - stay.used_at))
        return found

    @property
    def usable(self) -> list[str]:
        """The models that are loaded or against which nothing is known."""
        return [model for model in self.models if self._refusals.may_load(model)]

    @property
    def models(self) -> list[str]:
        """All models, by id."""
        return [name for name, model in self._ids.items() if name == model]

    @property
    def has_started(self) -> bool:
        """Whether all models have been looked at, and one was loaded if any can be."""
        return STARTING not in self._refusals.reasons.values()

    @property
    def room(self) -> Room:
        """What fits, by model."""
        return self._memory.by_model(self._ids, self.loaded)

    def model_of(self, name: str) -> str:
        """Return the id of the model that a name is of."""
        return self._ids[name]

    def is_exclusive(self, model: str) -> bool:
        """Whether no two runs of a model may be under way."""
        return any(spec.exclusive for spec in self._specs.values() if spec.id == model)

    def load_seconds(self, model: str) -> float | None:
        """Return how long the last load of a model took; None before the first."""
        return self._load_seconds.get(model)

    def left_seconds(self, model: str) -> float | None:
        """Return how long ago a model left memory; None where it never did."""
        left_at = self._left_at.get(model)
        return None if left_at is None else time.monotonic() - left_at

    def due_for_check(self) -> list[str]:
        """Return the names of what was refused a while ago, and should be looked at again."""
        return self._refusals.due()

    def memory_status(self) -> WorkerMemory:
        """Return what the worker announces of its device's memory."""
        return self._memory.status()

    def statuses(self) -> dict[str, WorkerModel]:
        """Return what the worker announces of each model."""
        reasons, stays, sizes, now = self._refusals.reasons, self._stays, self._memory.sizes, time.monotonic()
        statuses: dict[str, WorkerModel] = {}
        for model in self.models:
            stay = stays.get(model)
            statuses[model] = WorkerModel(
                ready=model not in reasons,
                resident=stay is not None,
                reason=reasons.get(model),
                version=self._specs[model].version,
                revision=self.versions.revision(model),
                weights_sha256=self.versions.weights_sha256(model),
                weights_bytes=sizes[model].weights_bytes if model in sizes else None,
                loaded_seconds=round(now - stay.since, 3) if stay else None,
                idle_seconds=round(now - stay.used_at, 3) if stay else None,
            )
        return statuses

    def check_all(self) -> None:
        """Find out which models could be loaded, without loading any, so that no job of another is ever taken."""
        error = failure_of(self._memory.look)
        for name in self._specs:
            # Where the device is not there, that is what is wrong with every model.
            failure = error or failure_of(partial(self._check, name))
            if failure is not None:
                self._refuse(name, failure)

    def check_again(self, name: str) -> None:
        """Look again at what was refused; it is served if it is whole now, or was already."""
        if self._refusals.may_load(name):
            return
        error = failure_of(self._memory.look) or failure_of(partial(self._check, name))
        if error is not None:
            self._refuse(name, error)
        else:
            self._refusals.lift(name)
            log.info("model.restored", model=name)
        self._on_change()

    def preload(self) -> None:
        """Load the first model that can be loaded, and begin to serve; `preload_next` is for the others."""
        self._to_preload = self.usable
        while self._to_preload and not self._loaded:
            self._load(self._to_preload.pop(0))
        self._refusals.end_start()
        self._on_change()

    def preload_next(self) -> bool:
        """Load one more model where one fits beside the others, unless jobs are on their way to the lane.

        What has been in memory before, and left it, left it for another.

        Returns:
            Whether there may be more to load, so that this should be called again.
        """
        self.is_preloading = True
        try:
            while self._to_preload and not self._in_hand():
                model = self._to_preload.pop(0)
                is_new = model not in self._loaded and model not in self._left_at
                if is_new and self._refusals.may_load(model) and self._memory.room.holds([*self._loaded, model]):
                    self._load(model)
                    break
        finally:
            self.is_preloading = False
        self._on_change()
        return bool(self._to_preload)

    def require(self, name: str) -> LoadedModel:
        """Return a model, loaded first if need be; those that are used least make room for it.

        Raises:
            ModelUnavailable: it cannot be loaded.
        """
        if name not in self._loaded and self._refusals.may_load(name):
            self._make_place(name)
            self._load(name)
        if name not in self._loaded:
            raise ModelUnavailable(self._refusals.reasons[name])
        self._stays = {**self._stays, name: replace(self._stays[name], used_at=time.monotonic())}
        return self._loaded[name]

    def make_room(self, name: str, *, height: int, width: int, num_photos: int) -> None:
        """Put other models out of memory until a run fits, by estimate; to be called before it starts.

        A run that would not even fit alone is tried all the same: the estimate may be wrong.

        Args:
            name: of its model, which is in memory.
            height: of the output in pixels.
            width: likewise.
            num_photos: that the run reads.
        """
        size = {"height": height, "width": width, "num_photos": num_photos}
        while not self._memory.can_run(name, self._loaded, **size) and len(self._loaded) > 1:
            self._evict(self._least_useful(but=name))

    def swap(self, swap: Swap) -> None:
        """Do what placement decided, as far as it still can be: other models may have been loaded, this one refused."""
        if self._refusals.may_load(swap.load):
            for name in [one for one in self._loaded if self._ids[one] in swap.evict]:
                self._evict(name)
            if swap.load not in self._loaded:
                self._make_place(swap.load)
                self._load(swap.load)
        self.swapped = swap
        self._on_change()

    def evict_others(self, model: str | None) -> None:
        """Put all models but `model` out of memory, and what a run or a load left there that failed."""
        for other in [one for one in self._loaded if one != model]:
            self._evict(other)
        _set_garbage_aside()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _check(self, name: str) -> None:
        started = time.monotonic()
        with watchdog(self._load_timeout_seconds):
            check_loadable(self._specs[name], self._device)
            self.versions.identify(name)
            self._memory.count(name, self._specs[name])
        log.info("model.checked", model=name, seconds=round(time.monotonic() - started, 1))

    def _make_place(self, name: str) -> None:
        while self._loaded and not self._memory.room.holds([*self._loaded, name]):
            self._evict(self._least_useful())

    def _least_useful(self, but: str | None = None) -> str:
        """Return which model leaves first: one that no job in hand needs, and of those the least recently used."""
        needed = self._in_hand()
        others = [name for name in self._loaded if name != but]
        return min(others, key=lambda name: (self._ids[name] in needed, self._stays[name].used_at))

    def _load(self, name: str) -> None:
        error = failure_of(lambda: self._read(name))
        if isinstance(error, OutOfMemory) and self._loaded:
            # Whatever the plan says, what is there may have left no room. The error's frames hold tensors.
            error = None
            self.evict_others(None)
            error = failure_of(lambda: self._read(name))
        if error is not None:
            if not isinstance(error, PipelineError):
                end_if_lost(self._device, error, limit_seconds=self._load_timeout_seconds)
            self._refuse(name, error)
        self._on_change()

    def _read(self, name: str) -> None:
        started = time.monotonic()
        with watchdog(self._load_timeout_seconds):
            spec = self._specs[name]
            # Before the weights: should they be replaced meanwhile, a job that was accepted for these must not run.
            self.versions.identify(name)
            self._loaded[name] = load_model(spec, self._device)
            _set_garbage_aside()
        now = time.monotonic()
        self._stays = {**self._stays, name: _Stay(since=now, used_at=now)}
        self._load_seconds = {**self._load_seconds, name: now - started}
        self._refusals.forget(name)
        log.info("model.loaded", model=name, device=self._device, seconds=round(now - started, 1))

    def _evict(self, name: str) -> None:
        self.let_go(name)
        self._stays = {one: stay for one, stay in self._stays.items() if one != name}
        self._left_at = {**self._left_at, name: time.monotonic()}
        with watchdog(self._load_timeout_seconds):
            self._loaded.pop(name).close()
            gc.freeze()  # anew: to free the model, all that had been set aside was collected
        log.info("model.evicted", model=name)
        self._on_change()

    def _refuse(self, name: str, error: Exception) -> None:
        expected = isinstance(error, PipelineError)
        # Not every machine has the weights of every model that is enabled; all else is a fault.
        level = logging.WARNING if isinstance(error, WeightsMissing) else logging.ERROR
        reason = str(error) if expected else f"{name} cannot be loaded ({type(error).__name__}); see the worker's log"
        fields = {"reason": str(error), "next_look_seconds": self._refusals.add(name, reason)}
        log.log(level, "model.refused", model=name, **fields, exc_info=None if expected else error)


def _set_garbage_aside() -> None:
    """Keep the collector off all that is there now: a look at everything would take tenths of a second of some run."""
    gc.collect()
    gc.freeze()
