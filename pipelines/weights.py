"""Look a model's folder over before anything is loaded: what is wrong is said at once, and in one line."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import WeightsError, WeightsMissing
from pipelines.optimization_params import Optimizations

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
# What a LoRA has for a layer, in the spellings that diffusers converts: two small matrices and sometimes a scale.
_LORA_SUFFIXES = {
    **dict.fromkeys((".lora_A.weight", ".lora_down.weight", ".down.weight"), "A"),
    **dict.fromkeys((".lora_B.weight", ".lora_up.weight", ".up.weight"), "B"),
    ".alpha": "alpha",
}

_COMPONENT = re.compile(r"\w{1,100}", re.ASCII)
# What counts layers in a configuration: each layer has at least one tensor.
_LAYERS = re.compile(r"(^|_)(layers|depth|blocks)$")
_MIN_ABSURD_LAYERS = 1000
# As much as the safetensors library itself reads.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class LoraSpec:
    """A small set of weights that a job may lay over its model's.

    Attributes:
        id: the LoRA's id in the registry, within its model.
        file: one safetensors file.
        scheduler: what it wants of the scheduler's configuration otherwise; empty for nothing.
    """

    id: str
    file: Path
    scheduler: Mapping[str, Any] = field(default_factory=dict[str, Any])


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
        loras: those that its jobs may choose.
        version: as the registry calls what lies in `weights_dir`.
        num_photos: as many as one job may have; memory is planned for these.
        optimizations: how it is run otherwise than its pipeline does by itself.
    """

    id: str
    family: str
    pipeline: str
    weights_dir: Path
    dtype: str
    area: int
    loras: tuple[LoraSpec, ...] = ()
    version: str = ""
    num_photos: int = 1
    optimizations: Optimizations = field(default_factory=Optimizations)

    @property
    def exclusive(self) -> bool:
        """Whether only one run of the model may be open at a time."""
        return self.optimizations.exclusive


def check_weights(spec: ModelSpec) -> None:
    """Check that a model's folder is whole, without reading the weights themselves.

    Raises:
        WeightsMissing: there is no folder.
        WeightsError: the folder is another pipeline's; a component has no configuration, no safetensors weights or
            damaged ones.
    """
    if spec.dtype not in DTYPES:
        raise WeightsError(f"{spec.id}: the dtype {spec.dtype} is unknown; allowed are {', '.join(DTYPES)}")
    if not spec.weights_dir.is_dir():
        raise WeightsMissing(f"{spec.id}: there is no folder {spec.weights_dir}")
    index = read_json(spec, spec.weights_dir / "model_index.json")
    found = index.get("_class_name")
    if found != spec.pipeline:
        raise WeightsError(f"{spec.id}: {spec.weights_dir} holds a {found}, the registry says {spec.pipeline}")
    for name, (library, class_name) in components(index).items():
        if not (_COMPONENT.fullmatch(name) and isinstance(library, str) and isinstance(class_name, str)):
            raise WeightsError(f"{spec.id}: {spec.weights_dir / 'model_index.json'}: {name[:100]!r} is no component")
        _check_component(spec, spec.weights_dir / name, library, class_name)
    for lora in spec.loras:
        check_lora(spec, lora)


def check_lora(spec: ModelSpec, lora: LoraSpec) -> None:
    """Check that a LoRA's file is whole and holds nothing else, without reading the weights themselves.

    Raises:
        WeightsError: it is missing, damaged or not safetensors, or not all of it is pairs of two small matrices.
    """
    if not lora.file.is_file():
        detail = "fetch it, or take the LoRA out of the model's entry"
        raise WeightsError(f"{spec.id}: LoRA {lora.id}: there is no file {lora.file}; {detail}")
    parts = {name: _lora_part(name) for name in _check_safetensors(spec, lora.file)}
    layers = {layer for layer, part in parts.values() if part == "A"}
    layers &= {layer for layer, part in parts.values() if part == "B"}
    # diffusers leaves out in silence what it does not know.
    strange = sorted(name for name, (layer, _) in parts.items() if layer not in layers)
    if strange or not parts:
        example = f", such as {strange[0][:200]}" if strange else ""
        detail = f"{len(strange)} of {len(parts)} tensors of {lora.file} are no part of a LoRA{example}"
        raise WeightsError(f"{spec.id}: LoRA {lora.id}: {detail}")


def _lora_part(name: str) -> tuple[str, str]:
    """Say of which layer a tensor of a LoRA is, and what of it: `A`, `B` or `alpha`; both empty if it is none."""
    plain = name.replace(".default.", ".")
    for suffix, part in _LORA_SUFFIXES.items():
        if plain.endswith(suffix):
            return plain.removesuffix(suffix), part
    return "", ""


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
        raise WeightsError(f"{spec.id}: {folder.name} is of library {library[:100]}; only {allowed} are allowed")
    config = read_json(spec, _find_file(spec, folder, _config_names(class_name)))
    if _has_tokenizer(class_name):
        _find_file(spec, folder, VOCABULARIES)
    for file in sorted(folder.glob("*.json")):
        # Beside the configuration: vocabularies, special tokens, templates.
        _parse_json(spec, file)
    if has_weights(class_name):
        if "transformers_weights" in config:
            # The library would load that file, pickled or not.
            detail = "names a file of weights by transformers_weights; none but the usual names are read"
            raise WeightsError(f"{spec.id}: {folder / 'config.json'} {detail}")
        tensors = {file: _check_safetensors(spec, file) for file in weights_files(spec, folder, library)}
        _check_shards(spec, folder / f"{WEIGHTS_NAMES[library]}.index.json", tensors)
        _check_layer_counts(spec, folder / "config.json", config, sum(map(len, tensors.values())))


def _check_layer_counts(spec: ModelSpec, file: Path, config: dict[str, Any], num_tensors: int) -> None:
    # Layers take memory as soon as they are made, before any of their numbers is read. A few more are told later.
    for name, num_layers in _layer_counts(config):
        if num_layers > max(num_tensors, _MIN_ABSURD_LAYERS):
            detail = f"says {name}: {num_layers}, and the weights are {num_tensors} tensors in all; fetch both again"
            raise WeightsError(f"{spec.id}: {file} {detail}")


def _layer_counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    waiting = [config]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif type(value) is int and _LAYERS.search(name):
                yield name, value


def _find_file(spec: ModelSpec, folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{spec.id}: {folder} has no {' or '.join(names)}")


def weights_files(spec: ModelSpec, folder: Path, library: str) -> list[Path]:
    """Name the files that a component's weights are loaded from.

    Args:
        spec: for messages.
        folder: the component's.
        library: `diffusers` or `transformers`.

    Raises:
        WeightsError: there are none, or only pickled ones.
    """
    whole = folder / WEIGHTS_NAMES[library]
    index = folder / f"{whole.name}.index.json"
    # Where both are there, each library has its own preference.
    if index.is_file() and (library == "diffusers" or not whole.is_file()):
        shards = read_json(spec, index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise WeightsError(f"{spec.id}: {index} names no shards")
        names = sorted({str(shard) for shard in shards.values()})
        elsewhere = [name for name in names if Path(name).name != name]
        if elsewhere:
            raise WeightsError(f"{spec.id}: {index} names {elsewhere[0][:100]!r}, which is no file beside it")
        return [folder / name for name in names]
    if whole.is_file():
        return [whole]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise WeightsError(f"{spec.id}: {folder} has only {', '.join(pickled)}, and pickled weights are never loaded")
    raise WeightsError(f"{spec.id}: {folder} has neither {whole.name} nor {index.name}")


def _check_shards(spec: ModelSpec, index: Path, tensors: Mapping[Path, list[str]]) -> None:
    if not index.is_file() or index.with_suffix("").with_suffix("") in tensors:
        return
    # diffusers takes the index at its word: a tensor that is in no file would be noticed by the first run.
    shards = read_json(spec, index)["weight_map"]
    held = {(name, file.name) for file, names in tensors.items() for name in names}
    absent = sorted(name for name, shard in shards.items() if (name, shard) not in held)
    if absent:
        detail = f"{len(absent)} of its tensors are not where it says, such as {absent[0][:100]}"
        raise WeightsError(f"{spec.id}: {index}: {detail}; fetch {index.parent} again")


def _check_safetensors(spec: ModelSpec, file: Path) -> list[str]:
    """Check that a file is as long as its header says, and name its tensors."""
    if not file.is_file():
        raise WeightsError(f"{spec.id}: {file} is missing, though the index names it")
    size_bytes = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        if start == b"version ":
            raise WeightsError(f"{spec.id}: {file} is a Git LFS pointer; the weights themselves were not fetched")
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size_bytes
        if 8 + header_bytes > size_bytes or header_bytes > _MAX_HEADER_BYTES:
            raise WeightsError(f"{spec.id}: {file} is no safetensors file, or its beginning is missing")
        header = content.read(header_bytes)
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        expected_bytes = 8 + header_bytes + max((value["data_offsets"][1] for value in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise WeightsError(f"{spec.id}: {file} has a damaged safetensors header; fetch it again") from error
    if size_bytes != expected_bytes:
        detail = f"has {size_bytes} bytes, its header says {expected_bytes}; fetch it again"
        raise WeightsError(f"{spec.id}: {file} {detail}")
    return list(tensors)


def read_json(spec: ModelSpec, file: Path) -> dict[str, Any]:
    """Read a JSON object of a model.

    Raises:
        WeightsError: the file is missing, cannot be read, or holds something else.
    """
    content = _parse_json(spec, file)
    if not isinstance(content, dict):
        raise WeightsError(f"{spec.id}: {file} is not a JSON object")
    return content


def _parse_json(spec: ModelSpec, file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{spec.id}: {file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{spec.id}: {file} cannot be read: {error}; fetch it again") from error
