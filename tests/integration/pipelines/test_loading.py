import gc
import json
import shutil
import socket
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines.errors import OutOfMemory, WeightsError
from pipelines.loading import load_model
from pipelines.weights import components, has_weights

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def test_model_is_loaded_whole(twin):
    """Every component is there, in the precision asked for, on the device, and ready to infer."""
    pipeline = twin.model.pipeline
    assert type(pipeline).__name__ == twin.model.spec.pipeline
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    index = json.loads((twin.model.spec.weights_dir / "model_index.json").read_text())
    assert len(models) == sum(has_weights(class_name) for _, class_name in components(index).values())
    for model in models:
        assert not model.training
        assert {(value.dtype, value.device.type) for value in model.parameters()} == {(torch.float32, "cpu")}


def test_precision_is_the_registrys(copied):
    """All components are loaded in the one dtype that the registry names."""
    loaded = load_model(replace(copied, dtype="bfloat16"), "cpu")
    models = [part for part in loaded.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {value.dtype for model in models for value in model.parameters()} == {torch.bfloat16}
    loaded.close()


def test_loading_reaches_for_no_network(copied, monkeypatch):
    """A model is loaded without a look-up or a connection, even where the libraries are not told to stay offline."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_model(copied, "cpu").close()


def test_progress_bars_are_off(copied, capfd):
    """Neither loading nor a run draws a bar into the log."""
    loaded = load_model(copied, "cpu")
    with loaded.pipeline.progress_bar(total=3) as bar:
        bar.update()
    loaded.close()
    assert "%|" not in "".join(capfd.readouterr())


def test_sharded_weights_are_loaded(copied, weights_dir):
    """Weights in several files with an index, as the large models come, are checked and loaded."""
    model = load_model(copied, "cpu")
    for name in ("transformer", "text_encoder"):
        folder = copied.weights_dir / name
        shutil.rmtree(folder)
        getattr(model.pipeline, name).save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    model.close()
    (copied.weights_dir / "restage-manifest.json").unlink()
    again = load_model(copied, "cpu")
    whole = load_file(weights_dir / copied.id / TRANSFORMER)
    assert all(torch.equal(value, whole[key]) for key, value in again.pipeline.transformer.state_dict().items())
    again.close()


def test_qwen_gets_the_positions_it_was_trained_with(qwen, photos):
    """The hidden states are exactly those of a direct call that says which tokens are image patches."""
    pipeline = qwen.model.pipeline
    inputs = pipeline.processor(
        text=["<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Furnish it.<|im_end|>\n"],
        images=[photos[0].resize((160, 128))],
        return_tensors="pt",
    )
    as_diffusers_calls = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    encoder = pipeline.text_encoder
    is_patch = (inputs["input_ids"] == encoder.config.image_token_id).int()
    assert is_patch.sum() > 1
    with torch.no_grad():
        fixed = encoder(**as_diffusers_calls, output_hidden_states=True).hidden_states[-1]
        direct = encoder(**as_diffusers_calls, mm_token_type_ids=is_patch, output_hidden_states=True).hidden_states[-1]
        text_positions = encoder(
            **as_diffusers_calls, mm_token_type_ids=torch.zeros_like(is_patch), output_hidden_states=True
        ).hidden_states[-1]
    assert torch.equal(fixed, direct)
    assert not torch.allclose(fixed, text_positions, rtol=0.05)


def test_text_alone_is_encoded_as_before(qwen):
    """Without a photo there is nothing to say about patches."""
    inputs = qwen.model.pipeline.tokenizer(["Furnish it."], return_tensors="pt")
    with torch.no_grad():
        assert qwen.model.pipeline.text_encoder(**inputs).logits.isfinite().all()


def test_closing_a_model_frees_it(copied):
    """After close nothing holds the weights."""
    loaded = load_model(copied, "cpu")
    transformer = weakref.ref(loaded.pipeline.transformer)
    text_encoder = weakref.ref(loaded.pipeline.text_encoder)
    loaded.close()
    gc.collect()
    assert transformer() is None
    assert text_encoder() is None


def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(copied, monkeypatch):
    """A load begins with the same check as the worker's start: nothing is read of a model that would not run."""

    def read(*args, **kwargs):
        raise AssertionError("the model was read")

    file = copied.weights_dir / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3}))
    (copied.weights_dir / "restage-manifest.json").unlink()
    monkeypatch.setattr("diffusers.QwenImageEditPlusPipeline.from_pretrained", read)
    with pytest.raises(WeightsError, match=r"missing tensors: 32, such as transformer_blocks\.2"):
        load_model(copied, "cpu")


def test_file_that_fails_during_the_load_is_a_matter_of_weights(copied, monkeypatch):
    """What a disk loses between the check and the load is told in one line, and not taken for a bug."""

    def read(*args, **kwargs):
        raise OSError(5, "Input/output error\nand more", "model.safetensors")

    monkeypatch.setattr("diffusers.QwenImageEditPlusPipeline.from_pretrained", read)
    with pytest.raises(WeightsError, match=r"cannot be loaded: OSError: .*Input/output error") as refused:
        load_model(copied, "cpu")
    assert "\n" not in str(refused.value)


def test_too_little_memory_is_told_apart_from_bad_weights(copied, monkeypatch):
    """A device that cannot hold the model is no fault of the weights."""

    def allocate(pipeline, device):
        torch.empty(10**16, dtype=torch.uint8)

    monkeypatch.setattr("diffusers.QwenImageEditPlusPipeline.to", allocate)
    with pytest.raises(OutOfMemory, match="too little memory to load the model on cpu"):
        load_model(copied, "cpu")


def test_other_trouble_with_the_device_is_not_hidden(copied):
    """A device that is not there is neither a matter of weights nor of memory."""
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        load_model(copied, "cuda:63")
