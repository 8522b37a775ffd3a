"""The tiny twins, loaded once for all tests of a pytest worker."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from pipelines.loading import LoadedModel, ModelSpec
    from pipelines.running import Run, RunRequest

AREA = 128 * 128
TWINS = {
    "qwen": ("tiny-qwen-image-edit-2511", "qwen_image_edit_plus", "QwenImageEditPlusPipeline"),
    "kontext": ("tiny-flux-kontext", "flux_kontext", "FluxKontextPipeline"),
}


@dataclass
class Twin:
    """A loaded twin with short ways to ask it for a picture; one thread computes, so that results can be compared."""

    name: str
    model: "LoadedModel"
    params_model: type

    def request(self, photos: list[Image.Image], **changes: Any) -> "RunRequest":
        """Resolve a request for the photos; `prompt`, `negative_prompt` and any parameter may be given."""
        from pipelines.running import RunRequest

        prompt = changes.pop("prompt", "Furnish this empty room as a modern living room.")
        negative_prompt = changes.pop("negative_prompt", None)
        params = self.params_model(**{"num_inference_steps": 4, "seed": 1} | changes)
        return RunRequest(prompt, negative_prompt, params.resolved(photos[0].height, photos[0].width, AREA, 0), AREA)

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

        from pipelines.flux_kontext import run as flux_kontext
        from pipelines.qwen_image_edit_plus import run as qwen_image_edit_plus

        families = {"qwen": qwen_image_edit_plus, "kontext": flux_kontext}
        pipeline = copy.copy(self.model.pipeline)
        pipeline.scheduler = copy.deepcopy(self.model.pipeline.scheduler)
        prepared = families[self.name].build_call(pipeline, photos, self.request(photos, **changes))
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with prepared.first_advance():
                return np.asarray(pipeline(**prepared.kwargs).images[0]).astype(int)
        finally:
            torch.set_num_threads(num_threads)


def twin_spec(weights_dir: Path, name: str) -> "ModelSpec":
    from pipelines.loading import ModelSpec

    model_id, family, pipeline = TWINS[name]
    return ModelSpec(model_id, family, pipeline, weights_dir / model_id, "float32", AREA)


def _load_twin(weights_dir: Path, name: str) -> Twin:
    from pipelines.flux_kontext.params import Params as KontextParams
    from pipelines.loading import load_model
    from pipelines.qwen_image_edit_plus.params import Params as QwenParams

    params_model = {"qwen": QwenParams, "kontext": KontextParams}[name]
    return Twin(name, load_model(twin_spec(weights_dir, name), "cpu"), params_model)


@pytest.fixture(scope="session")
def qwen(weights_dir: Path) -> Iterator[Twin]:
    """Give the twin of Qwen-Image-Edit 2511."""
    twin = _load_twin(weights_dir, "qwen")
    yield twin
    twin.model.close()


@pytest.fixture(scope="session")
def kontext(weights_dir: Path) -> Iterator[Twin]:
    """Give the twin of FLUX.1 Kontext."""
    twin = _load_twin(weights_dir, "kontext")
    yield twin
    twin.model.close()


@pytest.fixture(params=list(TWINS))
def twin(request: pytest.FixtureRequest) -> Twin:
    """Give each twin in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def copied(weights_dir: Path, tmp_path: Path) -> "ModelSpec":
    """Give what is needed to load a copy of Qwen's twin, which a test may damage."""
    folder = tmp_path / "weights"
    shutil.copytree(weights_dir, folder)
    return twin_spec(folder, "qwen")


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Give three different photos: landscape, portrait and square."""
    chance = np.random.default_rng(0)
    patches = [Image.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(3)]
    sizes = [(640, 480), (300, 450), (256, 256)]
    return [patch.resize(size, Image.Resampling.BICUBIC) for patch, size in zip(patches, sizes, strict=True)]
