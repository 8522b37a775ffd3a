import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from pipelines.checking import check_loadable
from pipelines.errors import WeightsError, WeightsMissing
from pipelines.loading import load_model
from pipelines.manifest import make_manifest, read_manifest, write_manifest
from pipelines.tiny.loras import FOLDER
from pipelines.verifying import verify
from pipelines.weights import LoraSpec, ModelSpec, check_weights

AREA = 128 * 128
HERE = Path()  # each test has a folder of its own
QWEN = ModelSpec(
    "tiny-qwen-image-edit-2511", "qwen_image_edit_plus", "QwenImageEditPlusPipeline", HERE, "float32", AREA
)
KONTEXT = ModelSpec("tiny-flux-kontext", "flux_kontext", "FluxKontextPipeline", HERE, "float32", AREA)
KLEIN = ModelSpec("tiny-flux2-klein", "flux2_klein", "Flux2KleinPipeline", HERE, "float32", AREA)
DENOISER_FILE = "transformer/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
ENCODER_FILE = "text_encoder/model.safetensors"
MANIFEST = "restage-manifest.json"
# Of the denoiser, of each kind of text encoder, and of each kind of VAE.
MODELS = [
    (QWEN, "transformer"),
    (QWEN, "text_encoder"),
    (QWEN, "vae"),
    (KONTEXT, "transformer"),
    (KONTEXT, "text_encoder"),
    (KONTEXT, "text_encoder_2"),
    (KONTEXT, "vae"),
    (KLEIN, "text_encoder"),
    (KLEIN, "vae"),
]


@pytest.fixture
def copy_of(weights_dir, tmp_path):
    """Give a function that copies a twin without its manifest, so that a test may damage it."""

    def copy(twin):
        folder = tmp_path / twin.id
        shutil.copytree(weights_dir / twin.id, folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        return replace(twin, weights_dir=folder)

    return copy


@pytest.fixture
def qwen_copy(copy_of):
    """Give a copy of Qwen's twin without its manifest."""
    return copy_of(QWEN)


def refusal(spec):
    """Say why a model is refused: one line that names it."""
    with pytest.raises(WeightsError) as refused:
        check_loadable(spec)
    line = str(refused.value)
    assert line.startswith(f"{spec.id}: ")
    assert "\n" not in line
    # The folders of tests are long: what is said beside them must be short.
    assert len(line.replace(str(spec.weights_dir), "/weights")) <= 300, line
    return line


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_index(spec, **changes):
    change_json(spec.weights_dir / "model_index.json", **changes)


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def cut(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes() + b"\0")


def cut_header(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:100])


def empty(folder):
    weights_file(folder).write_bytes(b"")


def break_header(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtype\xff', 1))


def contradict_header(folder):
    # As long as it should be, but with a tensor larger than its place.
    file = weights_file(folder)
    data = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    next(value for name, value in header.items() if name != "__metadata__")["shape"].append(2)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + header_bytes :])


def nest_header(folder):
    weights_file(folder).write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)


def leave_a_pointer(folder):
    weights_file(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40\n")


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_weights(folder):
    weights_file(folder).unlink()


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def make_config_a_list(folder):
    (folder / "config.json").write_text("[]")


def make_config_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def pickle(folder):
    file = weights_file(folder)
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def drop_a_tensor(folder):
    change_tensors(weights_file(folder), lambda tensors: tensors.pop(max(tensors)))


def add_a_tensor(folder):
    change_tensors(weights_file(folder), lambda tensors: tensors.update({"no.such.layer.weight": torch.zeros(2)}))


def widen_a_tensor(folder):
    def widen(tensors):
        key = max(tensors)
        tensors[key] = torch.cat([tensors[key]] * 2)

    change_tensors(weights_file(folder), widen)


@pytest.mark.parametrize(("twin", "name"), MODELS, ids=[f"{twin.family}-{name}" for twin, name in MODELS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes, its header says "),
        (break_header, "has a damaged safetensors header; fetch it again"),
        (contradict_header, "cannot be loaded: SafetensorError: "),
        (remove_folder, "has no config.json"),
        (remove_weights, "has neither .*model.safetensors nor .*index.json"),
        (pickle, "has only pytorch_model.bin, and pickled weights are never loaded"),
        (drop_a_tensor, r"do not belong together: missing tensors: [12], such as "),
        (add_a_tensor, "do not belong together: tensors without a place: 1, such as no.such.layer.weight"),
        (widen_a_tensor, "do not belong together: tensors of another shape: 1, such as "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_component_is_refused(copy_of, twin, name, damage, message):
    """Whichever component is cut, gone, pickled or not what its configuration says, it is named with what is wrong."""
    spec = copy_of(twin)
    damage(spec.weights_dir / name)
    line = refusal(spec)
    assert str(spec.weights_dir / name) in line
    with pytest.raises(WeightsError, match=message):
        raise WeightsError(line)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lengthen, "bytes, its header says "),
        (cut_header, "is no safetensors file, or its beginning is missing"),
        (empty, "is no safetensors file, or its beginning is missing"),
        (nest_header, "has a damaged safetensors header"),
        (leave_a_pointer, "is a Git LFS pointer; the weights themselves were not fetched"),
        (remove_config, "transformer has no config.json"),
        (make_config_a_folder, "transformer has no config.json"),
        (break_config, "transformer/config.json cannot be read: "),
        (make_config_a_list, "transformer/config.json is not a JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_file_is_refused(qwen_copy, damage, message):
    """Every way in which a file can be cut, empty or something else has its own words."""
    damage(qwen_copy.weights_dir / "transformer")
    assert message in refusal(qwen_copy)


@pytest.mark.parametrize(
    ("twin", "name", "changes", "message"),
    [
        (QWEN, "transformer", {"num_layers": 3}, "missing tensors: 32, such as transformer_blocks.2."),
        (QWEN, "transformer", {"num_layers": 1}, "tensors without a place: 32, such as transformer_blocks.1."),
        (QWEN, "transformer", {"joint_attention_dim": 64}, "such as txt_in.weight [32, 32], not [32, 64]"),
        (KONTEXT, "transformer", {"num_single_layers": 3}, "missing tensors: 14, such as single_transformer_blocks.2."),
        (KONTEXT, "transformer", {"num_layers": 1}, "tensors without a place: 32, such as transformer_blocks.1."),
        (KONTEXT, "text_encoder", {"num_hidden_layers": 3}, "missing tensors: 16, such as encoder.layers.2."),
        (
            KONTEXT,
            "text_encoder",
            {"intermediate_size": 48},
            "tensors of another shape: 6, such as encoder.layers.0.mlp.",
        ),
        (KONTEXT, "text_encoder_2", {"num_layers": 3}, "missing tensors: 9, such as encoder.block.2."),
        (KONTEXT, "text_encoder_2", {"num_layers": 1}, "tensors without a place: 9, such as encoder.block.1."),
        (KONTEXT, "vae", {"layers_per_block": 3}, "missing tensors: 128, such as decoder."),
        (KONTEXT, "vae", {"latent_channels": 8}, "tensors of another shape: 3, such as decoder.conv_in.weight"),
        (QWEN, "transformer", {"num_layers": "many"}, "cannot be loaded: TypeError: "),
        (QWEN, "transformer", {"num_layers": 10**9}, "says num_layers: 1000000000, and the weights are "),
        (QWEN, "text_encoder", {"transformers_weights": "x.bin"}, "none but the usual names are read"),
        (QWEN, "transformer", {"_class_name": "FluxTransformer2DModel"}, "is of FluxTransformer2DModel, and model"),
        (QWEN, "vae", {"_class_name": "AutoencoderKL"}, "vae/config.json is of AutoencoderKL, and model_index"),
        (KONTEXT, "text_encoder_2", {"architectures": ["UMT5EncoderModel"]}, "is of UMT5EncoderModel, and model"),
    ],
)
def test_configuration_that_its_weights_contradict_is_refused(copy_of, twin, name, changes, message):
    """More layers or fewer, other sizes, other classes: no parameter is left out or made up without a word."""
    spec = copy_of(twin)
    change_json(spec.weights_dir / name / "config.json", **changes)
    line = refusal(spec)
    assert message in line
    assert name in line


def test_more_layers_than_absurd_are_found_inside_too(qwen_copy):
    """A number of layers that would fill the memory is seen in the parts of a configuration as well."""
    file = qwen_copy.weights_dir / "text_encoder" / "config.json"
    change_json(file, vision_config=json.loads(file.read_text())["vision_config"] | {"depth": 10**9})
    assert "says depth: 1000000000, and the weights are " in refusal(qwen_copy)


@pytest.mark.parametrize(
    ("twin", "changes", "message"),
    [
        (
            QWEN,
            {"_class_name": "QwenImageEditPipeline"},
            "holds a QwenImageEditPipeline, the registry says QwenImageEdit",
        ),
        (QWEN, {"_class_name": ["a", "B"]}, "holds a ['a', 'B'], the registry says "),
        (QWEN, {"vae": ["my_vae", "MyVae"]}, "vae is of library my_vae; only diffusers and transformers are allowed"),
        (QWEN, {"vae": [None, "MyVae"]}, "'vae' is no component"),
        (QWEN, {"vae": [["diffusers"], "AutoencoderKL"]}, "'vae' is no component"),
        (QWEN, {"vae": ["diffusers", 5]}, "'vae' is no component"),
        (QWEN, {"../vae": ["diffusers", "AutoencoderKL"]}, "'../vae' is no component"),
        (QWEN, {"vae": [None, None]}, "model_index.json names no vae, which QwenImageEditPlusPipeline needs"),
        (QWEN, {"transformer": None}, "model_index.json names no transformer, which QwenImageEditPlusPipeline needs"),
        (QWEN, {"vae_2": ["diffusers", "AutoencoderKLQwenImage"]}, "vae_2 has no config.json"),
        (QWEN, {"transformer": ["diffusers", "NoSuchModel"]}, "has no model NoSuchModel, which model_index.json names"),
        (QWEN, {"transformer": ["diffusers", "load_image"]}, "has no model load_image, which model_index.json names"),
        (
            QWEN,
            {"transformer": ["diffusers", "FluxPipeline"]},
            "has no model FluxPipeline, which model_index.json names",
        ),
        (QWEN, {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "is of QwenImageTransformer2DModel, and"),
        (KONTEXT, {"text_encoder": ["transformers", "T5EncoderModel"]}, "is of CLIPTextModel, and model_index"),
        (
            QWEN,
            {"scheduler": ["diffusers", "PNDMScheduler"]},
            "is of FlowMatchEulerDiscreteScheduler, and model_index",
        ),
        (QWEN, {"scheduler": ["diffusers", "NoSuchScheduler"]}, "has no class NoSuchScheduler, which model_index.json"),
        (QWEN, {"tokenizer": ["transformers", "NoSuchTokenizer"]}, "has no class NoSuchTokenizer, which model_index"),
    ],
)
def test_index_that_its_folders_contradict_is_refused(copy_of, twin, changes, message):
    """The index names the registry's pipeline, all that it needs, and of each component the class that is there."""
    spec = copy_of(twin)
    change_index(spec, **changes)
    assert message in refusal(spec)


def test_component_that_the_pipeline_does_not_take_is_refused(qwen_copy):
    """A whole component more than the pipeline has is the sign of another pipeline."""
    shutil.copytree(qwen_copy.weights_dir / "vae", qwen_copy.weights_dir / "vae_2")
    change_index(qwen_copy, vae_2=["diffusers", "AutoencoderKLQwenImage"])
    assert "names a vae_2, which QwenImageEditPlusPipeline has not: it is another pipeline's" in refusal(qwen_copy)


def test_component_of_a_class_that_the_pipeline_does_not_take_is_refused(qwen_copy, weights_dir):
    """Index and configuration may agree with each other and still be of no use to the pipeline."""
    folder = qwen_copy.weights_dir / "transformer"
    shutil.rmtree(folder)
    shutil.copytree(weights_dir / KONTEXT.id / "transformer", folder)
    change_index(qwen_copy, transformer=["diffusers", "FluxTransformer2DModel"])
    line = refusal(qwen_copy)
    assert "transformer is a FluxTransformer2DModel, and QwenImageEditPlusPipeline takes a QwenImageTransformer" in line


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_broken_index_is_refused(qwen_copy, content):
    """Whatever stands in place of the index, it is told and nothing else is tried."""
    (qwen_copy.weights_dir / "model_index.json").write_text(content, encoding="latin-1")
    line = refusal(qwen_copy)
    assert "model_index.json cannot be read: " in line or "model_index.json is not a JSON object" in line


def test_missing_folder_is_told_apart(qwen_copy):
    """That a model's folder is not there is no damage: it has a class of its own, and no folder is made."""
    shutil.rmtree(qwen_copy.weights_dir)
    with pytest.raises(WeightsMissing, match=f"^{QWEN.id}: there is no folder {qwen_copy.weights_dir}"):
        check_loadable(qwen_copy)
    qwen_copy.weights_dir.mkdir()
    assert f"{qwen_copy.weights_dir / 'model_index.json'} is missing" in refusal(qwen_copy)
    qwen_copy.weights_dir.rmdir()
    qwen_copy.weights_dir.write_text("a file in its place")
    with pytest.raises(WeightsMissing):
        check_loadable(qwen_copy)


def test_unknown_dtype_and_pipeline_are_refused(qwen_copy):
    """A precision that no pipeline runs in, and a pipeline that diffusers has not, are told from the entry alone."""
    assert "the dtype int8 is unknown; allowed are bfloat16, float16" in refusal(replace(qwen_copy, dtype="int8"))
    for name in ("NoSuchPipeline", "QwenImageTransformer2DModel"):
        change_index(qwen_copy, _class_name=name)
        assert f"has no pipeline {name}" in refusal(replace(qwen_copy, pipeline=name))


def empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def cut_tokenizer(folder):
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])


def age_tokenizer(folder):
    # On which the tokenizers library raises no class of its own.
    change_json(folder / "tokenizer.json", version="9")


def forget_words(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change_json(folder / "tokenizer.json", model=model | {"vocab": {}, "merges": []})


def learn_words(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    words = {f"word{number}": len(model["vocab"]) + number for number in range(100)}
    change_json(folder / "tokenizer.json", model=model | {"vocab": model["vocab"] | words})


def remove_vocabulary(folder):
    (folder / "tokenizer.json").unlink()


def remove_tokenizer_config(folder):
    (folder / "tokenizer_config.json").unlink()


def list_tokenizer_config(folder):
    (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize("name", ["tokenizer", "processor"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_folder, " has no "),
        (remove_vocabulary, "has no tokenizer.json or "),
        (empty_tokenizer, "cannot be loaded: KeyError: "),
        (cut_tokenizer, "tokenizer.json cannot be read: "),
        (age_tokenizer, "cannot be loaded: Exception: Unknown tokenizer version '9'"),
        (list_tokenizer_config, ""),
        (forget_words, " tokens, and its text encoder knows "),
        (learn_words, " tokens, and its text encoder knows "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_tokenizer_is_refused(qwen_copy, name, damage, message):
    """A tokenizer that knows no words loads without an error; a token too many would take the device down."""
    damage(qwen_copy.weights_dir / name)
    line = refusal(qwen_copy)
    assert message in line
    assert str(qwen_copy.weights_dir / name) in line


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_second_tokenizer_is_compared_with_the_second_encoder(copy_of, name):
    """Where there are two text encoders, each tokenizer belongs to the one with its number."""
    spec = copy_of(KONTEXT)
    config = spec.weights_dir / name.replace("tokenizer", "text_encoder") / "config.json"
    num_rows = json.loads(config.read_text())["vocab_size"]
    change_json(config, vocab_size=3 * num_rows)

    def repeat(tensors):
        for key, tensor in tensors.items():
            if tensor.shape[0] == num_rows:
                tensors[key] = torch.cat([tensor] * 3)

    change_tensors(weights_file(config.parent), repeat)
    assert f"{name} has {num_rows} tokens, and its text encoder knows {3 * num_rows}" in refusal(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "scheduler has no scheduler_config.json"),
        ("{", "scheduler_config.json cannot be read: "),
        ("[]", "scheduler_config.json is not a JSON object"),
        ('{"_class_name": "PNDMScheduler"}', "scheduler_config.json is of PNDMScheduler, and model_index.json says"),
        ('{"num_train_timesteps": "many"}', "scheduler cannot be loaded: TypeError: "),
    ],
)
def test_damaged_scheduler_is_refused(qwen_copy, content, message):
    """A scheduler is gone, broken, another or configured so that it cannot be made."""
    file = qwen_copy.weights_dir / "scheduler" / "scheduler_config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    assert message in refusal(qwen_copy)


def test_processor_without_its_pictures_is_refused(qwen_copy):
    """The part of a processor that reads photos is looked for as well as its words."""
    file = qwen_copy.weights_dir / "processor" / "processor_config.json"
    file.write_text("{}")
    assert "processor cannot be loaded: OSError: " in refusal(qwen_copy)
    file.unlink()
    assert "processor has no preprocessor_config.json or processor_config.json" in refusal(qwen_copy)


def shard(spec, weights_dir, part="transformer", max_bytes=100_000):
    """Rewrite a component's weights as several files with an index, as the large models come."""
    folder = spec.weights_dir / part
    whole = weights_file(folder)
    shards, size_bytes = [{}], 0
    for key, tensor in load_file(whole).items():
        if size_bytes > max_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][key] = tensor
        size_bytes += tensor.nbytes
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{whole.stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    whole.unlink()
    index = folder / f"{whole.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_shards_and_their_index_must_agree(qwen_copy, weights_dir, part):
    """Whole shards are accepted; one that is gone, elsewhere, or lacks what the index places in it is named."""
    index, places = shard(qwen_copy, weights_dir, part)
    check_loadable(qwen_copy)
    names = sorted(set(places.values()))
    assert len(names) > 1

    for wrong, message in [
        ({}, "names no shards"),
        (dict.fromkeys(places, "../elsewhere.safetensors"), "'../elsewhere.safetensors', which is no file beside it"),
        (places | {min(places): 5}, "5 is missing, though the index names it"),
        (places | {"no.such.weight": names[0]}, "1 of its tensors are not where it says, such as no.such.weight"),
        (dict.fromkeys(places, names[0]), "of its tensors are not where it says, such as "),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        assert message in refusal(qwen_copy)

    index.write_text(json.dumps({"weight_map": places}))
    change_tensors(index.parent / names[0], lambda tensors: tensors.pop(min(tensors)))
    assert f"{index.name}: 1 of its tensors are not where it says" in refusal(qwen_copy)
    (index.parent / names[1]).unlink()
    assert f"{names[1]} is missing, though the index names it" in refusal(qwen_copy)


def test_index_beside_whole_weights_counts_where_the_library_prefers_it(qwen_copy):
    """Where an index lies beside the whole file, what is checked are the weights that the library would read."""
    file = qwen_copy.weights_dir / f"{DENOISER_FILE}.index.json"
    file.write_text(json.dumps({"weight_map": {"img_in.weight": "gone.safetensors"}}))
    assert "gone.safetensors is missing, though the index names it" in refusal(qwen_copy)
    file.unlink()
    (qwen_copy.weights_dir / f"{ENCODER_FILE}.index.json").write_text(file.name)
    assert "model.safetensors.index.json cannot be read" in refusal(qwen_copy)


def test_values_that_are_no_parameters_are_asked_for_too(copy_of):
    """The statistics with which FLUX.2's VAE scales latents are buffers: without them it would use its own."""
    spec = copy_of(KLEIN)
    change_tensors(spec.weights_dir / VAE_FILE, lambda tensors: tensors.pop("bn.running_mean"))
    assert "missing tensors: 1, such as bn.running_mean" in refusal(spec)


def test_names_of_older_versions_are_known(copy_of):
    """Published weights keep what their library has renamed, tied or given up: that is not taken for damage."""
    spec = copy_of(KONTEXT)
    attention = "encoder.mid_block.attentions.0"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for now, before in old.items():
            for kind in ("weight", "bias"):
                tensors[f"{attention}.{before}.{kind}"] = tensors.pop(f"{attention}.{now}.{kind}")

    change_tensors(spec.weights_dir / VAE_FILE, rename)
    change_json(spec.weights_dir / "vae" / "config.json", _diffusers_version="0.10.0")
    change_tensors(
        spec.weights_dir / ENCODER_FILE,
        lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    )
    change_tensors(
        spec.weights_dir / "text_encoder_2" / "model.safetensors",
        lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}),
    )
    check_loadable(spec)
    load_model(spec, "cpu").close()


def test_manifest_is_compared_first(qwen_copy):
    """With a manifest, what is missing, cut or too much is told by the manifest, and a fetch that goes on is too."""
    spec = qwen_copy
    write_manifest(spec.weights_dir, make_manifest(spec.weights_dir))
    check_loadable(spec)
    before = (spec.weights_dir / DENOISER_FILE).read_bytes()
    (spec.weights_dir / DENOISER_FILE).write_bytes(before[:-1])
    (spec.weights_dir / "tokenizer" / "tokenizer.json").unlink()
    shutil.copy(spec.weights_dir / VAE_FILE, spec.weights_dir / "vae" / "more.safetensors")
    line = refusal(spec)
    assert f"is not what its {MANIFEST} says: " in line
    for finding in (f"{DENOISER_FILE} has ", "tokenizer/tokenizer.json is missing", "vae/more.safetensors does not"):
        assert finding in line
    (spec.weights_dir / ".restage-fetching").mkdir()
    assert "is still being fetched, or that was cut off; `restage weights fetch` goes on" in refusal(spec)


def test_number_that_was_changed_is_left_to_verify(qwen_copy):
    """The check reads no numbers: a byte among them that was flipped passes it, and is what `verify` finds."""
    spec = qwen_copy
    write_manifest(spec.weights_dir, make_manifest(spec.weights_dir))
    file = spec.weights_dir / DENOISER_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    check_loadable(spec)
    manifest = read_manifest(spec.weights_dir)
    assert manifest is not None
    assert [(one.path, one.kind) for one in verify(spec.weights_dir, manifest)] == [(DENOISER_FILE, "altered")]


def test_check_writes_nothing(copy_of, capfd):
    """Neither a model that is whole nor one that is not draws bars, tables or warnings into the log."""
    spec = copy_of(KONTEXT)
    check_loadable(spec)
    change_json(spec.weights_dir / "text_encoder" / "config.json", num_hidden_layers=3)
    refusal(spec)
    assert capfd.readouterr() == ("", "")


def test_model_of_20_billion_parameters_takes_next_to_no_memory(qwen_copy):
    """The transformer of the real model, 41 GB in files that are all holes, is compared without being read."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=60, zero_cond_t=True)
    folder = qwen_copy.weights_dir / "transformer"
    shutil.rmtree(folder)
    model.save_config(folder)
    places, header, offset = {}, {}, 0
    for key, value in model.state_dict().items():
        name = f"part-{len(places) // 250}.safetensors"
        if name not in places.values():
            header[name], offset = {}, 0
        size_bytes = 2 * value.numel()
        header[name][key] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
        places[key] = name
    total_bytes = 0
    for name, tensors in header.items():
        encoded = json.dumps(tensors).encode()
        size_bytes = max(one["data_offsets"][1] for one in tensors.values())
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + size_bytes)
        total_bytes += size_bytes
    assert total_bytes > 40e9
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    process = psutil.Process()
    before_bytes = process.memory_info().rss
    check_loadable(replace(qwen_copy, dtype="bfloat16"))
    assert process.memory_info().rss - before_bytes < 1e9

    change_json(folder / "config.json", num_layers=61)
    assert "missing tensors: 32, such as transformer_blocks.60." in refusal(qwen_copy)


def test_lora_of_another_model_is_refused(qwen_copy, weights_dir):
    """The LoRAs of a model's entry are compared with it as well: one that does not fit keeps it from being served."""
    files = {lora: weights_dir / FOLDER / f"tiny-{lora}-style.safetensors" for lora in ("qwen", "kontext")}
    check_loadable(replace(qwen_copy, loras=(LoraSpec("style", files["qwen"]),)))
    assert "LoRA style: " in refusal(replace(qwen_copy, loras=(LoraSpec("style", files["kontext"]),)))


def test_quick_look_needs_no_engine(qwen_copy):
    """What `restage weights` asks for, files and headers, passes where only the classes do not fit."""
    change_json(qwen_copy.weights_dir / "transformer" / "config.json", num_layers=3)
    check_weights(qwen_copy)
    assert "missing tensors: 32" in refusal(qwen_copy)


def test_what_only_the_family_needs_is_missed(copy_of):
    """A tokenizer without its chat template loads, and each of the model's calls would fail: the folder is refused."""
    spec = copy_of(KLEIN)
    (spec.weights_dir / "tokenizer" / "chat_template.jinja").unlink()
    assert refusal(spec).endswith("the tokenizer has no chat template (tokenizer/chat_template.jinja); fetch it again")
