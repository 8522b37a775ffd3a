"""Which version and which weights a job was accepted for, and whether this worker has them."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.manifest import read_manifest, weights_sha256
from pipelines.weights import ModelSpec
from server.jobs import Job
from server.worker.errors import ModelChanged


@dataclass(frozen=True)
class _Identity:
    """Which weights a model has: what its manifest says, or nothing where it has none."""

    revision: str | None = None
    weights_sha256: str | None = None


class Versions:
    """The versions of the models, as their weights were when last read. Only the lane changes it.

    Args:
        specs: of all models and of versions that were replaced, by name.
    """

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = specs
        self._identities: dict[str, _Identity] = {}

    def identify(self, name: str) -> None:
        """Read which weights a model has now."""
        manifest = read_manifest(self._specs[name].weights_dir)
        found = _Identity() if manifest is None else _Identity(manifest.revision, weights_sha256(manifest))
        self._identities[name] = found

    def revision(self, name: str) -> str | None:
        """Return the revision of a model's weights; None where it is not known."""
        return self._identity(name).revision

    def weights_sha256(self, name: str) -> str | None:
        """Return the digest of a model's manifest, as it was when its weights were last read; None without one."""
        return self._identity(name).weights_sha256

    def _identity(self, name: str) -> _Identity:
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
