"""Look a model's folder over before anything is loaded: what is wrong is said at once, and in one line."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import WeightsError

# Where the libraries keep what they save: the configuration of each kind of component, and a model's weights.
SCHEDULER_CONFIGS = ("scheduler_config.json",)
TOKENIZER_CONFIGS = ("tokenizer_config.json",)
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
MODEL_CONFIGS = ("config.json",)
# A tokenizer that finds none of these loads without an error, and knows no word.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
WEIGHTS_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelSpec:
    """What must be known to load a model.

    Attributes:
        id: the model's id in the registry; used in messages.
        family: a folder of `pipelines` with a `run.py`.
        pipeline: name of the pipeline's class in diffusers.
        weights_dir: the model's own folder, with its `model_index.json`.
        dtype: one of `DTYPES`, for all components: mixed ones make the pipelines fail.
        area: at which the model reads photos and, if nothing else is asked, makes them; in pixels.
    """

    id: str
    family: str
    pipeline: str
    weights_dir: Path
    dtype: str
    area: int


def check_weights(spec: ModelSpec) -> None:
    """Check that a model's folder is whole, without reading the weights themselves.

    Raises:
        WeightsError: the folder is missing or is another pipeline's; a component has no configuration, no safetensors
            weights or damaged ones.
    """
    if spec.dtype not in DTYPES:
        raise WeightsError(f"{spec.id}: the dtype {spec.dtype} is unknown; allowed are {', '.join(DTYPES)}")
    if not spec.weights_dir.is_dir():
        raise WeightsError(f"{spec.id}: there is no folder {spec.weights_dir}")
    index = _read_json(spec, spec.weights_dir / "model_index.json")
    found = index.get("_class_name")
    if found != spec.pipeline:
        raise WeightsError(f"{spec.id}: {spec.weights_dir} holds a {found}, the registry says {spec.pipeline}")
    for name, (library, class_name) in components(index).items():
        _check_component(spec, spec.weights_dir / name, library, class_name)


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Name the parts of a pipeline.

    Args:
        index: the content of its `model_index.json`.

    Returns:
        Folder → (library, class) for each part that is there.
    """
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (library, class_name) for name, (library, class_name) in parts.items() if class_name is not None}


def has_weights(class_name: str) -> bool:
    """Tell whether a component is a model, by the naming rule that both libraries keep."""
    return _config_names(class_name) == MODEL_CONFIGS


def _config_names(class_name: str) -> tuple[str, ...]:
    name = class_name.removesuffix("Fast")
    if name.endswith("Scheduler"):
        return SCHEDULER_CONFIGS
    if name.endswith("Tokenizer"):
        return TOKENIZER_CONFIGS
    if name.endswith(("Processor", "FeatureExtractor")):
        return PROCESSOR_CONFIGS
    return MODEL_CONFIGS


def _has_tokenizer(class_name: str) -> bool:
    # A processor for text and pictures brings a tokenizer of its own; one for pictures alone does not.
    name = class_name.removesuffix("Fast")
    return name.endswith("Tokenizer") or (
        name.endswith("Processor") and not name.endswith(("ImageProcessor", "VideoProcessor"))
    )


def _check_component(spec: ModelSpec, folder: Path, library: str, class_name: str) -> None:
    if library not in WEIGHTS_NAMES:
        # A module of its own beside the weights: code that came with a download.
        allowed = " and ".join(WEIGHTS_NAMES)
        raise WeightsError(f"{spec.id}: {folder.name} is of library {library}; only {allowed} are allowed")
    _read_json(spec, _find_file(spec, folder, _config_names(class_name)))
    if _has_tokenizer(class_name):
        _find_file(spec, folder, VOCABULARIES)
    if has_weights(class_name):
        for file in _weights_files(spec, folder, WEIGHTS_NAMES[library]):
            _check_safetensors(spec, file)


def _find_file(spec: ModelSpec, folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{spec.id}: {folder} has no {' or '.join(names)}")


def _weights_files(spec: ModelSpec, folder: Path, name: str) -> list[Path]:
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = _read_json(spec, index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise WeightsError(f"{spec.id}: {index} names no shards")
        return sorted({folder / str(shard) for shard in shards.values()})
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise WeightsError(f"{spec.id}: {folder} has only {', '.join(pickled)}, and pickled weights are never loaded")
    raise WeightsError(f"{spec.id}: {folder} has neither {name} nor {index.name}")


def _check_safetensors(spec: ModelSpec, file: Path) -> None:
    if not file.is_file():
        raise WeightsError(f"{spec.id}: {file} is missing, though the index names it")
    size_bytes = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if start == b"version ":
            raise WeightsError(f"{spec.id}: {file} is a Git LFS pointer; the weights themselves were not fetched")
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size_bytes
        if 8 + header_bytes > size_bytes:
            raise WeightsError(f"{spec.id}: {file} is no safetensors file, or its beginning is missing")
        header = content.read(header_bytes)
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        expected_bytes = 8 + header_bytes + max((value["data_offsets"][1] for value in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"{spec.id}: {file} has a damaged safetensors header") from error
    if size_bytes != expected_bytes:
        raise WeightsError(f"{spec.id}: {file} has {size_bytes} bytes, its header says {expected_bytes}")


def _read_json(spec: ModelSpec, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{spec.id}: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{spec.id}: {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{spec.id}: {file} is not a JSON object")
    return content
