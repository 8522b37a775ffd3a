"""Compare weights as they lie on the disk with their manifest."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import WeightsError
from pipelines.manifest import Manifest, OnBytes, read_manifest, record_file
from pipelines.weights import PICKLE_SUFFIXES
from pipelines.weights_files import MANIFEST_NAME, TENSORS_SUFFIX, folder_of, is_weights_path

CODE_SUFFIXES = {".py", ".pyc", ".so"}
_PICKLE_SUFFIXES = PICKLE_SUFFIXES | {".pickle", ".joblib"}
_MAX_TOLD = 3


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file.

    Attributes:
        path: below the model's folder, or the name of a LoRA's file.
        detail: what is wrong, as the end of a sentence that begins with the path.
    """

    path: str
    kind: Literal["missing", "truncated", "altered", "unreadable", "extra", "pickled", "code"]
    detail: str

    def __str__(self) -> str:
        return f"{self.path} {self.detail}"


def fetching_folder(weights: Path) -> Path:
    """Name the folder that is there from the first byte of a fetch of these weights until the last one was checked."""
    if weights.suffix == TENSORS_SUFFIX:
        return weights.with_name(f".{weights.name}.restage-fetching")
    return weights / ".restage-fetching"


def check_fetched(model_id: str, weights: Path) -> None:
    """Check that no fetch of these weights is under way, or was cut off.

    Raises:
        WeightsError: one is, or was.
    """
    if fetching_folder(weights).exists():
        raise WeightsError(
            f"{model_id}: {weights} is still being fetched, or that was cut off; `restage weights fetch` goes on"
        )


def check_files(model_id: str, weights: Path) -> Manifest | None:
    """Compare names and sizes with the manifest, quickly: no content is read.

    Args:
        model_id: for messages.
        weights: a model's folder, or a LoRA's file.

    Returns:
        The manifest; None where there is none, and so nothing to compare with.

    Raises:
        WeightsError: the weights are still being fetched; a file is missing, of another size, or one too many; the
            manifest is not one.
    """
    check_fetched(model_id, weights)
    try:
        manifest = read_manifest(weights)
    except WeightsError as error:
        raise WeightsError(f"{model_id}: {error}") from error
    if manifest is None:
        return None
    findings = find_differences(weights, manifest)
    if findings:
        more = f"; and {len(findings) - _MAX_TOLD} more" if len(findings) > _MAX_TOLD else ""
        told = "; ".join(str(finding) for finding in findings[:_MAX_TOLD])
        raise WeightsError(f"{model_id}: {weights} is not what its {MANIFEST_NAME} says: {told}{more}")
    return manifest


def find_differences(weights: Path, manifest: Manifest) -> list[Finding]:
    """Compare names and sizes; no content is read."""
    root = folder_of(weights)
    findings = [finding for path in manifest.files for finding in _check_size(root, path, manifest)]
    return findings if root != weights else findings + find_extra(weights, manifest.files.keys())


def verify(weights: Path, manifest: Manifest, on_bytes: OnBytes | None = None) -> list[Finding]:
    """Compare names, sizes and contents; reads every byte.

    Args:
        weights: a model's folder, or a LoRA's file.
        manifest: what it should be.
        on_bytes: called with the number of bytes that were read since the last call.
    """
    findings = find_differences(weights, manifest)
    told = {finding.path for finding in findings}
    for path, expected in manifest.files.items():
        if path in told:
            continue
        try:
            found = record_file(folder_of(weights) / path, on_bytes)
        except WeightsError as error:
            findings.append(Finding(path, "unreadable", f"cannot be compared: {error}"))
        else:
            if found.sha256 != expected.sha256:
                findings.append(
                    Finding(
                        path,
                        "altered",
                        f"has other bytes than were recorded: {_digests(found.sha256, expected.sha256)}",
                    )
                )
    return findings


def _digests(found: str, expected: str) -> str:
    return f"SHA-256 {found[:16]}…, not {expected[:16]}…"


def _check_size(root: Path, path: str, manifest: Manifest) -> Iterator[Finding]:
    expected_bytes = manifest.files[path].size_bytes
    try:
        size_bytes = (root / path).stat().st_size
    except OSError:
        yield Finding(path, "missing", "is missing")
        return
    if not (root / path).is_file():
        yield Finding(path, "unreadable", "is no plain file")
    elif size_bytes != expected_bytes:
        yield Finding(path, "truncated", f"has {size_bytes} bytes, not {expected_bytes}")


def find_extra(folder: Path, known: Collection[str]) -> list[Finding]:
    """Find files beside the known ones that a library could load instead of them, pickles and code.

    Args:
        folder: a model's folder.
        known: paths of its weights.
    """
    parts = {path.split("/")[0] for path in known if "/" in path}
    findings: list[Finding] = []
    for path in _walk(folder):
        suffix = Path(path).suffix.lower()
        if path in known:
            continue
        if suffix in _PICKLE_SUFFIXES:
            findings.append(Finding(path, "pickled", "is pickled, which may run code when it is read; remove it"))
        elif suffix in CODE_SUFFIXES:
            findings.append(Finding(path, "code", "is code, which never comes with weights; remove it"))
        elif path.split("/")[0] in parts and (folder / path).is_dir():
            findings.append(Finding(path, "extra", "is a link to another folder, into which nobody looks; remove it"))
        elif path.split("/")[0] in parts and is_weights_path(path):
            findings.append(Finding(path, "extra", "does not belong there, and could be loaded; remove it"))
    return findings


def list_others(folder: Path, known: Collection[str]) -> list[str]:
    """List what else lies in a model's folder, such as a page about it; none of it is ever loaded."""
    told = {finding.path for finding in find_extra(folder, known)}
    return [path for path in _walk(folder) if path not in known and path not in told]


def _walk(folder: Path) -> list[str]:
    """List the files of a folder by path, and links to folders; not what is hidden, as downloads keep their notes."""
    paths: list[str] = []
    for place, folders, files in os.walk(folder):
        # Links to folders could lead in a circle.
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in (*files, *links) if not name.startswith(".") and not name.endswith(MANIFEST_NAME)]
        paths += [(Path(place) / name).relative_to(folder).as_posix() for name in names]
    return sorted(paths)
