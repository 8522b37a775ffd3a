"""`restage weights`: fetches weights, and compares what lies there with its manifests.

Nothing else in Restage reaches for the network; `fetch` does, whatever `HF_HUB_OFFLINE` says.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import click

from pipelines.errors import WeightsError
from pipelines.manifest import Manifest, make_manifest, manifest_path, read_manifest, weights_sha256, write_manifest
from pipelines.verifying import check_fetched, find_extra, list_others, verify
from pipelines.weights import LoraSpec, ModelSpec, check_lora, check_weights
from pipelines.weights_files import MANIFEST_NAME, list_weights
from server.config.files import read_config_file
from server.model_entry import LoraSource, ModelEntry, Source
from server.registry import Registry, load_registry
from server.settings import Settings, is_loopback
from server.weights.progress import WeightsProgress, describe_size

EXIT_INTERRUPTED = 130
# Of the hub's client, for the one command that may use the network. Its warnings would quote URLs, which may be signed.
_HUB_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
}
_MAX_OTHERS = 5
_MAX_TOKEN_BYTES = 1000
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class _Weights:
    """The weights of a model, of a version that it had before, or of one of its LoRAs.

    Attributes:
        name: for messages.
        path: a folder, or a LoRA's file.
        spec: the model.
        lora: None where these are the model's own weights.
        source: where they can be fetched from, if anybody wrote that down.
    """

    name: str
    path: Path
    spec: ModelSpec
    lora: LoraSpec | None
    source: Source | None

    def check(self) -> None:
        """Check all that can be checked without a manifest.

        Raises:
            WeightsError: they cannot be loaded.
        """
        if self.lora is not None:
            check_lora(self.spec, self.lora)
        else:
            check_weights(self.spec)

    def describe(self, manifest: Manifest) -> str:
        """Say how much they are, and their digest: of a folder the manifest's, of a LoRA its file's own."""
        size = describe_size(manifest.size_bytes)
        if self.lora is not None:
            return f"{size}, sha256 {manifest.files[self.path.name].sha256}"
        return f"{len(manifest.files)} files, {size}, sha256 {weights_sha256(manifest)}"


def fetch_weights(settings: Settings, model_id: str, endpoint: str, token_file: Path | None) -> int:
    """Fetch the weights of a model and of its LoRAs.

    Returns:
        The exit status: 0 when all are there, 1 when not, 130 when it was interrupted.

    Raises:
        ModelNotFound: the registry has no such model.
        ConfigError: the configuration cannot be used.
    """
    # Before anything imports the hub's client, which reads them once.
    os.environ |= _HUB_ENVIRONMENT
    entry = _read_entries(settings).get(model_id)
    wanted = [weights for weights in _list_weights(settings, entry) if "@" not in weights.name]
    if all(weights.source is None for weights in wanted):
        return _fail(
            f"{model_id} has no `source` in {settings.models.file}, so nobody knows where to fetch it from: "
            f"place its weights in {wanted[0].path} by hand, and run `restage weights verify {model_id} --record`"
        )
    try:
        _check_endpoint(endpoint, has_token=token_file is not None)
        token = None if token_file is None else _read_token(token_file)
        return _until_interrupted(lambda: _fetch_all(wanted, endpoint, token))
    except WeightsError as error:
        return _fail(str(error))


def verify_weights(settings: Settings, model_ids: Sequence[str], *, record: bool) -> int:
    """Compare weights with their manifests, every byte of them; one line for each thing that is wrong.

    Args:
        settings: tell where the weights lie.
        model_ids: ids of the registry; the enabled models when empty.
        record: make manifests for weights that have none.

    Returns:
        The exit status: 0 when all is right, 1 when not, 130 when it was interrupted.

    Raises:
        ModelNotFound: the registry has no such model.
        ConfigError: the configuration cannot be used.
    """
    entries = _read_entries(settings)
    chosen = [entries.get(model_id) for model_id in model_ids or settings.models.enabled]
    # Two models may share a LoRA.
    listed = [weights for entry in chosen for weights in _list_weights(settings, entry)]
    unique = {weights.path if weights.lora else weights.name: weights for weights in listed}

    def run() -> int:
        work = _record if record else _verify
        return max([work(weights) for weights in unique.values()], default=0)

    return _until_interrupted(run)


def _read_entries(settings: Settings) -> Registry:
    """Read all entries of the registry, also those that are not enabled yet."""
    load_registry(settings)  # tells every mistake there is
    content = cast("list[Any]", read_config_file(settings.models.file).content)
    return Registry([ModelEntry.model_validate(raw) for raw in content])


def _list_weights(settings: Settings, entry: ModelEntry) -> Iterator[_Weights]:
    folder = settings.models.weights_dir
    versions = [(entry.id, entry.weights, entry.source)]
    versions += [(f"{entry.id}@{old.version}", old.weights, None) for old in entry.previous]
    for name, weights, source in versions:
        path = folder / weights
        spec = ModelSpec(name, entry.family, entry.pipeline, path, entry.dtype, entry.area)
        yield _Weights(name, path, spec, None, source)
    spec = ModelSpec(entry.id, entry.family, entry.pipeline, folder / entry.weights, entry.dtype, entry.area)
    for lora in entry.loras:
        path = folder / lora.weights
        yield _Weights(f"{entry.id}: LoRA {lora.id}", path, spec, LoraSpec(lora.id, path), lora.source)


def _until_interrupted(run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        click.echo("restage: interrupted; what has arrived stays, and the same command goes on with it", err=True)
        return EXIT_INTERRUPTED


def _fail(line: str) -> int:
    click.echo(f"restage: {line}", err=True)
    return 1


def _check_endpoint(endpoint: str, *, has_token: bool) -> None:
    try:
        url = urlsplit(endpoint)
        host, _ = url.hostname, url.port
    except ValueError:
        host, url = None, urlsplit("")
    if url.scheme not in {"http", "https"} or not host or "@" in url.netloc or url.query or url.fragment:
        raise WeightsError("the endpoint needs the address of a hub, such as https://huggingface.co, and no user in it")
    if has_token and url.scheme == "http" and not is_loopback(host):
        raise WeightsError(
            f"a token is not sent to {host} over http, where anybody on the way could read it: use https"
        )


def _read_token(file: Path) -> str:
    try:
        with file.open("rb") as content:
            data = content.read(_MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"--token-file {file} cannot be read: {error.strerror}") from error
    token = data.decode(errors="replace").strip()
    if len(data) > _MAX_TOKEN_BYTES or not _TOKEN.fullmatch(token):
        raise WeightsError(f"--token-file {file} needs one token, such as hf_…, and nothing else")
    return token


def _fetch_all(wanted: Sequence[_Weights], endpoint: str, token: str | None) -> int:
    status = 0
    for weights in wanted:
        if weights.source is not None:
            status = max(status, _fetch(weights, weights.source, endpoint, token))
        elif not weights.path.exists():
            status = _fail(f"{weights.name} has no `source` in the registry: place it as {weights.path} by hand")
    return status


def _fetch(weights: _Weights, source: Source, endpoint: str, token: str | None) -> int:
    from pipelines.fetching import fetch_lora, fetch_model  # noqa: PLC0415
    from pipelines.hub import Hub  # noqa: PLC0415

    hub = Hub(endpoint, token)
    try:
        with WeightsProgress(weights.name) as progress:
            where = (hub, source.repo, source.revision)
            if weights.lora is None:
                manifest = fetch_model(weights.spec, *where, progress)
            else:
                path = cast("LoraSource", source).file
                manifest = fetch_lora(weights.spec, weights.lora, *where, path, progress)
    except WeightsError as error:
        return _fail(f"{weights.name}: {_without_name(weights.name, error)}")
    except OSError as error:
        return _fail(f"{weights.name}: {weights.path} cannot be written: {error.strerror}")
    click.echo(f"{weights.name}: {weights.describe(manifest)}, from {manifest.repo} at {manifest.revision}")
    return 0


def _verify(weights: _Weights) -> int:
    manifest, problems = None, list[str]()
    try:
        check_fetched(weights.name, weights.path)
        manifest = read_manifest(weights.path)
        problems += _compare(weights, manifest)
        if not problems:
            weights.check()
    except WeightsError as error:
        problems.append(_without_name(weights.name, error))
    for problem in problems:
        click.echo(f"{weights.name}: {problem}")
    if manifest is None or problems:
        return 1
    click.echo(f"{weights.name}: {weights.describe(manifest)}; as recorded")
    if weights.lora is None:
        _tell_others(weights, manifest.files)
    return 0


def _compare(weights: _Weights, manifest: Manifest | None) -> list[str]:
    if manifest is None:
        weights.check()
        how = "`restage weights verify --record` records them as they are"
        return [f"{weights.path} has no {MANIFEST_NAME}, so there is nothing to compare with; {how}"]
    with WeightsProgress(weights.name) as progress:
        progress.expect(manifest.size_bytes)
        return [str(finding) for finding in verify(weights.path, manifest, progress.advance)]


def _record(weights: _Weights) -> int:
    try:
        check_fetched(weights.name, weights.path)
        if read_manifest(weights.path) is not None:
            return _verify(weights)
        weights.check()
        extra = find_extra(weights.path, list_weights(weights.path)) if weights.lora is None else []
        for finding in extra:
            click.echo(f"{weights.name}: {finding}")
        if extra:
            return 1
        with WeightsProgress(weights.name) as progress:
            manifest = make_manifest(weights.path, on_bytes=progress.advance)
        write_manifest(weights.path, manifest)
    except WeightsError as error:
        click.echo(f"{weights.name}: {_without_name(weights.name, error)}")
        return 1
    except OSError as error:
        return _fail(f"{weights.name}: {manifest_path(weights.path)} cannot be written: {error.strerror}")
    click.echo(f"{weights.name}: {weights.describe(manifest)}; recorded")
    return 0


def _tell_others(weights: _Weights, known: Collection[str]) -> None:
    others = list_others(weights.path, known)
    if others:
        more = f" and {len(others) - _MAX_OTHERS} more" if len(others) > _MAX_OTHERS else ""
        click.echo(f"{weights.name}: never loaded are {', '.join(others[:_MAX_OTHERS])}{more}")


def _without_name(name: str, error: WeightsError) -> str:
    """Give the text of an error that may begin with the name already."""
    return str(error).removeprefix(f"{name}: ")
