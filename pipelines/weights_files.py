"""Which files of a folder or a repository are a model's weights: what is loaded, and what is read beside it."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pipelines.errors import WeightsError
from pipelines.weights import WEIGHTS_NAMES, components, has_weights

MANIFEST_NAME = "restage-manifest.json"
MODEL_INDEX = "model_index.json"
TENSORS_SUFFIX = ".safetensors"
# What the libraries read beside tensors: configurations, vocabularies and merges, sentencepiece models, chat templates.
TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
# Where it lies beside a text encoder, transformers lays further weights over it that no index names.
_NEVER = {"adapter_config.json"}

# No part begins with a dot, so none is `..`, and nothing that tools hide for themselves is ever part of the weights.
_PATH = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,5}", re.ASCII)
_MAX_PATH = 1000
_COMPONENT = re.compile(r"\w{1,100}", re.ASCII)


def is_weights_path(path: str) -> bool:
    """Tell whether a library would read a file of this path, if it lay in the right folder."""
    if len(path) > _MAX_PATH or not _PATH.fullmatch(path) or path.endswith(MANIFEST_NAME):
        return False
    return Path(path).suffix in {TENSORS_SUFFIX, *TEXT_SUFFIXES}


def folder_of(weights: Path) -> Path:
    """Name the folder that the paths of a manifest begin at: a model's own, or the one that a LoRA's file lies in."""
    return weights.parent if weights.suffix == TENSORS_SUFFIX else weights


def list_weights(folder: Path) -> list[str]:
    """List the files of a model's folder that are its weights: those that are loaded, and what is read beside them.

    Raises:
        WeightsError: `model_index.json` or an index of shards is missing or makes no sense.
    """
    index = parse_object(folder / MODEL_INDEX)
    paths = {path.relative_to(folder).as_posix() for part in parts_of(index) for path in (folder / part).glob("*")}
    texts = list_texts(index, paths)
    return sorted({*texts, *list_tensors(index, paths, lambda path: parse_object(folder / path))})


def parse_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing, cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return cast("dict[str, Any]", content)


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name the parts of a pipeline: folder → (library, class).

    Args:
        index: the content of its `model_index.json`, which may come from anybody.

    Raises:
        WeightsError: a part is of a library that is never used, or what stands there is no part.
    """
    parts = components(dict(index))
    for name, (library, class_name) in parts.items():
        if not _COMPONENT.fullmatch(name) or not isinstance(class_name, str):
            raise WeightsError(f"{MODEL_INDEX}: {name[:100]!r} is no component")
        if library not in WEIGHTS_NAMES:
            # A module of its own beside the weights: code that comes with a download.
            allowed = " and ".join(WEIGHTS_NAMES)
            raise WeightsError(f"{MODEL_INDEX}: {name} is of library {library!r}; only {allowed} are allowed")
    return parts


def list_texts(index: Mapping[str, Any], paths: Collection[str]) -> list[str]:
    """Choose, among the paths of a folder or repository, all that is read beside tensors."""
    parts = parts_of(index)
    chosen = [path for path in paths if Path(path).suffix in TEXT_SUFFIXES and is_weights_path(path)]
    chosen = [path for path in chosen if path.count("/") == 1 and Path(path).name not in _NEVER]
    return [MODEL_INDEX, *sorted(path for path in chosen if path.split("/")[0] in parts)]


def list_tensors(
    index: Mapping[str, Any], paths: Collection[str], parse: Callable[[str], Mapping[str, Any]]
) -> list[str]:
    """Choose the tensors that are loaded: one file for each model, or the shards that its index names.

    Args:
        index: the content of `model_index.json`.
        paths: of the folder or repository.
        parse: reads an index of shards.

    Raises:
        WeightsError: a model has no tensors, or its index makes no sense.
    """
    return sorted(
        path
        for part, (library, class_name) in parts_of(index).items()
        if has_weights(class_name)
        for path in _tensors_of(f"{part}/{WEIGHTS_NAMES[library]}", paths, parse)
    )


def _tensors_of(whole: str, paths: Collection[str], parse: Callable[[str], Mapping[str, Any]]) -> Iterator[str]:
    index = f"{whole}.index.json"
    if whole in paths:
        yield whole
    elif index not in paths:
        raise WeightsError(f"there is neither {whole} nor {index}")
    else:
        shards = parse(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise WeightsError(f"{index} names no shards")
        part, _, _ = whole.partition("/")
        for shard in {str(shard) for shard in shards.values()}:
            path = f"{part}/{shard}"
            if path not in paths or not is_weights_path(path) or path.count("/") != 1:
                raise WeightsError(f"{index} names {shard[:100]!r}, which is not there")
            yield path
