import gc
import json
import shutil
import socket
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import OutOfMemory, WeightsError
from pipelines.loading import check_weights, load_model

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_model_is_loaded_whole(twin):
    """Every component is there, in the precision asked for, on the device, and ready to infer."""
    pipeline = twin.model.pipeline
    assert type(pipeline).__name__ == twin.model.spec.pipeline
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(models) == {"qwen": 3, "kontext": 4}[twin.name]
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
    check_weights(copied)
    again = load_model(copied, "cpu")
    whole = load_file(weights_dir / copied.id / TRANSFORMER)
    assert all(torch.equal(value, whole[key]) for key, value in again.pipeline.transformer.state_dict().items())
    again.close()
    shard = sorted((copied.weights_dir / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=f"{shard.name} is missing, though the index names it"):
        check_weights(copied)


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


def remove_folder(spec):
    shutil.rmtree(spec.weights_dir)


def remove_index(spec):
    (spec.weights_dir / "model_index.json").unlink()


def break_index(spec):
    (spec.weights_dir / "model_index.json").write_text("{")


def make_index_a_list(spec):
    (spec.weights_dir / "model_index.json").write_text("[]")


def name_another_class(spec):
    change_json(spec.weights_dir / "model_index.json", _class_name="QwenImageEditPipeline")


def name_code_of_the_folder(spec):
    change_json(spec.weights_dir / "model_index.json", vae=["my_vae", "MyVae"])


def remove_component(spec):
    shutil.rmtree(spec.weights_dir / "vae")


def remove_scheduler_config(spec):
    (spec.weights_dir / "scheduler" / "scheduler_config.json").unlink()


def remove_processor_config(spec):
    (spec.weights_dir / "processor" / "processor_config.json").unlink()


def remove_vocabulary(spec):
    (spec.weights_dir / "tokenizer" / "tokenizer.json").unlink()


def remove_processors_vocabulary(spec):
    (spec.weights_dir / "processor" / "tokenizer.json").unlink()


def break_model_config(spec):
    (spec.weights_dir / "transformer" / "config.json").write_text("[]")


def remove_weights(spec):
    (spec.weights_dir / TRANSFORMER).unlink()


def pickle_weights(spec):
    torch.save(load_file(spec.weights_dir / TEXT_ENCODER), spec.weights_dir / "text_encoder" / "pytorch_model.bin")
    (spec.weights_dir / TEXT_ENCODER).unlink()


def leave_a_pointer(spec):
    (spec.weights_dir / TRANSFORMER).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40\n")


def cut_weights(spec):
    file = spec.weights_dir / TRANSFORMER
    file.write_bytes(file.read_bytes()[:-1])


def lengthen_weights(spec):
    file = spec.weights_dir / TRANSFORMER
    file.write_bytes(file.read_bytes() + b"\0")


def cut_header(spec):
    file = spec.weights_dir / TRANSFORMER
    file.write_bytes(file.read_bytes()[:100])


def empty_weights(spec):
    (spec.weights_dir / TRANSFORMER).write_bytes(b"")


def break_header(spec):
    file = spec.weights_dir / TRANSFORMER
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtype\xff', 1))


def empty_shard_index(spec):
    (spec.weights_dir / TRANSFORMER).unlink()
    (spec.weights_dir / f"{TRANSFORMER}.index.json").write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_folder, "there is no folder .*tiny-qwen-image-edit-2511"),
        (remove_index, "model_index.json is missing"),
        (break_index, "model_index.json cannot be read: "),
        (make_index_a_list, "model_index.json is not a JSON object"),
        (name_another_class, "holds a QwenImageEditPipeline, the registry says QwenImageEditPlusPipeline"),
        (name_code_of_the_folder, "vae is of library my_vae; only diffusers and transformers are allowed"),
        (remove_component, "vae has no config.json"),
        (remove_scheduler_config, "scheduler has no scheduler_config.json"),
        (remove_processor_config, "processor has no preprocessor_config.json or processor_config.json"),
        (remove_vocabulary, "/tokenizer has no tokenizer.json or "),
        (remove_processors_vocabulary, "/processor has no tokenizer.json or "),
        (break_model_config, "transformer/config.json is not a JSON object"),
        (remove_weights, "transformer has neither diffusion_pytorch_model.safetensors nor .*index.json"),
        (pickle_weights, "has only pytorch_model.bin, and pickled weights are never loaded"),
        (leave_a_pointer, "is a Git LFS pointer"),
        (cut_weights, "bytes, its header says "),
        (lengthen_weights, "bytes, its header says "),
        (cut_header, "is no safetensors file, or its beginning is missing"),
        (empty_weights, "is no safetensors file"),
        (break_header, "has a damaged safetensors header"),
        (empty_shard_index, "names no shards"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folder_is_refused_before_loading(copied, damage, message):
    """What is missing or damaged in a folder is named in one line, with the model's id first."""
    damage(copied)
    with pytest.raises(WeightsError, match=message) as refused:
        check_weights(copied)
    assert str(refused.value).startswith("tiny-qwen-image-edit-2511: ")
    assert "\n" not in str(refused.value)
    with pytest.raises(WeightsError, match=message):
        load_model(copied, "cpu")


def test_unknown_dtype_is_refused(copied):
    """A precision that no pipeline runs in is refused with those that are allowed."""
    with pytest.raises(WeightsError, match="the dtype int8 is unknown; allowed are bfloat16, float16, float32"):
        check_weights(replace(copied, dtype="int8"))


def drop_tensor(file, key):
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})


def drop_from_transformer(folder):
    drop_tensor(folder / TRANSFORMER, "norm_out.linear.weight")


def drop_from_text_encoder(folder):
    drop_tensor(folder / TEXT_ENCODER, "model.norm.weight")


def ask_for_more_layers(folder):
    change_json(folder / "transformer" / "config.json", num_layers=3)


def ask_for_other_shapes(folder):
    change_json(folder / "transformer" / "config.json", joint_attention_dim=64)


def contradict_config(folder):
    file = folder / "text_encoder" / "config.json"
    text_config = json.loads(file.read_text())["text_config"]
    change_json(file, text_config=text_config | {"num_hidden_layers": 3})


def break_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def name_unknown_class(folder):
    change_json(folder / "model_index.json", transformer=["diffusers", "NoSuchTransformer"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_from_transformer, "transformer lack 1 parameters .* such as norm_out.linear.weight"),
        (drop_from_text_encoder, "text_encoder lack 1 parameters .* such as model.language_model.norm.weight"),
        (ask_for_more_layers, "transformer lack 32 parameters .* such as transformer_blocks.2"),
        (ask_for_other_shapes, "cannot be loaded: ValueError: .*expected shape"),
        (contradict_config, "cannot be loaded: .*num_hidden_layers"),
        (break_tokenizer, "cannot be loaded: "),
        (name_unknown_class, "cannot be loaded: .*NoSuchTransformer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_do_not_fit_together_are_refused(copied, damage, message):
    """No parameter is left out or filled with random numbers without a word."""
    damage(copied.weights_dir)
    check_weights(copied)
    with pytest.raises(WeightsError, match=message) as refused:
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
