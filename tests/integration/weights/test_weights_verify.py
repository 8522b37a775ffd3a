"""`restage weights verify` on a twin that was carried here by hand, and on what can happen to it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.manifest import make_manifest, manifest_path, read_manifest, weights_sha256
from pipelines.verifying import fetching_folder
from server.errors import RequestError
from server.settings import Settings
from server.weights.command import verify_weights
from tests.integration.weights.conftest import LORA_FILE, MODEL, files_of
from tests.integration.weights.hub_server import make_lora

TENSORS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(settings: Settings, weights_dir: Path) -> Path:
    """Give a folder with the twin and its LoRA, neither with a manifest."""
    folder = settings.models.weights_dir / MODEL
    shutil.copytree(weights_dir / MODEL, folder)
    manifest_path(folder).unlink()
    lora = settings.models.weights_dir / LORA_FILE
    lora.parent.mkdir()
    lora.write_bytes(make_lora(4000))
    return folder


@pytest.fixture
def verify_lines(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Give a function that runs the command: exit status, and lines without the model's name."""

    def run(*model_ids: str, record: bool = False) -> tuple[int, list[str]]:
        status = verify_weights(settings, model_ids or [MODEL], record=record)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, [line.removeprefix(f"{MODEL}: ") for line in said.out.splitlines()]

    return run


VerifyLines = Callable[..., tuple[int, list[str]]]


def test_weights_that_were_carried_are_recorded_and_then_as_recorded(
    folder: Path, weights_dir: Path, verify_lines: VerifyLines
) -> None:
    """Without a manifest nothing can be compared; recorded, the digest is that of the machine they came from."""
    status, lines = verify_lines()
    assert status == 1
    assert "has no restage-manifest.json, so there is nothing to compare with" in lines[0]
    assert lines[1].startswith("LoRA steps-4: ")
    status, lines = verify_lines(record=True)
    there = make_manifest(weights_dir / MODEL)
    size = f"{len(there.files)} files, {there.size_bytes / 1000:.1f} kB"
    assert (status, lines[0]) == (0, f"{size}, sha256 {weights_sha256(there)}; recorded")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.repo, manifest.revision) == (None, None)
    assert verify_lines() == (0, [line.replace("; recorded", "; as recorded") for line in lines])
    # Recording again compares, and overwrites nothing.
    (folder / "vae" / "config.json").write_bytes((folder / "vae" / "config.json").read_bytes() + b" ")
    status, lines = verify_lines(record=True)
    assert (status, lines[0].split(" has ")[0]) == (1, "vae/config.json")
    assert read_manifest(folder) == manifest


def test_every_difference_is_a_line(folder: Path, settings: Settings, verify_lines: VerifyLines) -> None:
    """Each names its file; one model's trouble does not hide another's."""
    verify_lines(record=True)
    with (folder / TENSORS).open("r+b") as file:
        file.seek(300_000)
        file.write(b"\xff\xff")
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    (folder / "vae" / "model.bin").touch()
    (folder / "README.md").touch()
    (settings.models.weights_dir / LORA_FILE).write_bytes(b"short")
    status, lines = verify_lines("tiny-qwen-image-edit-2511", MODEL)
    assert status == 1
    assert lines[0].startswith("tiny-qwen-image-edit-2511: there is no folder ")
    assert lines[1:3] == [
        "tokenizer_2/tokenizer.json is missing",
        "vae/model.bin is pickled, which may run code when it is read; remove it",
    ]
    assert lines[3].startswith(f"{TENSORS} has other bytes than were recorded: SHA-256 ")
    assert lines[4].startswith("LoRA steps-4: Steps-4.safetensors has 5 bytes, not ")
    assert len(lines) == 5


def test_what_is_never_loaded_is_mentioned(folder: Path, verify_lines: VerifyLines) -> None:
    """It is no mistake."""
    verify_lines(record=True)
    for number in range(7):
        (folder / f"page-{number}.md").touch()
    status, lines = verify_lines()
    assert status == 0
    assert lines[1] == "never loaded are page-0.md, page-1.md, page-2.md, page-3.md, page-4.md and 2 more"


def test_what_could_be_loaded_beside_the_weights_is_not_recorded(folder: Path, verify_lines: VerifyLines) -> None:
    """It is named, and must go first."""
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    (folder / "own.py").touch()
    status, lines = verify_lines(record=True)
    assert status == 1
    assert lines[:2] == [
        "own.py is code, which never comes with weights; remove it",
        "text_encoder/adapter_config.json does not belong there, and could be loaded; remove it",
    ]
    assert read_manifest(folder) is None


@pytest.mark.parametrize("record", [False, True])
def test_damaged_weights_are_neither_right_nor_recorded(folder: Path, verify_lines: VerifyLines, record: bool) -> None:
    """What a worker would say of them is said."""
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    status, lines = verify_lines(record=record)
    assert status == 1
    assert "bytes, its header says" in lines[0]
    assert read_manifest(folder) is None


def test_a_fetch_that_was_cut_off_is_told(folder: Path, verify_lines: VerifyLines) -> None:
    """It is neither compared nor recorded."""
    fetching_folder(folder).mkdir()
    for record in (False, True):
        status, lines = verify_lines(record=record)
        assert status == 1
        assert "is still being fetched, or that was cut off" in lines[0]
    assert read_manifest(folder) is None


def test_right_files_of_another_pipeline_are_told(folder: Path, settings: Settings, verify_lines: VerifyLines) -> None:
    """A manifest says what the files are, not that the registry's entry fits them."""
    verify_lines(record=True)
    entries = yaml.safe_load(settings.models.file.read_text())
    next(entry for entry in entries if entry["id"] == "tiny-qwen-image-edit-2511")["weights"] = MODEL
    settings.models.file.write_text(yaml.safe_dump(entries))
    status, lines = verify_lines("tiny-qwen-image-edit-2511")
    assert status == 1
    assert "holds a FluxKontextPipeline, the registry says QwenImageEditPlusPipeline" in lines[0]


def test_versions_that_were_replaced_are_verified_too(
    folder: Path, settings: Settings, verify_lines: VerifyLines
) -> None:
    """Jobs that were accepted for one still run on it."""
    verify_lines(record=True)
    entries = yaml.safe_load(settings.models.file.read_text())
    entry = next(entry for entry in entries if entry["id"] == MODEL)
    entry["previous"] = [{"version": "0", "weights": "old"}]
    settings.models.file.write_text(yaml.safe_dump(entries))
    status, lines = verify_lines()
    assert status == 1
    assert lines[1] == f"{MODEL}@0: there is no folder {folder.parent / 'old'}"


def test_all_enabled_models_are_verified_when_none_is_named(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each of them."""
    assert verify_weights(settings, [], record=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines} == set(settings.models.enabled)


def test_an_unknown_model_is_named_with_the_one_that_was_meant(settings: Settings) -> None:
    """Nothing is read."""
    with pytest.raises(RequestError, match="did you mean tiny-flux-kontext"):
        verify_weights(settings, ["tiny-flux-kontex"], record=False)


def test_a_twin_of_an_earlier_version_is_made_again(folder: Path, settings: Settings) -> None:
    """One without the stamp of the code that makes it is replaced, and has a manifest then."""
    from pipelines.tiny import make_tiny_weights

    before = files_of(folder)
    (folder / ".made-by").unlink()
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    make_tiny_weights(settings.models.weights_dir, [MODEL])
    assert read_manifest(folder) == make_manifest(folder)
    assert files_of(folder) == before
