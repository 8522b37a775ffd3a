"""Tiny twins: the real pipeline classes with small random weights, so that every path can run on any machine.

A twin makes no sensible picture, but it depends on the prompt, the photo, the seed, the steps and the guidance as the
real model does, and it is made in about a second, without a download, to the same bytes each time.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily

from pipelines import twin_stamp
from pipelines.manifest import make_manifest, write_manifest
from pipelines.tiny.flux import build_flux_kontext
from pipelines.tiny.flux2 import build_flux2_klein
from pipelines.tiny.longcat import build_longcat_image_edit
from pipelines.tiny.loras import LORAS_OF, write_lora
from pipelines.tiny.pix2pix import build_instruct_pix2pix
from pipelines.tiny.qwen import build_qwen_image_edit, build_qwen_image_edit_2509, build_qwen_image_edit_plus

__all__ = ["TWINS", "make_tiny_weights"]

TWINS: dict[str, Callable[[], DiffusionPipeline]] = {
    "tiny-qwen-image-edit-2511": build_qwen_image_edit_plus,
    "tiny-flux-kontext": build_flux_kontext,
    "tiny-flux2-klein": build_flux2_klein,
    "tiny-qwen-image-edit": build_qwen_image_edit,
    "tiny-qwen-image-edit-2509": build_qwen_image_edit_2509,
    "tiny-instruct-pix2pix": build_instruct_pix2pix,
    "tiny-longcat-image-edit": build_longcat_image_edit,
}


def make_tiny_weights(out: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write the weights of tiny twins and of their LoRAs, where they are missing or were made by another version.

    Args:
        out: folder of all weights; created if needed.
        names: keys of `TWINS`; all of them when left out.

    Returns:
        One folder for each name, in the layout that `from_pretrained` reads.

    Raises:
        ValueError: a name is not in `TWINS`.
    """
    wanted = list(TWINS) if names is None else list(names)
    unknown = sorted(set(wanted) - set(TWINS))
    if unknown:
        raise ValueError(f"no tiny twin is called {', '.join(unknown)}; there are {', '.join(TWINS)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        # Somebody else's folder of that name is left as it is.
        is_outdated = (out / name / "model_index.json").exists() and not twin_stamp.is_current(out / name)
        if is_outdated or not (out / name).exists():
            _write_twin(TWINS[name], out / name)
        for lora in LORAS_OF.get(name, ()):
            write_lora(lora, out, anew=is_outdated)
    return [out / name for name in wanted]


def _write_twin(build: Callable[[], DiffusionPipeline], folder: Path) -> None:
    # Written beside and renamed, so that a folder of that name is always complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build().save_pretrained(unfinished)
        write_manifest(unfinished, make_manifest(unfinished))
        twin_stamp.set_stamp(unfinished)
        unfinished.chmod(0o755)
        if folder.exists():
            # Out of the way first: a folder that holds something cannot be replaced in one go.
            folder.rename(unfinished.with_name(f"{unfinished.name}-old"))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished.with_name(f"{unfinished.name}-old"), ignore_errors=True)
        shutil.rmtree(unfinished, ignore_errors=True)
