"""`restage weights fetch` with the real client of the hub, and a hub that has every kind of trouble."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.errors import WeightsError
from pipelines.manifest import Manifest, make_manifest, read_manifest, weights_sha256, write_manifest
from pipelines.verifying import check_files, fetching_folder, verify
from pipelines.weights import LoraSpec, ModelSpec
from server.errors import RequestError
from server.ports import free_ports
from server.settings import Settings
from server.weights.command import fetch_weights, verify_weights
from tests.integration.weights.conftest import LORA_FILE, LORA_REPO, MODEL, MODEL_REPO, OTHER_FILES, files_of
from tests.integration.weights.hub_server import MAIN, TOKEN, HubServer, make_lora

LARGEST = "transformer/diffusion_pytorch_model.safetensors"
LORA_PATH = "v1/steps-4.safetensors"


class Watching:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.expected_bytes = self.seen_bytes = 0
        self.finished: list[str] = []

    def expect(self, size_bytes: int) -> None:
        self.expected_bytes += size_bytes

    def advance(self, num_bytes: int) -> None:
        self.seen_bytes += num_bytes

    def finish_file(self, path: str, size_bytes: int) -> None:
        assert size_bytes > 0
        self.finished.append(path)


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(MODEL, "flux_kontext", "FluxKontextPipeline", folder, "float32", 16384)


def fetch_twin(folder: Path, hub: HubServer, *, token: str | None = None, watcher: Watching | None = None) -> Manifest:
    from pipelines.fetching import fetch_model
    from pipelines.hub import Hub

    return fetch_model(spec_of(folder), Hub(hub.endpoint, token), MODEL_REPO, "main", watcher or Watching())


def fetch_small_lora(file: Path, hub: HubServer) -> Manifest:
    from pipelines.fetching import fetch_lora
    from pipelines.hub import Hub

    lora = LoraSpec("steps-4", file)
    return fetch_lora(spec_of(file.parent), lora, Hub(hub.endpoint), LORA_REPO, "main", LORA_PATH, Watching())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights" / MODEL


def hidden(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob(".*")]


@pytest.mark.usefixtures("client")
def test_only_what_is_loaded_is_fetched(
    folder: Path, hub: HubServer, weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has the twin's files to the byte, its manifest the commit; pickles, code, variants stay away."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # of somebody who did not mean this hub
    watcher = Watching()
    manifest = fetch_twin(folder, hub, watcher=watcher)
    assert files_of(folder) == files_of(weights_dir / MODEL)
    assert set(hub.fetched).isdisjoint(OTHER_FILES)
    assert sorted(hub.fetched) == sorted(watcher.finished) == sorted(manifest.files)
    assert watcher.seen_bytes == watcher.expected_bytes == manifest.size_bytes
    assert hub.unknown == []
    assert not any(request.is_authorized for request in hub.requests)
    assert (manifest.repo, manifest.revision) == (MODEL_REPO, MAIN)
    assert read_manifest(folder) == manifest == check_files(MODEL, folder)
    assert verify(folder, manifest) == []
    # Known again, wherever it came from.
    assert weights_sha256(manifest) == weights_sha256(make_manifest(weights_dir / MODEL))
    assert hidden(folder) == []


@pytest.mark.usefixtures("client")
def test_a_second_fetch_finds_everything_there(folder: Path, hub: HubServer) -> None:
    """The hub is asked what there is, and for nothing else."""
    first = fetch_twin(folder, hub)
    hub.requests.clear()
    assert fetch_twin(folder, hub) == first
    assert hub.requests == []


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("after_bytes", [70_000, -70_000], ids=["closed", "reset"])
def test_a_connection_that_is_cut_is_taken_up_in_the_middle(folder: Path, hub: HubServer, after_bytes: int) -> None:
    """What arrived is not asked for again, within one and the same run."""
    hub.bodies[LARGEST] = [after_bytes]
    manifest = fetch_twin(folder, hub)
    first, second = [request.range for request in hub.requests if request.path == LARGEST]
    assert first is None
    assert second is not None
    assert 16_384 <= int(second.removeprefix("bytes=").removesuffix("-")) <= 70_000
    assert verify(folder, manifest) == []


@pytest.mark.usefixtures("client")
def test_a_hub_without_ranges_begins_anew(folder: Path, hub: HubServer) -> None:
    """The whole file in answer to a request for its rest is not appended to what is there."""
    hub.takes_ranges = False
    hub.bodies[LARGEST] = [70_000]
    watcher = Watching()
    manifest = fetch_twin(folder, hub, watcher=watcher)
    assert verify(folder, manifest) == []
    assert watcher.seen_bytes == watcher.expected_bytes


@pytest.mark.usefixtures("client")
def test_a_hub_in_trouble_is_asked_again(tmp_path: Path, hub: HubServer) -> None:
    """Two answers of 503 do not end a fetch."""
    hub.statuses[LORA_PATH] = [503, 503]
    file = tmp_path / "steps.safetensors"
    fetch_small_lora(file, hub)
    assert file.read_bytes() == hub.repositories[LORA_REPO].files[LORA_PATH]


@pytest.mark.usefixtures("client")
def test_other_bytes_than_announced_are_thrown_away(folder: Path, hub: HubServer) -> None:
    """They never get the file's name, what came before them stays, and the next run has them right."""
    right = hub.repositories[MODEL_REPO].files
    for path in ("vae/config.json", LARGEST):  # by the digest of git, and by SHA-256
        hub.bodies[path] = [right[path][:-1] + bytes([right[path][-1] ^ 1])]
        with pytest.raises(WeightsError, match=f"what arrived of {path} is not what http.* announced"):
            fetch_twin(folder, hub)
        assert not (folder / path).exists()
    with pytest.raises(WeightsError, match="still being fetched, or that was cut off; `restage weights fetch` goes on"):
        check_files(MODEL, folder)
    hub.requests.clear()
    manifest = fetch_twin(folder, hub)
    assert verify(folder, manifest) == []
    assert "model_index.json" not in hub.fetched


@pytest.mark.usefixtures("client")
def test_more_bytes_than_announced_are_not_written(tmp_path: Path, hub: HubServer) -> None:
    """A hub cannot fill the disk."""
    hub.bodies[LORA_PATH] = [hub.repositories[LORA_REPO].files[LORA_PATH] + b"\0" * 200_000]
    with pytest.raises(WeightsError, match=r"more arrives of v1/steps-4\.safetensors than the .* announced"):
        fetch_small_lora(tmp_path / "steps.safetensors", hub)


@pytest.mark.usefixtures("client")
def test_a_gated_model_says_what_to_do_and_leaves_nothing(folder: Path, hub: HubServer) -> None:
    """Without a token, its page and the option are named; with one that has not accepted, that is said."""
    hub.repositories[MODEL_REPO].is_gated = True
    with pytest.raises(WeightsError, match=rf"must be accepted on {hub.endpoint}/{MODEL_REPO} by .*--token-file FILE"):
        fetch_twin(folder, hub)
    with pytest.raises(WeightsError, match="the account of the token has not done so"):
        fetch_twin(folder, hub, token="hf_other")  # noqa: S106 - of nobody
    assert not folder.exists()


@pytest.mark.usefixtures("client")
def test_the_token_goes_to_the_hub_alone(folder: Path, hub: HubServer) -> None:
    """A gated model is fetched with it; the host that large files come from never sees it."""
    hub.repositories[MODEL_REPO].is_gated = True
    fetch_twin(folder, hub, token=TOKEN)
    authorized = {request.path: request.is_authorized for request in hub.requests}
    assert authorized["vae/config.json"] is True
    assert authorized[LARGEST] is False


@pytest.mark.usefixtures("client")
def test_what_is_not_there_is_named(folder: Path, tmp_path: Path, hub: HubServer) -> None:
    """A repository, a revision, a file and a hub that are not there, each in one line."""
    from pipelines.fetching import fetch_lora, fetch_model
    from pipelines.hub import Hub

    spec, lora = spec_of(folder), LoraSpec("steps-4", tmp_path / "x.safetensors")
    here, nowhere = Hub(hub.endpoint), Hub(f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(WeightsError, match="has no repository studio/gone, or it is private and needs --token-file"):
        fetch_model(spec, here, "studio/gone", "main", Watching())
    with pytest.raises(WeightsError, match=f"{MODEL_REPO} has no revision v9"):
        fetch_model(spec, here, MODEL_REPO, "v9", Watching())
    with pytest.raises(WeightsError, match=r"has no file v2\.safetensors at main"):
        fetch_lora(spec, lora, here, LORA_REPO, "main", "v2.safetensors", Watching())
    with pytest.raises(WeightsError, match=r"cannot be reached, or broke off \(ConnectError\)"):
        fetch_model(spec, nowhere, MODEL_REPO, "main", Watching())
    assert not folder.exists()


@pytest.mark.usefixtures("client")
def test_a_refusal_is_told_with_its_status(tmp_path: Path, hub: HubServer) -> None:
    """It is not repeated, and the signed address that large files come from is not shown."""
    hub.statuses[LORA_PATH] = [403]
    with pytest.raises(WeightsError, match=r"answers 403 for v1/steps-4\.safetensors of .* is the token still") as told:
        fetch_small_lora(tmp_path / "steps.safetensors", hub)
    assert "signature" not in str(told.value)
    assert len(hub.requests) == 1


@pytest.mark.usefixtures("client")
def test_a_full_disk_is_told(tmp_path: Path, hub: HubServer) -> None:
    """Where it fills up in the middle of a file, what to do is said."""
    file = tmp_path / "steps.safetensors"
    fetching_folder(file).mkdir()
    digest = hashlib.sha256(hub.repositories[LORA_REPO].files[LORA_PATH]).hexdigest()
    (fetching_folder(file) / f"{digest}.part").symlink_to("/dev/full")
    with pytest.raises(WeightsError, match="the disk is full; make room, and the same command goes on"):
        fetch_small_lora(file, hub)
    assert not file.exists()


def test_the_network_stays_forbidden_to_all_but_the_command(tmp_path: Path, hub: HubServer) -> None:
    """What calls the same code without lifting HF_HUB_OFFLINE asks for nothing."""
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE forbids the network to this process"):
        fetch_small_lora(tmp_path / "steps.safetensors", hub)
    assert hub.listings == []


@pytest.mark.usefixtures("client")
def test_a_file_that_the_hub_does_not_give_in_one_piece_is_told(tmp_path: Path, hub: HubServer) -> None:
    """Over 50 GB its plain downloads end."""
    from pipelines.hub import Hub, Listing, RemoteFile

    listing = Listing(LORA_REPO, MAIN, {})
    with pytest.raises(WeightsError, match=r"x\.safetensors of studio/loras has over 50 GB"):
        Hub(hub.endpoint).download(listing, RemoteFile("x.safetensors", 10**11, "a" * 64), tmp_path / "part", print)


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("announced", [{"size": -1}, {"size": "many"}, {"sha256": "../../x"}])
def test_a_hub_that_talks_nonsense_is_told(folder: Path, hub: HubServer, announced: dict[str, object]) -> None:
    """Sizes and digests that are none do not reach the disk."""
    hub.repositories[MODEL_REPO].announced[LARGEST] = {"size": 500_000, **announced}
    with pytest.raises(WeightsError, match="does not answer as a hub does"):
        fetch_twin(folder, hub)
    assert not folder.exists()


@pytest.mark.usefixtures("client")
def test_too_little_room_is_told_before_anything_large_is_fetched(folder: Path, hub: HubServer) -> None:
    """The sum of what is to come is compared with what is free."""
    hub.repositories[MODEL_REPO].announced[LARGEST] = {"size": 10**17}
    with pytest.raises(WeightsError, match=r"has room for .* GB, and 100000000\.. GB are to come; make room"):
        fetch_twin(folder, hub)
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (b'{"_class_name": "StableDiffusionPipeline"}', "holds a StableDiffusionPipeline, the registry says"),
        (b'{"_class_name": "FluxKontextPipeline", "vae": ["vae", "Own"]}', "of library 'vae'; only diffusers and"),
        (b'{"_class_name": "FluxKontextPipeline", "../x": ["diffusers", "A"]}', "'../x' is no component"),
        (b'{"_class_name": "FluxKontextPipeline", "none": ["diffusers", "A"]}', "neither none/diffusion_pytorch_model"),
        (b"[", "is not JSON"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_a_wrong_repository_is_told_before_gigabytes_arrive(
    folder: Path, hub: HubServer, index: bytes, problem: str
) -> None:
    """Its index is looked at first; no tensors are asked for."""
    hub.repositories[MODEL_REPO].files["model_index.json"] = index
    with pytest.raises(WeightsError, match=problem):
        fetch_twin(folder, hub)
    assert not [path for path in hub.fetched if path.endswith(".safetensors")]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("shard", ["../../../x.safetensors", "x.bin", "y.safetensors"])
def test_shards_come_from_their_folder_alone(folder: Path, hub: HubServer, shard: str) -> None:
    """An index cannot lead anywhere else, nor to a pickle."""
    files = hub.repositories[MODEL_REPO].files
    del files["vae/diffusion_pytorch_model.safetensors"]
    files["vae/diffusion_pytorch_model.safetensors.index.json"] = f'{{"weight_map": {{"a": "{shard}"}}}}'.encode()
    files["vae/x.bin"] = b"\x80\x04."
    with pytest.raises(WeightsError, match=r"index\.json names .*, which is not there"):
        fetch_twin(folder, hub)


@pytest.mark.usefixtures("client")
def test_shards_are_fetched_by_their_index(folder: Path, hub: HubServer) -> None:
    """A model in several files is fetched whole, whatever they are called."""
    files = hub.repositories[MODEL_REPO].files
    tensors = files["vae/all.safetensors"] = files.pop("vae/diffusion_pytorch_model.safetensors")
    names = json.loads(tensors[8 : 8 + int.from_bytes(tensors[:8], "little")]).keys() - {"__metadata__"}
    index = json.dumps({"weight_map": dict.fromkeys(names, "all.safetensors")})
    files["vae/diffusion_pytorch_model.safetensors.index.json"] = index.encode()
    assert "vae/all.safetensors" in fetch_twin(folder, hub).files


@pytest.mark.usefixtures("client")
def test_weights_of_somebody_else_are_not_touched(folder: Path, hub: HubServer, weights_dir: Path) -> None:
    """Where a folder without a manifest holds another file, nothing is fetched and nothing replaced."""
    folder.mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds other weights .*: vae/config.json is not the same; nothing was"):
        fetch_twin(folder, hub)
    assert files_of(folder) == {"vae/config.json": b"{}"}
    assert hidden(folder) == []
    shutil.rmtree(folder)
    shutil.copytree(weights_dir / MODEL, folder)
    fetch_twin(folder, hub)
    assert hub.requests == []


@pytest.mark.usefixtures("client")
def test_another_version_goes_to_another_folder(folder: Path, hub: HubServer) -> None:
    """When a branch has moved, pictures of the old version can still be made; an old README does not matter."""
    old = fetch_twin(folder, hub)
    repository = hub.repositories[MODEL_REPO]
    repository.commit, repository.files["README.md"] = "2" * 40, b"# Better words"
    assert fetch_twin(folder, hub) == Manifest(MODEL_REPO, "2" * 40, old.files)
    repository.commit = "3" * 40
    repository.files["vae/config.json"] += b" "
    before = files_of(folder)
    with pytest.raises(WeightsError, match=r"vae/config.json is not the same; nothing was changed. Another version"):
        fetch_twin(folder, hub)
    repository.files["vae/new.json"] = b"{}"
    repository.files["vae/config.json"] = before["vae/config.json"]
    with pytest.raises(WeightsError, match=r"vae/new\.json is missing"):
        fetch_twin(folder, hub)
    assert files_of(folder) == before
    assert check_files(MODEL, folder) is not None


@pytest.mark.usefixtures("client")
def test_a_damaged_file_is_fetched_again(folder: Path, hub: HubServer) -> None:
    """A folder that was fetched is repaired by the same command, and only where it must be."""
    fetch_twin(folder, hub)
    with (folder / LARGEST).open("r+b") as file:
        file.seek(200_000)
        file.write(b"\xff\xff\xff")
    (folder / "vae" / "config.json").unlink()
    hub.requests.clear()
    manifest = fetch_twin(folder, hub)
    assert sorted(hub.fetched) == sorted([LARGEST, "vae/config.json"])
    assert verify(folder, manifest) == []


@pytest.mark.usefixtures("client")
def test_two_fetches_at_once_do_not_meet(folder: Path, hub: HubServer) -> None:
    """The second says so and leaves; the first goes on and ends well."""
    hub.bytes_per_second = 400_000.0
    first = threading.Thread(target=fetch_twin, args=[folder, hub])
    first.start()
    while not fetching_folder(folder).exists():
        first.join(0.01)
        assert first.is_alive()
    with pytest.raises(WeightsError, match=f"another fetch is writing to {folder}; wait for it to end"):
        fetch_twin(folder, hub)
    hub.bytes_per_second = None
    first.join(60)
    assert check_files(MODEL, folder) is not None


@pytest.mark.usefixtures("client")
def test_command_fetches_model_and_lora_and_verifies_them(
    hub: HubServer, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each file on standard error, one for each of the two on standard output."""
    assert fetch_weights(settings, MODEL, hub.endpoint, None) == 0
    said = capsys.readouterr()
    model, lora = said.out.splitlines()
    digest = hashlib.sha256(hub.repositories[LORA_REPO].files[LORA_PATH]).hexdigest()
    manifest = read_manifest(settings.models.weights_dir / MODEL)
    assert manifest is not None
    assert model.startswith(f"{MODEL}: {len(manifest.files)} files, ")
    assert model.endswith(f", sha256 {weights_sha256(manifest)}, from {MODEL_REPO} at {MAIN}")
    assert lora.startswith(f"{MODEL}: LoRA steps-4: 100.2 kB, sha256 {digest}, from ")
    arrived = [line.split(", ")[0] for line in said.err.splitlines()]
    assert sorted(arrived) == sorted(
        [f"{MODEL}: {path}" for path in manifest.files] + [f"{MODEL}: LoRA steps-4: Steps-4.safetensors"]
    )
    assert verify_weights(settings, [MODEL], record=False) == 0
    assert "; as recorded" in capsys.readouterr().out
    assert read_manifest(settings.models.weights_dir / LORA_FILE) is not None


@pytest.mark.usefixtures("client")
def test_command_without_a_source_says_where_to_place_weights(
    hub: HubServer, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and the way by hand; an id that nobody knows gets the one that was meant."""
    assert fetch_weights(settings, "tiny-qwen-image-edit-2511", hub.endpoint, None) == 1
    assert "by hand, and run `restage weights verify tiny-qwen-image-edit-2511 --record`" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"there is no model 'tiny-flux-context'; did you mean tiny-flux-kontext\?"):
        fetch_weights(settings, "tiny-flux-context", hub.endpoint, None)
    assert hub.listings == []


@pytest.mark.parametrize(
    ("endpoint", "token", "problem"),
    [
        ("ftp://127.0.0.1", None, "the endpoint needs the address of a hub"),
        ("https://", None, "the endpoint needs the address of a hub"),
        ("http://me:secret@127.0.0.1", None, "the endpoint needs the address of a hub"),
        ("http://127.0.0.1:port", None, "the endpoint needs the address of a hub"),
        ("http://hub.example", b"hf_x", "a token is not sent to hub.example over http"),
        ("http://127.0.0.1", b"", "needs one token, such as hf_"),
        ("http://127.0.0.1", b"hf_x\nhf_y", "needs one token, such as hf_"),
        ("http://127.0.0.1", b"\xff\xfe", "needs one token, such as hf_"),
        ("http://127.0.0.1", b"x" * 2000, "needs one token, such as hf_"),
    ],
)
def test_command_refuses_a_wrong_endpoint_or_token(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    endpoint: str,
    token: bytes | None,
    problem: str,
) -> None:
    """Status 1, before anything is asked; neither token nor password is shown."""
    file = tmp_path / "token"
    if token is not None:
        file.write_bytes(token)
    assert fetch_weights(settings, MODEL, endpoint, None if token is None else file) == 1
    said = capsys.readouterr().err
    assert problem in said
    assert "hf_x" not in said
    assert "secret" not in said


def test_command_names_a_token_file_that_is_not_there(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, and which file."""
    assert fetch_weights(settings, MODEL, "https://hub.example", tmp_path / "none") == 1
    assert f"--token-file {tmp_path / 'none'} cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_cut_run_goes_on_where_it_was(
    hub: HubServer, environment: dict[str, str], weights_dir: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """What arrived before the command ended is not asked for again; HF_HUB_OFFLINE does not keep it from the hub."""
    shutil.copytree(weights_dir / MODEL, tmp_path / "weights" / MODEL)
    large = make_lora(24_000_000)
    hub.repositories[LORA_REPO].files[LORA_PATH] = large
    hub.bytes_per_second = 12_000_000.0
    env = {name: value for name, value in os.environ.items() if not name.startswith("RESTAGE_")} | environment
    env |= {"RESTAGE_ENV": "test", "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "server.cli", "weights", "fetch", MODEL]
    file = tmp_path / "weights" / LORA_FILE
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    try:
        # The client writes 10 MB at a time.
        parts = fetching_folder(file)
        while not any(part.stat().st_size for part in parts.glob("*.part")):
            assert first.poll() is None
            threading.Event().wait(0.01)
        first.send_signal(how)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    [part] = parts.glob("*.part")
    arrived_bytes = part.stat().st_size
    assert first.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert "Traceback" not in said
    assert not file.exists()
    with pytest.raises(WeightsError, match="still being fetched, or that was cut off"):
        check_files("x", file)
    hub.requests.clear()
    hub.bytes_per_second = None
    second = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 0, second.stderr
    [request] = hub.requests
    assert request.range == f"bytes={arrived_bytes}-"
    assert file.read_bytes() == large
    assert hub.unknown == []


@pytest.mark.usefixtures("client")
def test_a_manifest_that_is_none_stops_a_fetch(folder: Path, hub: HubServer) -> None:
    """It is named; nothing is overwritten."""
    write_manifest(folder, fetch_twin(folder, hub))
    (folder / "restage-manifest.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"restage-manifest.json is no manifest: it needs format"):
        fetch_twin(folder, hub)


@pytest.mark.usefixtures("client")
def test_a_folder_that_cannot_be_written_is_named(
    hub: HubServer, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and the reason, where a file stands in the way of the weights."""
    settings.models.weights_dir.write_text("")
    assert fetch_weights(settings, MODEL, hub.endpoint, None) == 1
    assert "cannot be written" in capsys.readouterr().err
