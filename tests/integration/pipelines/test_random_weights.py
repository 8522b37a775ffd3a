"""Models with random weights are those that loading makes, but for the numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.architectures import Architecture, architecture_of_folder, published_architecture
from pipelines.errors import OutOfMemory, WeightsError
from pipelines.loading import check_loadable, load_model
from pipelines.random_weights import TWIN_OF, build_with_random_weights, save_with_padded_tokenizers
from pipelines.weights import ModelSpec
from tests.integration.pipelines.conftest import TWINS, Twin

PUBLISHED = {
    "flux-kontext-dev": "FluxKontextPipeline",
    "flux2-klein-4b": "Flux2KleinPipeline",
    "qwen-image-edit-2511": "QwenImageEditPlusPipeline",
}


def tensors(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of all that a module holds, shared ones once."""
    return {
        name: (tuple(value.shape), value.dtype) for name, value in (*module.named_parameters(), *module.named_buffers())
    }


@pytest.mark.parametrize("name", ["kontext", "klein", "qwen", "qwen_original"])
def test_random_models_have_the_tensors_of_loaded_ones(load_twin: Callable[[str], Twin], name: str) -> None:
    """Every tensor has the shape and dtype that loading gives it, and tables that are computed have their numbers."""
    twin = load_twin(name)
    spec = replace(twin.model.spec, dtype="bfloat16")
    made = build_with_random_weights(spec, architecture_of_folder(spec.weights_dir), "cpu")
    loaded = load_model(spec, "cpu")
    for part, module in made.components.items():
        if isinstance(module, torch.nn.Module):
            expected = loaded.pipeline.components[part]
            assert tensors(module) == tensors(expected), part
            assert not module.training
            computed = {key for key, _ in module.named_buffers()} - module.state_dict().keys()
            for key in computed:
                assert torch.equal(module.get_buffer(key), expected.get_buffer(key)), (part, key)
    assert {**made.config, "_name_or_path": None} == {**loaded.pipeline.config, "_name_or_path": None}
    assert torch.get_default_dtype() == torch.float32
    loaded.close()


@pytest.mark.parametrize("model_id", list(PUBLISHED))
def test_published_architectures_can_be_made_with_a_twins_tokenizers(model_id: str) -> None:
    """At full size, on torch's meta device: the classes take what is completed, and no token is beyond an embedding."""
    architecture = published_architecture(model_id, None)
    assert architecture is not None
    pipeline = PUBLISHED[model_id]
    spec = ModelSpec(model_id, "", pipeline, Path("nowhere"), "bfloat16", 1024 * 1024)
    made = build_with_random_weights(spec, architecture, "meta")
    encoder = made.components["text_encoder"]
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in encoder.parameters())
    tokenizer = made.components["tokenizer"]
    assert len(tokenizer) <= encoder.get_input_embeddings().num_embeddings
    if "Qwen" in pipeline:
        assert encoder.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    if model_id == "flux-kontext-dev":
        assert made.components["vae"].config.scaling_factor == 0.3611


def test_a_saved_model_with_a_table_larger_than_its_tokenizer_can_be_loaded(weights_dir: Path, tmp_path: Path) -> None:
    """As at full size: what its check asks of a vocabulary is there, and a prompt has the tokens that it had."""
    model_id, family, pipeline = TWINS["qwen"]
    spec = ModelSpec(model_id, family, pipeline, weights_dir / model_id, "bfloat16", 128 * 128)
    components = dict(architecture_of_folder(spec.weights_dir).components)
    config = components["text_encoder"].config
    text = config["text_config"] | {"vocab_size": 30_000}
    components["text_encoder"] = replace(components["text_encoder"], config=config | {"text_config": text})
    made = build_with_random_weights(spec, Architecture(components), "cpu")
    assert made.components["text_encoder"].get_input_embeddings().num_embeddings == 30_000
    save_with_padded_tokenizers(made, tmp_path)
    check_loadable(replace(spec, weights_dir=tmp_path), "cpu")
    tokenizer = made.components["tokenizer"]
    prompt = "Furnish this empty room <|endoftext|>"
    assert type(tokenizer).from_pretrained(tmp_path / "tokenizer")(prompt).input_ids == tokenizer(prompt).input_ids


def test_a_class_without_a_twin_and_a_device_that_is_too_small_are_told(weights_dir: Path) -> None:
    """Both are errors that the check reports; the default dtype is as it was."""
    spec = ModelSpec("m", "", "LongCatImageEditPipeline", weights_dir / "m", "bfloat16", 128 * 128)
    with pytest.raises(WeightsError, match="m: tokenizers are known for FluxKontextPipeline"):
        build_with_random_weights(spec, Architecture({}), "cpu")
    model_id, _, pipeline = TWINS["kontext"]
    architecture = architecture_of_folder(weights_dir / model_id)
    component = architecture.components["transformer"]
    huge = replace(component, config=component.config | {"joint_attention_dim": 10**15})
    with pytest.raises(OutOfMemory, match="m: too little memory to make the model on cpu"):
        build_with_random_weights(replace(spec, pipeline=pipeline), Architecture({"transformer": huge}), "cpu")
    assert torch.get_default_dtype() == torch.float32
    assert pipeline in TWIN_OF
