"""The entries of the Qwen-Image-Edit models, and the parameters of their two families."""

from pathlib import Path

import pytest

from pipelines.qwen_image_edit.params import Params as OriginalParams
from pipelines.qwen_image_edit_plus.params import Params as PlusParams
from server.model_entry import InvalidParams
from server.registry import Registry, load_registry
from server.settings import load_settings

CONFIG_DIR = Path(__file__).parents[2] / "config"
MODELS = ("qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511")


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Serve every Qwen-Image-Edit model and its twin."""
    ids = [*MODELS, *(f"tiny-{model}" for model in MODELS)]
    return load_registry(
        load_settings(
            CONFIG_DIR,
            {
                "RESTAGE_ENV": "local",
                "RESTAGE__MODELS__ENABLED": f"[{', '.join(ids)}]",
                "RESTAGE__STORE__ACCESS_KEY": "a",
                "RESTAGE__STORE__SECRET_KEY": "s",
            },
        )
    )


def test_models_are_run_as_they_were_published(registry: Registry) -> None:
    """Each version has the class, the defaults and the number of photos that its page gives."""
    found = {}
    for model in MODELS:
        entry = registry.get(model)
        assert entry.source is not None
        assert (entry.license, entry.area) == ("apache-2.0", 1024 * 1024)
        found[entry.source.repo] = (entry.pipeline, entry.resolve_params({}), entry.max_input_images)

    plus = ("QwenImageEditPlusPipeline", PlusParams(num_inference_steps=40, true_cfg_scale=4.0), 3)
    assert found == {
        "Qwen/Qwen-Image-Edit": (
            "QwenImageEditPipeline",
            OriginalParams(num_inference_steps=50, true_cfg_scale=4.0),
            1,
        ),
        "Qwen/Qwen-Image-Edit-2509": plus,
        "Qwen/Qwen-Image-Edit-2511": plus,
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_twin_runs_the_code_of_its_model(registry: Registry, model: str) -> None:
    """A twin that ran other code than its model would prove nothing."""
    entry, twin = registry.get(model), registry.get(f"tiny-{model}")

    assert (twin.family, twin.pipeline) == (entry.family, entry.pipeline)
    assert (twin.max_input_images, twin.has_negative_prompt) == (entry.max_input_images, True)


@pytest.mark.parametrize("model", MODELS)
def test_impossible_parameters_are_refused(registry: Registry, model: str) -> None:
    """One step divides by zero, and guidance below 1 is none: both are refused before a worker sees them."""
    with pytest.raises(InvalidParams) as caught:
        registry.get(model).resolve_params({"num_inference_steps": 1, "true_cfg_scale": 0.5, "guidance_scale": 3})
    assert {error.location for error in caught.value.errors} == {
        "/num_inference_steps",
        "/true_cfg_scale",
        "/guidance_scale",
    }


@pytest.mark.parametrize("params_model", [OriginalParams, PlusParams], ids=["original", "plus"])
def test_negative_prompt_needs_guidance(params_model: type[OriginalParams | PlusParams]) -> None:
    """Only with guidance is a negative prompt seen by the model, which is what decides whether one is accepted."""
    assert params_model().uses_negative_prompt
    assert not params_model(true_cfg_scale=1.0).uses_negative_prompt
