import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines.errors import WeightsError
from pipelines.loading import load_model
from pipelines.loras import check_lora_fits
from pipelines.running import LoraChoice
from pipelines.tiny import loras as tiny_loras
from pipelines.weights import LoraSpec, check_weights
from tests.integration.pipelines.lora_kit import LIGHTNING, STYLE, lora_specs, paint


def as_comfy_has_it(tensors):
    return {f"diffusion_model.{name}": value for name, value in tensors.items()}


def as_peft_has_it(tensors):
    """Alpha is half of the rank, which is a power of two: nothing is lost."""
    halves = {"lora_down": ("lora_A", 0.5), "lora_up": ("lora_B", 1.0)}
    return {
        f"transformer.{layer}.{halves[half][0]}.weight": value * halves[half][1]
        for name, value in tensors.items()
        if not name.endswith(".alpha")
        for layer, half, _ in [name.rsplit(".", 2)]
    }


@pytest.mark.parametrize("spell", [as_comfy_has_it, as_peft_has_it])
def test_other_formats_are_the_same_lora(qwen_with_loras, spec_with_loras, photos, spell):
    """The formats in which LoRAs are published give the same picture, to the bit."""
    lora = spec_with_loras.loras[0]
    save_file(spell(load_file(lora.file)), lora.file)
    model = load_model(replace(spec_with_loras, loras=(lora,)), "cpu")
    again = replace(qwen_with_loras, model=model)
    assert np.array_equal(paint(again, photos[:1], LIGHTNING), paint(qwen_with_loras, photos[:1], LIGHTNING))
    model.close()


def save_with_settings(file, **settings):
    """Write a LoRA with a configuration in its header, as diffusers' trainers do."""
    names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in load_file(file)}
    content = {"r": 4, "lora_alpha": 4, "target_modules": sorted(names), **settings}
    header = json.dumps({f"transformer.{name}": value for name, value in content.items()})
    save_file(load_file(file), file, {"lora_adapter_metadata": header})


def test_settings_of_a_file_are_followed(qwen_with_loras, spec_with_loras, photos):
    """Where the file itself says that it counts double, it does."""
    lora = spec_with_loras.loras[1]
    save_with_settings(lora.file, lora_alpha=8)
    model = load_model(replace(spec_with_loras, loras=(lora,)), "cpu")
    picture = paint(replace(qwen_with_loras, model=model), photos[:1], STYLE)
    assert np.array_equal(picture, paint(qwen_with_loras, photos[:1], (LoraChoice("style", 2.0),)))
    model.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "is no plain LoRA: it sets init_lora_weights to pissa"),
        ({"use_dora": True}, "is no plain LoRA: it sets use_dora to True"),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "is no plain LoRA: it sets megatron_config to {}"),
        ({"layer_replication": [[0, 2]]}, "is no plain LoRA: it sets layer_replication to"),
        ({"no_such_setting": 1}, "is no plain LoRA: it sets no_such_setting to 1"),
        ({"r": "four"}, "cannot be loaded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_reach_further_are_refused(spec_with_loras, settings, message):
    """A file whose own configuration would change the model, or import a module, is not loaded."""
    lora = spec_with_loras.loras[1]
    save_with_settings(lora.file, **settings)
    with pytest.raises(WeightsError, match=message):
        load_model(replace(spec_with_loras, loras=(lora,)), "cpu")


@pytest.mark.parametrize("header", ["{", "[1]", "[" * 100_000], ids=["cut", "list", "deep"])
def test_settings_that_are_none_are_refused(spec_with_loras, header):
    """What stands in a file's header in place of a configuration never reaches peft."""
    lora = spec_with_loras.loras[1]
    save_file(load_file(lora.file), lora.file, {"lora_adapter_metadata": header})
    with pytest.raises(WeightsError, match="LoRA style: ") as refused:
        load_model(replace(spec_with_loras, loras=(lora,)), "cpu")
    assert "\n" not in str(refused.value)


@pytest.fixture
def kontext_lora(weights_dir, tmp_path, load_twin):
    """Give a function that loads Kontext's twin with the given tensors as its LoRA `style`."""
    loaded = []

    def load(tensors):
        file = tmp_path / "style.safetensors"
        save_file(tensors, file)
        kontext = load_twin("kontext")
        model = load_model(replace(kontext.model.spec, loras=(LoraSpec("style", file),)), "cpu")
        loaded.append(model)
        return replace(kontext, model=model)

    yield load
    for model in loaded:
        model.close()


def test_alphas_of_flux_are_followed(kontext_lora, photos):
    """A LoRA of FLUX whose layers have an alpha of twice their rank counts double."""
    tensors = tiny_loras.make_kontext_style()
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    expected = paint(kontext_lora(tensors), photos[:1], (LoraChoice("style", 2.0),))
    doubled = kontext_lora({**tensors, **{f"{layer}.alpha": torch.tensor(8.0) for layer in layers}})
    assert np.array_equal(paint(doubled, photos[:1], STYLE), expected)


def test_layer_is_not_taken_for_another_with_the_same_end(kontext_lora, photos):
    """The last layer of FLUX is called like one in each of its blocks; a LoRA for one of them changes no other."""
    halves = {"A": torch.zeros(4, 32), "B": torch.zeros(64, 4)}
    twin = kontext_lora({f"transformer.proj_out.lora_{half}.weight": value for half, value in halves.items()})
    changed = [name for name, module in twin.model.pipeline.transformer.named_modules() if hasattr(module, "lora_A")]
    assert changed == ["proj_out"]
    assert np.array_equal(paint(twin, photos[:1], STYLE), paint(twin, photos[:1]))


def change_tensors(change):
    """Make damage out of a function from tensors to tensors."""

    def damage(file):
        save_file(change(load_file(file)), file)

    damage.__name__ = change.__name__
    return damage


def remove(file):
    file.unlink()


def make_a_folder(file):
    file.unlink()
    file.mkdir()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(file):
    file.write_bytes(file.read_bytes()[:50])


def pickle(file):
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, file)


def leave_a_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40\n")


@change_tensors
def hold_nothing(tensors):
    return {}


@change_tensors
def hold_a_whole_layer(tensors):
    return {"transformer.proj_out.weight": torch.zeros(64, 32)}


@change_tensors
def add_dora(tensors):
    return {**tensors, "transformer_blocks.0.attn.to_q.dora_scale": torch.ones(32)}


@change_tensors
def drop_one_half(tensors):
    return {name: value for name, value in tensors.items() if name != "transformer_blocks.0.attn.to_q.lora_up.weight"}


@change_tensors
def orphan_an_alpha(tensors):
    return {**tensors, "transformer_blocks.0.attn.to_x.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"LoRA light.4: there is no file .*; fetch it, or take the LoRA out of the model's entry"),
        (make_a_folder, "there is no file"),
        (empty, "is no safetensors file"),
        (cut, "bytes, its header says"),
        (cut_header, "is no safetensors file, or its beginning is missing"),
        (pickle, "is no safetensors file|has a damaged safetensors header"),
        (leave_a_pointer, "is a Git LFS pointer"),
        (hold_nothing, r"LoRA light.4: 0 of 0 tensors of .* are no part of a LoRA$"),
        (hold_a_whole_layer, r"1 of 1 tensors of .* are no part of a LoRA, such as transformer.proj_out.weight"),
        (add_dora, r"1 of 85 tensors of .* are no part of a LoRA, such as transformer_blocks.0.attn.to_q.dora_scale"),
        (drop_one_half, r"2 of 83 tensors of .*, such as transformer_blocks.0.attn.to_q.alpha"),
        (orphan_an_alpha, r"1 of 85 tensors of .*, such as transformer_blocks.0.attn.to_x.alpha"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_file_is_refused_before_loading(spec_with_loras, damage, message):
    """What is wrong with a LoRA's file is told in one line when the model's folder is looked over."""
    damage(spec_with_loras.loras[0].file)
    with pytest.raises(WeightsError, match=message) as refused:
        check_weights(spec_with_loras)
    assert str(refused.value).startswith("tiny-qwen-image-edit-2511: ")
    assert "tiny-qwen-lightning.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_file_that_is_not_its_manifests_is_refused(copied):
    """A LoRA of which the manifest says otherwise is not loaded, even if it would fit."""
    spec = replace(copied, loras=lora_specs(copied.weights_dir.parent, "qwen"))
    save_file(as_peft_has_it(load_file(spec.loras[0].file)), spec.loras[0].file)
    with pytest.raises(WeightsError, match=r"lightning.safetensors is not what its restage-manifest.json says"):
        load_model(spec, "cpu")


@change_tensors
def be_of_another_model(tensors):
    return tiny_loras.make_kontext_style()


@change_tensors
def have_no_prefix(tensors):
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


@change_tensors
def be_partly_of_another_model(tensors):
    return {name.replace("blocks.1", "blocks.7"): value for name, value in tensors.items()}


@change_tensors
def be_wider(tensors):
    return {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in tensors.items()}


@change_tensors
def be_narrower(tensors):
    return {name: value[:, :16].clone() if "lora_A" in name else value for name, value in tensors.items()}


@change_tensors
def differ_in_rank(tensors):
    return {
        name: value[:3].clone() if name.endswith("0.attn.to_q.lora_A.weight") else value
        for name, value in tensors.items()
    }


@change_tensors
def be_for_the_text_encoder_too(tensors):
    return {
        **tensors,
        **{name.replace("transformer.", "text_encoder.", 1): value.clone() for name, value in tensors.items()},
    }


@change_tensors
def adapt_a_norm(tensors):
    name = "transformer.transformer_blocks.0.attn.norm_q.lora_{}.weight"
    return {**tensors, name.format("A"): torch.zeros(4, 16), name.format("B"): torch.zeros(16, 4)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            be_of_another_model,
            r"12 of 28 weights of .* do not fit the model's transformer, such as transformer.single_",
        ),
        (have_no_prefix, r"32 of 32 weights of .* do not fit the model's transformer, such as transformer_blocks.0"),
        (be_partly_of_another_model, r"16 of 32 weights of .*, such as transformer.transformer_blocks.7"),
        (be_wider, r"16 of 32 weights .*lora_A.weight of shape \[4, 64\], where the layer has \[32, 32\]"),
        (be_narrower, r"16 of 32 weights .*lora_A.weight of shape \[4, 16\], where the layer has \[32, 32\]"),
        (differ_in_rank, r"2 of 32 weights .*of shape \[3, 32\], whose other half has \[32, 4\]"),
        (be_for_the_text_encoder_too, r"32 of 64 weights of .*, such as text_encoder.transformer_blocks"),
        (adapt_a_norm, r"2 of 34 weights of .*norm_q.lora_A.weight of shape \[4, 16\], where the layer has \[16\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lora_that_does_not_fit_is_refused(spec_with_loras, damage, message):
    """Whatever of a file has no place in the model, all of it or one weight, keeps the model from being served."""
    damage(spec_with_loras.loras[1].file)
    check_weights(spec_with_loras)
    with pytest.raises(WeightsError, match=f"tiny-qwen-image-edit-2511: LoRA style: {message}") as refused:
        load_model(spec_with_loras, "cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [be_wider, be_narrower], ids=["wider", "narrower"])
def test_lora_never_changes_the_shape_of_a_model(weights_dir, tmp_path, load_twin, change):
    """FLUX's loader would widen the model for a LoRA, or pad the LoRA; neither happens."""
    file = tmp_path / "style.safetensors"
    shutil.copyfile(weights_dir / tiny_loras.FOLDER / "tiny-kontext-style.safetensors", file)
    change(file)
    with pytest.raises(WeightsError, match=r"LoRA style: 14 of 28 weights .*where the layer has \[32, 32\]"):
        load_model(replace(load_twin("kontext").model.spec, loras=(LoraSpec("style", file),)), "cpu")


def test_library_that_loads_nothing_is_noticed(spec_with_loras, monkeypatch):
    """Were diffusers to leave a LoRA out that fits, the model would not be served as if it had it."""
    monkeypatch.setattr(QwenImageEditPlusPipeline, "load_lora_weights", lambda *_, **__: None)
    with pytest.raises(WeightsError, match=r"LoRA light.4: of .*, 56 of 56 weights were not loaded as they are"):
        load_model(spec_with_loras, "cpu")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"base_shft": 1.0}, r"scheduler.base_shft is unknown to FlowMatchEulerDiscreteScheduler; it has num_train_"),
        ({"_class_name": "x"}, "scheduler._class_name is unknown"),
        ({"base_shift": "1.1"}, r"scheduler.base_shift = '1.1': Input should be a valid number"),
        ({"base_shift": True}, "scheduler.base_shift = True: Input should be a valid number"),
        ({"max_shift": float("nan")}, "scheduler.max_shift = nan: Input should be a finite number"),
        (
            {"time_shift_type": "cubic"},
            "scheduler.time_shift_type = 'cubic': Input should be 'exponential' or 'linear'",
        ),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "no such scheduler: ValueError: Only one of"),
    ],
    ids=str,
)
def test_scheduler_that_does_not_exist_is_refused(spec_with_loras, scheduler, message):
    """A name that the scheduler has not, or a value that it cannot have, is told, where diffusers would be silent."""
    with pytest.raises(WeightsError, match=f"LoRA style: {message}"):
        load_model(replace(spec_with_loras, loras=(replace(spec_with_loras.loras[1], scheduler=scheduler),)), "cpu")


def test_pipeline_without_loras_is_told(spec_with_loras):
    """A pipeline class that cannot load LoRAs is named, with what to do."""
    with pytest.raises(WeightsError, match=r"QwenImageEditPlusPipeline takes no LoRAs; leave light.4 out of the model"):
        check_lora_fits(spec_with_loras, spec_with_loras.loras[0], SimpleNamespace(transformer=torch.nn.Identity()))


@pytest.mark.parametrize("name", tiny_loras.LORAS)
def test_tiny_loras_are_small_and_written_to_the_same_bytes(weights_dir, tmp_path, name):
    """A tiny LoRA has under 100 kB, is the same wherever it is made, and is not written over."""
    written = tiny_loras.write_lora(name, tmp_path)
    assert written.read_bytes() == (weights_dir / written.relative_to(tmp_path)).read_bytes()
    assert written.stat().st_size < 100_000
    assert sorted(path.name for path in written.parent.iterdir()) == [
        written.name,
        f"{written.name}.restage-manifest.json",
    ]
    written.write_bytes(b"mine")
    assert tiny_loras.write_lora(name, tmp_path) == written
    assert written.read_bytes() == b"mine"


def test_tiny_loras_come_in_the_formats_of_real_ones(weights_dir):
    """Lightning's twin has down, up and alpha in bfloat16 and no prefix; the others are as diffusers saves them."""
    folder = weights_dir / tiny_loras.FOLDER
    with safe_open(folder / "tiny-qwen-lightning.safetensors", "pt") as lightning:
        layer = "transformer_blocks.0.attn.to_q"
        assert {name for name in lightning.keys() if name.startswith(f"{layer}.")} == {  # noqa: SIM118 - no mapping
            f"{layer}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
        }
        assert lightning.get_tensor(f"{layer}.alpha").dtype == torch.bfloat16
    for name in ("tiny-qwen-style", "tiny-kontext-style"):
        assert all(
            tensor.startswith("transformer.") and tensor.endswith((".lora_A.weight", ".lora_B.weight"))
            for tensor in load_file(folder / f"{name}.safetensors")
        )
