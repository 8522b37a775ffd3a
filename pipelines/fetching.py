"""Fetch the weights of a model or a LoRA: only what is loaded, whole, and taken up where it was cut off.

A file gets its name when all of it has arrived and was compared with what the hub announced; the manifest comes last.
Until then a folder beside the files tells workers to wait, and holds what has arrived of the file under way.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pipelines.errors import WeightsError
from pipelines.hub import Hub, Listing, RemoteFile
from pipelines.manifest import FileRecord, Manifest, read_manifest, write_manifest
from pipelines.verifying import fetching_folder
from pipelines.weights import LoraSpec, ModelSpec, check_lora, check_weights
from pipelines.weights_files import (
    MODEL_INDEX,
    TENSORS_SUFFIX,
    folder_of,
    is_weights_path,
    list_tensors,
    list_texts,
    parse_object,
    parts_of,
)


class Watcher(Protocol):
    """Who is told how a fetch goes on; all numbers are bytes."""

    def expect(self, size_bytes: int) -> None:
        """So much more is going to be looked over, or to arrive."""

    def advance(self, num_bytes: int) -> None:
        """So much was looked over, or arrived; negative where it has to arrive again."""

    def finish_file(self, path: str, size_bytes: int) -> None:
        """A file has arrived, and is what was announced."""


def fetch_model(spec: ModelSpec, hub: Hub, repo: str, revision: str, watcher: Watcher) -> Manifest:
    """Fetch a model's folder, or what of it is missing.

    Args:
        spec: the model; its folder is made if needed.
        hub: where from.
        repo: `owner/name`.
        revision: branch, tag or commit.
        watcher: told how it goes on.

    Returns:
        The manifest, as it was written.

    Raises:
        WeightsError: one line that says what is wrong, and what to do about it.
        OSError: the folder cannot be written.
    """
    listing = hub.list_files(repo, revision)
    folder = spec.weights_dir
    with _held(folder):
        files = {path: file for path, file in listing.files.items() if path == MODEL_INDEX or _is_of_component(path)}
        fetch = _Fetch(hub, listing, folder, {folder / path: file for path, file in files.items()}, watcher)
        fetch.get([folder / MODEL_INDEX])
        index = parse_object(folder / MODEL_INDEX)
        _check_pipeline(spec, index)
        fetch.get(folder / path for path in list_texts(index, files))
        fetch.get(folder / path for path in list_tensors(index, files, lambda path: parse_object(folder / path)))
        check_weights(spec)
        return fetch.finish()


def fetch_lora(
    spec: ModelSpec, lora: LoraSpec, hub: Hub, repo: str, revision: str, path: str, watcher: Watcher
) -> Manifest:
    """Fetch the one file of a LoRA.

    Args:
        spec: the model that it is for.
        lora: the LoRA; its file's folder is made if needed.
        hub: where from.
        repo: `owner/name`.
        revision: branch, tag or commit.
        path: of the file in the repository.
        watcher: told how it goes on.

    Returns:
        The manifest, as it was written.

    Raises:
        WeightsError: one line that says what is wrong, and what to do about it.
        OSError: the folder cannot be written.
    """
    listing = hub.list_files(repo, revision)
    if path not in listing.files:
        raise WeightsError(f"{repo} has no file {path} at {revision}")
    with _held(lora.file):
        fetch = _Fetch(hub, listing, lora.file, {lora.file: listing.files[path]}, watcher)
        fetch.get([lora.file])
        check_lora(spec, lora)
        return fetch.finish()


class _Fetch:
    """One fetch under way.

    Args:
        weights: a model's folder, or a LoRA's file.
        wanted: local file → what it must become; more than is needed does no harm.
    """

    def __init__(
        self, hub: Hub, listing: Listing, weights: Path, wanted: dict[Path, RemoteFile], watcher: Watcher
    ) -> None:
        self._hub = hub
        self._listing = listing
        self._weights = weights
        self._root = folder_of(weights)
        self._wanted = wanted
        self._watcher = watcher
        self._parts = fetching_folder(weights)
        self._records: dict[Path, FileRecord] = {}
        self._got: dict[str, FileRecord] = {}
        self._look_over()

    def _look_over(self) -> None:
        """Find out what is there already; refuse to touch what nobody has fetched, or what has another version."""
        manifest = read_manifest(self._weights)
        source = (self._listing.repo, self._listing.commit)
        self._is_another = manifest is not None and (manifest.repo, manifest.revision) != source
        present = {file: remote for file, remote in self._wanted.items() if file.exists()}
        self._watcher.expect(sum(remote.size_bytes for file, remote in present.items() if _has_size(file, remote)))
        for file, remote in present.items():
            record = remote.match(file, self._watcher.advance)
            if record is not None:
                self._records[file] = record
        others = [file for file in present if file not in self._records]
        may_replace = manifest is not None or self._parts.exists()
        if others and (self._is_another or not may_replace):
            self._refuse(others, "is not the same")

    def _refuse(self, files: list[Path], what: str) -> None:
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        raise WeightsError(
            f"{self._weights} holds other weights than {self._listing.repo} at {self._listing.commit}: "
            f"{self._name(files[0])} {what}{more}; nothing was changed. Another version goes to another place: change "
            "`weights` of the entry, or move away what is there"
        )

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def get(self, files: Iterable[Path]) -> None:
        """Fetch those of these files that are not there yet."""
        chosen = list(files)
        for file in chosen:
            if file not in self._wanted:
                raise WeightsError(f"{self._listing.repo} has no file {self._name(file)} at {self._listing.commit}")
        missing = [file for file in chosen if file not in self._records]
        if missing and self._is_another:
            self._refuse(missing, "is missing")
        if missing:
            self._parts.mkdir(exist_ok=True)
            self._check_space(missing)
        for file in missing:
            self._records[file] = self._fetch(file, self._wanted[file])
        self._got |= {self._name(file): self._records[file] for file in chosen}

    def _part(self, remote: RemoteFile) -> Path:
        return self._parts / f"{remote.digest}.part"

    def _check_space(self, files: list[Path]) -> None:
        here_bytes = sum(
            part.stat().st_size for part in {self._part(self._wanted[file]) for file in files} if part.exists()
        )
        to_come_bytes = max(sum(self._wanted[file].size_bytes for file in files) - here_bytes, 0)
        free_bytes = shutil.disk_usage(self._parts).free
        if to_come_bytes > free_bytes:
            raise WeightsError(
                f"{self._root} has room for {free_bytes / 1e9:.1f} GB, and {to_come_bytes / 1e9:.1f} GB are to come; "
                "make room, and the same command goes on"
            )
        self._watcher.expect(to_come_bytes)

    def _fetch(self, file: Path, remote: RemoteFile) -> FileRecord:
        part = self._part(remote)
        record = self._hub.download(self._listing, remote, part, self._watcher.advance)
        file.parent.mkdir(exist_ok=True)
        # Data before name: after a power cut a name could otherwise stand for an empty file.
        with part.open("rb") as content:
            os.fsync(content.fileno())
        part.replace(file)
        self._watcher.finish_file(self._name(file), remote.size_bytes)
        return record

    def finish(self) -> Manifest:
        """Write the manifest, and tell workers that all is there."""
        manifest = Manifest(self._listing.repo, self._listing.commit, self._got)
        write_manifest(self._weights, manifest)
        shutil.rmtree(self._parts, ignore_errors=True)
        return manifest


def _is_of_component(path: str) -> bool:
    return is_weights_path(path) and path.count("/") == 1


def _has_size(file: Path, remote: RemoteFile) -> bool:
    return file.is_file() and file.stat().st_size == remote.size_bytes


def _check_pipeline(spec: ModelSpec, index: dict[str, object]) -> None:
    """Find out that it is the wrong repository before gigabytes have arrived."""
    found = index.get("_class_name")
    if found != spec.pipeline:
        raise WeightsError(f"{spec.id}: the repository holds a {found}, the registry says {spec.pipeline}")
    parts_of(index)


@contextmanager
def _held(weights: Path) -> Iterator[None]:
    """Keep other fetches away; the kernel lets go when the process dies. Where nothing arrived, nothing is left."""
    folder = folder_of(weights)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    parts = fetching_folder(weights)
    path = parts.with_name(f"{parts.name}.lock")
    lock = _lock(path)
    try:
        yield
    finally:
        # While it is held: who takes the old file for the lock sees that it has no name any more.
        path.unlink(missing_ok=True)
        if not _has_arrived(weights):
            with suppress(OSError):
                parts.rmdir()
            with suppress(OSError):
                if is_new:
                    folder.rmdir()
        os.close(lock)


def _has_arrived(weights: Path) -> bool:
    if weights.suffix == TENSORS_SUFFIX:
        return weights.exists()
    return any(not file.name.startswith(".") for file in weights.iterdir())


def _lock(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise WeightsError(f"another fetch is writing to {path.parent}; wait for it to end") from error
        os.close(lock)
