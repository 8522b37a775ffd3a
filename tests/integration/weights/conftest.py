"""A hub that serves one twin and one LoRA, and a registry whose entries name it as their source."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.integration.weights.hub_server import HubServer, Repository, make_lora

REPOSITORY = Path(__file__).parents[3]
MODEL = "tiny-flux-kontext"
MODEL_REPO, LORA_REPO = "studio/kontext-twin", "studio/loras"
LORA_FILE = "loras/Steps-4.safetensors"
# Beside a model's own files, a repository has others.
OTHER_FILES = {
    "README.md": b"# A model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "flux1-kontext.safetensors": b"\0" * 3000,
    "pipeline.py": b"raise SystemExit",
    "transformer/diffusion_pytorch_model.bin": b"\x80\x04.",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"\0" * 3000,
    "text_encoder/adapter_config.json": b"{}",
    "vae/model.py": b"raise SystemExit",
    "teaser/one.png": b"\x89PNG",
    "training/config.json": b"{}",
}


NOT_WEIGHTS = {"restage-manifest.json", ".made-by"}


def files_of(folder: Path) -> dict[str, bytes]:
    """Read a folder's files by path, but for the manifest and the stamp of the twin's makers."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {path: file.read_bytes() for path, file in sorted(files.items()) if path not in NOT_WEIGHTS}


@pytest.fixture
def hub(weights_dir: Path) -> Iterator[HubServer]:
    """Give a hub with a repository of the twin and one of a LoRA of 100 kB."""
    server = HubServer(
        {
            MODEL_REPO: Repository({**OTHER_FILES, **files_of(weights_dir / MODEL)}),
            LORA_REPO: Repository({"README.md": b"", "v1/steps-4.safetensors": make_lora(100_000)}),
        }
    )
    yield server
    server.close()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client of this process use the network, and write what arrives in small pieces."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name != "HF_HUB_VERBOSITY" else "error")  # put back after the test
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16_384)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Give variables for an empty weights folder, and a registry where one model and its LoRA have a source."""
    entries: list[dict[str, Any]] = yaml.safe_load((REPOSITORY / "config" / "models.yaml").read_text())
    for entry in entries:
        entry.pop("loras", None)
        if entry["id"] == MODEL:
            entry["source"] = {"repo": MODEL_REPO, "revision": "main"}
            lora = {"repo": LORA_REPO, "revision": "main", "file": "v1/steps-4.safetensors"}
            entry["loras"] = [
                {"id": "steps-4", "name": "Four steps", "weights": LORA_FILE, "license": "none", "source": lora}
            ]
    registry = tmp_path / "models.yaml"
    registry.write_text(yaml.safe_dump(entries))
    return {
        "RESTAGE__MODELS__FILE": str(registry),
        "RESTAGE__MODELS__WEIGHTS_DIR": str(tmp_path / "weights"),
    }


@pytest.fixture
def settings(settings_for: Callable[..., Settings], environment: dict[str, str]) -> Settings:
    """Give settings of `environment`."""
    return settings_for(**environment)
