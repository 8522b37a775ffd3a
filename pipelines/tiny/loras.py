"""Tiny LoRAs for the twins, each in one of the formats in which real ones come."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines.manifest import make_manifest, manifest_path, write_manifest
from pipelines.tiny.spreading import HEAD_SIZE, NUM_HEADS

FOLDER = "tiny-loras"
RANK = 4
_WIDTH = NUM_HEADS * HEAD_SIZE  # of a transformer's tokens
_NUM_BLOCKS = 2
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def write_lora(name: str, folder: Path, *, anew: bool = False) -> Path:
    """Write a tiny LoRA to the same bytes each time; one that is there is left alone, unless it shall be made anew.

    Args:
        name: a key of `LORAS`.
        folder: of all weights.
        anew: whether one that is there is replaced.

    Returns:
        The file, `tiny-loras/<name>.safetensors` below the folder.
    """
    file = folder / FOLDER / f"{name}.safetensors"
    if file.exists() and not anew:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=file.parent) as unfinished:
        # Written beside and renamed, so that a file of that name is always complete, and has its manifest.
        written = Path(unfinished) / file.name
        save_file(LORAS[name](), written)
        written.chmod(0o644)
        write_manifest(written, make_manifest(written))
        manifest_path(written).rename(manifest_path(file))
        written.rename(file)
    return file


def make_lightning() -> dict[str, torch.Tensor]:
    """Make a LoRA of Qwen's twins as Qwen-Image-Lightning is published: down, up and alpha, in bfloat16, unprefixed."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer, num_inputs, num_outputs in _qwen_layers():
        down, up = _draw_pair(generator, num_inputs, num_outputs)
        tensors[f"{layer}.lora_down.weight"] = down.bfloat16()
        tensors[f"{layer}.lora_up.weight"] = up.bfloat16()
        # Half of the rank: whoever forgets alpha gets another picture.
        tensors[f"{layer}.alpha"] = torch.tensor(RANK / 2, dtype=torch.bfloat16)
    return tensors


def make_qwen_style() -> dict[str, torch.Tensor]:
    """Make a LoRA of Qwen's twins as diffusers and peft write it, on attention alone, as styles are trained."""
    layers = [layer for layer in _qwen_layers() if ".attn." in layer[0]]
    return _make_peft_format(layers, seed=1)


def make_kontext_style() -> dict[str, torch.Tensor]:
    """Make a LoRA of Kontext's twin as diffusers and peft write it."""
    blocks = [f"transformer_blocks.{block}.attn.{name}" for block in range(_NUM_BLOCKS) for name in _ATTENTION]
    single = [
        f"single_transformer_blocks.{block}.attn.{name}" for block in range(_NUM_BLOCKS) for name in _ATTENTION[:3]
    ]
    return _make_peft_format([(layer, _WIDTH, _WIDTH) for layer in (*blocks, *single)], seed=2)


def _make_peft_format(layers: list[tuple[str, int, int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer, num_inputs, num_outputs in layers:
        down, up = _draw_pair(generator, num_inputs, num_outputs)
        tensors[f"transformer.{layer}.lora_A.weight"] = down
        tensors[f"transformer.{layer}.lora_B.weight"] = up
    return tensors


def _qwen_layers() -> Iterator[tuple[str, int, int]]:
    """Name the layers that Qwen-Image-Lightning changes, with their numbers of inputs and outputs."""
    for block in range(_NUM_BLOCKS):
        for name in (*_ATTENTION, *_TEXT_ATTENTION):
            yield f"transformer_blocks.{block}.attn.{name}", _WIDTH, _WIDTH
        for stream in ("img", "txt"):
            yield f"transformer_blocks.{block}.{stream}_mlp.net.0.proj", _WIDTH, 4 * _WIDTH
            yield f"transformer_blocks.{block}.{stream}_mlp.net.2", 4 * _WIDTH, _WIDTH
            yield f"transformer_blocks.{block}.{stream}_mod.1", _WIDTH, 6 * _WIDTH


def _draw_pair(generator: torch.Generator, num_inputs: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Half as strong as the layer itself, so that the picture changes and does not turn to noise.
    down = torch.randn(RANK, num_inputs, generator=generator) / num_inputs**0.5
    up = torch.randn(num_outputs, RANK, generator=generator) / RANK**0.5 / 2
    return down, up


LORAS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "tiny-qwen-lightning": make_lightning,
    "tiny-qwen-style": make_qwen_style,
    "tiny-kontext-style": make_kontext_style,
}
# Twin → the LoRAs that its entry in config/models.yaml has.
LORAS_OF = {
    "tiny-qwen-image-edit-2511": ("tiny-qwen-lightning", "tiny-qwen-style"),
    "tiny-flux-kontext": ("tiny-kontext-style",),
}
