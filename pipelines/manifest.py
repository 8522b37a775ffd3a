"""Manifests: which files a model's weights are, to the byte, so that the same weights are known again on any machine.

The weights of a model are a folder, those of a LoRA one file; a manifest lies in the folder, or beside the file.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import WeightsError
from pipelines.weights_files import MANIFEST_NAME, TENSORS_SUFFIX, is_weights_path, list_weights

_FORMAT = 1
_MAX_BYTES = 8_000_000
_MAX_FILES = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_BLOCK_BYTES = 1 << 20

OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class FileRecord:
    """What one file is.

    Attributes:
        sha256: 64 lower-case hexadecimal digits.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What the weights of one model or LoRA are.

    Attributes:
        repo: `owner/name` of the repository that they were fetched from; None where nobody knows.
        revision: its commit, 40 hexadecimal digits; None likewise.
        files: path below the folder, with `/` → what the file is. Every file that a library may read, and no other.
    """

    repo: str | None
    revision: str | None
    files: Mapping[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.size_bytes for record in self.files.values())


def weights_sha256(manifest: Manifest) -> str:
    """Digest names, sizes and contents of all files, whoever fetched them from where: 64 hexadecimal digits."""
    canonical = json.dumps(_plain_files(manifest), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def manifest_path(weights: Path) -> Path:
    """Name the manifest of a model's folder, or of a LoRA's file."""
    if weights.suffix == TENSORS_SUFFIX:
        return weights.with_name(f"{weights.name}.{MANIFEST_NAME}")
    return weights / MANIFEST_NAME


def read_manifest(weights: Path) -> Manifest | None:
    """Read the manifest of a model's folder, or of a LoRA's file.

    Returns:
        None where there is none.

    Raises:
        WeightsError: it is there, but cannot be read or is not one.
    """
    file = manifest_path(weights)
    try:
        with file.open("rb") as content:
            data = content.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise WeightsError(f"{file} is no manifest: it has over {_MAX_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is no manifest: it is not JSON") from error
    problem = _find_problem(content)
    if problem:
        raise WeightsError(f"{file} is no manifest: {problem}")
    files = {path: FileRecord(**record) for path, record in content["files"].items()}
    return Manifest(content["repo"], content["revision"], files)


def _find_problem(content: Any) -> str | None:
    """Say what keeps JSON from being a manifest."""
    if not isinstance(content, dict) or content.keys() != {"format", "repo", "revision", "files"}:
        return "it needs format, repo, revision and files, and nothing else"
    if type(content["format"]) is not int or content["format"] != _FORMAT:
        return f"its format is not {_FORMAT}, the only one that this version of Restage knows"
    for name, pattern in (("repo", _REPO), ("revision", _COMMIT)):
        if content[name] is not None and not _fits(pattern, content[name]):
            return f"{name} is neither null nor what it should be"
    files = content["files"]
    if not isinstance(files, dict) or not 1 <= len(files) <= _MAX_FILES:
        return f"files needs 1 to {_MAX_FILES} paths"
    problems = (_find_problem_of_file(path, record) for path, record in files.items())
    return next((problem for problem in problems if problem), None)


def _find_problem_of_file(path: str, record: Any) -> str | None:
    size_bytes = record.get("size_bytes") if isinstance(record, dict) else None
    if not is_weights_path(path):
        return f"{path[:100]!r} is not the path of a file that could be loaded"
    if not isinstance(record, dict) or record.keys() != {"size_bytes", "sha256"}:
        return f"{path} needs size_bytes and sha256, and nothing else"
    if type(size_bytes) is not int or size_bytes < 0:
        return f"size_bytes of {path} is no size"
    if not _fits(_SHA256, record["sha256"]):
        return f"sha256 of {path} is no SHA-256 in lower-case hexadecimal digits"
    return None


def _fits(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def write_manifest(weights: Path, manifest: Manifest) -> None:
    """Write the manifest of a model's folder, or of a LoRA's file, whole or not at all.

    Raises:
        OSError: it could not be written; what was there stays.
    """
    file = manifest_path(weights)
    content = {
        "format": _FORMAT,
        "repo": manifest.repo,
        "revision": manifest.revision,
        "files": _plain_files(manifest),
    }
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as out:
            out.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
            out.flush()
            # Data before name: after a power cut a new name could otherwise stand for an empty file.
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _plain_files(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        path: {"size_bytes": record.size_bytes, "sha256": record.sha256}
        for path, record in sorted(manifest.files.items())
    }


def make_manifest(
    weights: Path, *, repo: str | None = None, revision: str | None = None, on_bytes: OnBytes | None = None
) -> Manifest:
    """Describe the weights as they lie there; reads every byte of them.

    Args:
        weights: a model's folder, or a LoRA's file.
        repo: where they came from, if that is known.
        revision: its commit, likewise.
        on_bytes: called with the number of bytes that were read since the last call.

    Raises:
        WeightsError: a file that must be there is missing or cannot be read.
    """
    if weights.suffix == TENSORS_SUFFIX:
        return Manifest(repo, revision, {weights.name: record_file(weights, on_bytes)})
    paths = list_weights(weights)
    return Manifest(repo, revision, {path: record_file(weights / path, on_bytes) for path in paths})


def record_file(file: Path, on_bytes: OnBytes | None = None) -> FileRecord:
    """Digest one file.

    Raises:
        WeightsError: it is missing, no plain file, or cannot be read.
    """
    digest, size_bytes = hashlib.sha256(), 0
    try:
        # Opening a pipe would wait for somebody to write to it.
        if file.exists() and not file.is_file():
            raise WeightsError(f"{file} is no plain file")
        with file.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
                size_bytes += len(block)
                if on_bytes is not None:
                    on_bytes(len(block))
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from error
    return FileRecord(size_bytes, digest.hexdigest())
