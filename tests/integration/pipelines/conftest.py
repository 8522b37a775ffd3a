"""The tiny twins, loaded once for all tests of a pytest worker."""

import copy
import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from pipelines.loading import LoadedModel, ModelSpec
    from pipelines.running import Run, RunRequest
    from pipelines.sizes import SizeParams

AREA = 128 * 128
# What every test of `twin` runs with: a short name → the twin's weights, its family, its pipeline.
TWINS = {
    "qwen": ("tiny-qwen-image-edit-2511", "qwen_image_edit_plus", "QwenImageEditPlusPipeline"),
    "kontext": ("tiny-flux-kontext", "flux_kontext", "FluxKontextPipeline"),
    "qwen_2509": ("tiny-qwen-image-edit-2509", "qwen_image_edit_plus", "QwenImageEditPlusPipeline"),
    "qwen_original": ("tiny-qwen-image-edit", "qwen_image_edit", "QwenImageEditPipeline"),
    "klein": ("tiny-flux2-klein", "flux2_klein", "Flux2KleinPipeline"),
}
# Those of the generic family, with what their entries allow; they do less than every test of `twin` asks for.
GENERIC_TWINS = {
    "pix2pix": ("tiny-instruct-pix2pix", "generic", "StableDiffusionInstructPix2PixPipeline"),
    "longcat": ("tiny-longcat-image-edit", "generic", "LongCatImageEditPipeline"),
    "generic_klein": ("tiny-flux2-klein", "generic", "Flux2KleinPipeline"),
}
ALLOWED = {
    "pix2pix": ("guidance_scale", "image_guidance_scale", "negative_prompt", "eta"),
    "longcat": ("guidance_scale", "negative_prompt"),
    "generic_klein": ("guidance_scale",),
}
# What a twin runs with where it is not its family's default.
DEFAULTS = {"klein": {"guidance_scale": 1.0}}


@dataclass
class Twin:
    """A loaded twin with short ways to ask it for a picture; one thread computes, so that results can be compared."""

    name: str
    model: "LoadedModel"
    params_model: type["SizeParams"]

    def takes(self, parameter: str) -> bool:
        """Tell whether its family has a parameter."""
        return parameter in self.params_model.model_fields

    def request(self, photos: list[Image.Image], **changes: Any) -> "RunRequest":
        """Resolve a request for the photos; `prompt`, `negative_prompt` and any parameter may be given."""
        from pipelines.running import RunRequest

        prompt = changes.pop("prompt", "Furnish this empty room as a modern living room.")
        negative_prompt = changes.pop("negative_prompt", None)
        values: dict[str, Any] = {"num_inference_steps": 4, "seed": 1} | DEFAULTS.get(self.name, {}) | changes
        params = self.params_model(**values)
        return RunRequest(prompt, negative_prompt, params.resolved(photos[0].height, photos[0].width, AREA, 0), AREA)

    def staged(self, photos: list[Image.Image], **changes: Any) -> list[Image.Image]:
        """Give the photos as a worker's run has them: only the pictures that their family says it will read."""
        from pipelines.photos import StagedPhoto

        params = self.request(photos, **changes).params
        staged: list[Image.Image] = []
        for place, photo in enumerate(photos):
            height, width = photo.height, photo.width
            sizes = self.params_model.reading_sizes(height, width, AREA, params, is_first=place == 0)
            pictures = {(high, wide): photo.resize((wide, high), Image.Resampling.LANCZOS) for high, wide in sizes}
            staged.append(StagedPhoto(height, width, pictures))
        return staged

    def start(self, photos: list[Image.Image], **changes: Any) -> "Run":
        """Start a run that has not been advanced."""
        return self.model.start(photos, self.request(photos, **changes), num_threads=1)

    def run(self, photos: list[Image.Image], **changes: Any) -> np.ndarray:
        """Make a picture through a run: height x width x 3, integers from 0 to 255."""
        run = self.start(photos, **changes)
        while run.advance():
            pass
        return self.pixels(run)

    @staticmethod
    def pixels(run: "Run") -> np.ndarray:
        """Give the finished picture of a run: height x width x 3, integers from 0 to 255."""
        assert run.image is not None
        assert run.image.mode == "RGB"
        return np.asarray(run.image).astype(int)

    def call(self, photos: list[Image.Image], **changes: Any) -> np.ndarray:
        """Make a picture by calling the diffusers pipeline itself, in this thread and in one go."""
        import torch

        family = importlib.import_module(f"pipelines.{self.model.spec.family}.run")
        pipeline = copy.copy(self.model.pipeline)
        pipeline.scheduler = copy.deepcopy(self.model.pipeline.scheduler)
        prepared = family.build_call(pipeline, photos, self.request(photos, **changes))
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with prepared.first_advance():
                return np.asarray(pipeline(**prepared.kwargs).images[0]).astype(int)
        finally:
            torch.set_num_threads(num_threads)


def twin_spec(weights_dir: Path, name: str) -> "ModelSpec":
    from pipelines.loading import ModelSpec

    model_id, family, pipeline = (TWINS | GENERIC_TWINS)[name]
    return ModelSpec(model_id, family, pipeline, weights_dir / model_id, "float32", AREA)


@pytest.fixture(scope="session")
def load_twin(weights_dir: Path) -> Iterator[Callable[[str], Twin]]:
    """Give a function that loads a twin by its short name; one that was loaded before is given again."""
    from pipelines.loading import load_model

    loaded: dict[str, Twin] = {}

    def load(name: str) -> Twin:
        if name not in loaded:
            spec = twin_spec(weights_dir, name)
            family = importlib.import_module(f"pipelines.{spec.family}.params")
            params_model = family.params_of(spec.pipeline, ALLOWED[name]) if name in ALLOWED else family.Params
            loaded[name] = Twin(name, load_model(spec, "cpu"), params_model)
        return loaded[name]

    yield load
    for twin in loaded.values():
        twin.model.close()


@pytest.fixture(scope="session")
def qwen(load_twin: Callable[[str], Twin]) -> Twin:
    """Give the twin of Qwen-Image-Edit 2511."""
    return load_twin("qwen")


@pytest.fixture(scope="session")
def kontext(load_twin: Callable[[str], Twin]) -> Twin:
    """Give the twin of FLUX.1 Kontext."""
    return load_twin("kontext")


@pytest.fixture(params=list(TWINS))
def twin(request: pytest.FixtureRequest, load_twin: Callable[[str], Twin]) -> Twin:
    """Give each twin in turn."""
    return load_twin(request.param)


@pytest.fixture
def copied(weights_dir: Path, tmp_path: Path) -> "ModelSpec":
    """Give what is needed to load a copy of Qwen's twin, which a test may damage."""
    folder = tmp_path / "weights"
    shutil.copytree(weights_dir, folder)
    return twin_spec(folder, "qwen")


@pytest.fixture
def spec_with_loras(copied: "ModelSpec") -> "ModelSpec":
    """Give what is needed to load a copy of Qwen's twin with its LoRAs, whose files a test may damage."""
    from pipelines.manifest import manifest_path
    from tests.integration.pipelines.lora_kit import lora_specs

    loras = lora_specs(copied.weights_dir.parent, "qwen")
    for lora in loras:
        manifest_path(lora.file).unlink()
    return replace(copied, loras=loras)


@pytest.fixture(scope="session")
def qwen_with_loras(weights_dir: Path, load_twin: Callable[[str], Twin]) -> Iterator[Twin]:
    """Give Qwen's twin, loaded with its LoRAs."""
    from pipelines.loading import load_model
    from tests.integration.pipelines.lora_kit import lora_specs

    plain = load_twin("qwen")
    model = load_model(replace(plain.model.spec, loras=lora_specs(weights_dir, "qwen")), "cpu")
    yield replace(plain, model=model)
    model.close()


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Give three different photos: landscape, portrait and square."""
    chance = np.random.default_rng(0)
    patches = [Image.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(3)]
    sizes = [(640, 480), (300, 450), (256, 256)]
    return [patch.resize(size, Image.Resampling.BICUBIC) for patch, size in zip(patches, sizes, strict=True)]
