"""Which models are in the memory of this worker's device, and why others are not."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog

from pipelines.errors import OutOfMemory, PipelineError, WeightsMissing
from pipelines.loading import LoadedModel, ModelSpec, check_loadable, load_model
from pipelines.manifest import read_manifest, weights_sha256
from server.jobs import Job
from server.ledger.status import WorkerModel
from server.worker.errors import ModelChanged, ModelUnavailable
from server.worker.placement import Swap
from server.worker.run_job import failure_of
from server.worker.watchdog import watchdog

STARTING = "The worker is starting."

log = structlog.stdlib.get_logger()


@dataclass(frozen=True)
class _Identity:
    """Which weights a model has: what its manifest says, or nothing where it has none."""

    revision: str | None = None
    weights_sha256: str | None = None


def _identify(spec: ModelSpec) -> _Identity:
    manifest = read_manifest(spec.weights_dir)
    return _Identity() if manifest is None else _Identity(manifest.revision, weights_sha256(manifest))


class Residency:
    """The loaded models. Only the lane changes it; every thread may ask.

    Args:
        specs: the enabled models, by id, in the order in which they are loaded at the start; versions that were
            replaced under another name, `id@version`. These are not announced, and loaded only for jobs of theirs.
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
        self._identities: dict[str, _Identity] = {}
        # These two are replaced as a whole, so that other threads always see a finished one.
        self._loaded_at: Mapping[str, float] = {}
        self._reasons: Mapping[str, str] = dict.fromkeys(specs, STARTING)

    @property
    def loaded(self) -> list[str]:
        """What is in memory, by name: models, and versions that were replaced."""
        return list(self._loaded_at)

    @property
    def resident(self) -> dict[str, float]:
        """The models in memory, and for how many seconds each has been there."""
        now = time.monotonic()
        ages = [(self._specs[name].id, now - since) for name, since in self._loaded_at.items()]
        return {model: max(age for other, age in ages if other == model) for model, _ in ages}

    @property
    def usable(self) -> list[str]:
        """The models that are loaded or against which nothing is known."""
        return [model for model, spec in self._specs.items() if model == spec.id and self._may_load(model)]

    def statuses(self) -> dict[str, WorkerModel]:
        """Return what the worker announces of each model."""
        reasons, resident = self._reasons, self._loaded_at
        return {
            model: WorkerModel(
                ready=model not in reasons,
                resident=model in resident,
                reason=reasons.get(model),
                version=spec.version,
                revision=self._identity(model).revision,
                weights_sha256=self._identity(model).weights_sha256,
            )
            for model, spec in self._specs.items()
            if model == spec.id
        }

    def weights_sha256(self, name: str) -> str | None:
        """Return the digest of a model's manifest, as it was when its weights were last read; None without one."""
        return self._identity(name).weights_sha256

    def _identity(self, name: str) -> "_Identity":
        return self._identities.get(name, _Identity())

    def name_of(self, job: Job) -> str:
        """Return under which name the version is held that a job was accepted for.

        Raises:
            ModelChanged: this worker has no such version.
        """
        versions = {spec.version: name for name, spec in self._specs.items() if spec.id == job.model}
        if job.model_version not in versions:
            there = ", ".join(versions)
            raise ModelChanged(
                f"The job was accepted for version {job.model_version} of {job.model}; this server has {there} now. "
                "Submit it again."
            )
        return versions[job.model_version]

    def check_same_weights(self, job: Job, name: str) -> None:
        """Make sure that the weights are those that the job was accepted for, where both are known.

        Raises:
            ModelChanged: they are others.
        """
        now = self.weights_sha256(name)
        if job.weights_sha256 is not None and now is not None and now != job.weights_sha256:
            raise ModelChanged(
                f"The weights of {job.model} {job.model_version} are not those that the job was accepted for. "
                "Submit it again."
            )

    def check_all(self) -> None:
        """Find out which models could be loaded, without loading any, so that no job of another is ever taken."""
        for model in self._specs:
            error = failure_of(partial(self._check, model))
            if error is not None:
                self._refuse(model, error)

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
        if model not in self._loaded and self._may_load(model):
            self._make_place()
            self._load(model)
        if model not in self._loaded:
            raise ModelUnavailable(self._reasons[model])
        return self._loaded[model]

    def swap(self, swap: Swap) -> None:
        """Do what placement decided, as far as it still can be: other models may have been loaded, this one refused."""
        if not self._may_load(swap.load):
            return
        for name in [one for one in self._loaded if self._specs[one].id == swap.evict]:
            self._evict(name)
        if swap.load not in self._loaded:
            self._make_place()
            self._load(swap.load)

    def evict_others(self, model: str | None) -> None:
        """Put all models but `model` out of memory."""
        for other in [one for one in self._loaded if one != model]:
            self._evict(other)

    def _may_load(self, name: str) -> bool:
        return self._reasons.get(name, STARTING) == STARTING

    def _check(self, model: str) -> None:
        started = time.monotonic()
        with watchdog(self._load_timeout_seconds):
            check_loadable(self._specs[model])
            self._identities[model] = _identify(self._specs[model])
        log.info("model.checked", model=model, seconds=round(time.monotonic() - started, 1))

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
            spec = self._specs[model]
            # Before the weights: should they be replaced meanwhile, a job that was accepted for these must not run.
            self._identities[model] = _identify(spec)
            self._loaded[model] = load_model(spec, self._device)
        self._loaded_at = {**self._loaded_at, model: time.monotonic()}
        log.info("model.loaded", model=model, device=self._device, seconds=round(time.monotonic() - started, 1))

    def _evict(self, model: str) -> None:
        self._loaded_at = {one: since for one, since in self._loaded_at.items() if one != model}
        self._loaded.pop(model).close()
        log.info("model.evicted", model=model)
        self._on_change()

    def _refuse(self, model: str, error: Exception) -> None:
        expected = isinstance(error, PipelineError)
        # Not every machine has the weights of every model that is enabled; all else is a fault.
        level = logging.WARNING if isinstance(error, WeightsMissing) else logging.ERROR
        log.log(level, "model.refused", model=model, reason=str(error), exc_info=None if expected else error)
        reason = str(error) if expected else f"{model} cannot be loaded ({type(error).__name__}); see the worker's log"
        self._reasons = {**self._reasons, model: reason}
