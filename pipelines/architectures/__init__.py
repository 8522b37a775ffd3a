"""What models are built of: from their own folder, or from a published description while the weights are not there."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipelines.errors import WeightsError
from pipelines.weights import WEIGHTS_NAMES, components, has_weights


@dataclass(frozen=True)
class Component:
    """One part of a pipeline that has weights.

    Attributes:
        library: `diffusers` or `transformers`.
        class_name: in that library.
        config: as its config.json has it.
    """

    library: str
    class_name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The parts of a pipeline that have weights, by their names in it."""

    components: dict[str, Component]


def published_architecture(model_id: str, repo: str | None) -> Architecture | None:
    """Find the description that is shipped for a model.

    Args:
        model_id: its id in the registry; counts only where the entry names no repository.
        repo: owner/name of the repository that its weights come from.

    Returns:
        None where none is shipped.
    """
    for name, content in _descriptions().items():
        if content["repo"] == repo or (repo is None and name == model_id):
            parts = content["components"].items()
            return Architecture(
                {part: Component(value["library"], value["class"], value["config"]) for part, value in parts}
            )
    return None


def architecture_of_folder(weights_dir: Path) -> Architecture:
    """Read what a folder of weights is built of; the weights themselves need not be there.

    Args:
        weights_dir: in diffusers' layout.

    Raises:
        WeightsError: model_index.json or a component's config.json is missing or damaged, or a component is of another
            library than diffusers or transformers.
    """
    parts: dict[str, Component] = {}
    for name, (library, class_name) in components(_read_object(weights_dir / "model_index.json")).items():
        if not isinstance(class_name, str) or str(library) not in WEIGHTS_NAMES:
            raise WeightsError(
                f"{weights_dir / 'model_index.json'}: {name} is of library {library}; "
                f"only {' and '.join(WEIGHTS_NAMES)} are allowed"
            )
        if has_weights(class_name):
            parts[name] = Component(library, class_name, _read_object(weights_dir / name / "config.json"))
    return Architecture(parts)


@cache
def _descriptions() -> dict[str, dict[str, Any]]:
    """Read the descriptions in this folder: id of the model → content."""
    found = [file for file in files("pipelines.architectures").iterdir() if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): json.loads(file.read_bytes()) for file in found}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise WeightsError(f"{file} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return content
