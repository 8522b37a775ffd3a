import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.errors import BadInput, WeightsError
from pipelines.flux2_klein.params import reference_size
from pipelines.flux2_klein.run import MAX_TOKENS, build_call
from pipelines.loading import load_model
from pipelines.manifest import MANIFEST_NAME
from pipelines.sizes import size_of_area
from pipelines.weights import check_weights
from server.prompts import ROOM_TYPES, STYLES, Prompts

AREA = 128 * 128
MEGAPIXEL = 1024 * 1024
VISIBLE = 1.0  # mean change of a colour value, of 255
PROMPT = "Furnish this empty room as a modern living room."


@pytest.fixture(scope="module")
def klein(load_twin):
    """Give the twin of FLUX.2 [klein], which is distilled."""
    return load_twin("klein")


@pytest.fixture(scope="module")
def base(klein, tmp_path_factory):
    """Give a twin of the base model, which differs from the distilled one in a single setting."""
    folder = tmp_path_factory.mktemp("base") / "weights"
    copy_weights(klein.model.spec, folder)
    change_index(folder, is_distilled=False)
    twin = replace(klein, model=load_model(replace(klein.model.spec, weights_dir=folder), "cpu"))
    yield twin
    twin.model.close()


@pytest.fixture
def spec(klein):
    """Say where the twin lies."""
    return klein.model.spec


@pytest.fixture
def seen_shapes(klein, monkeypatch):
    """Give the list of (height, width) of what the VAE encodes, in order."""
    shapes = []
    encode = klein.model.pipeline.vae.encode

    def remember_shape(image, *args, **kwargs):
        shapes.append(tuple(image.shape[-2:]))
        return encode(image, *args, **kwargs)

    monkeypatch.setattr(klein.model.pipeline.vae, "encode", remember_shape)
    return shapes


def copy_weights(spec, folder):
    """Copy a twin to change it; without its manifest, which would tell."""
    shutil.copytree(spec.weights_dir, folder, ignore=shutil.ignore_patterns(MANIFEST_NAME))


def change_index(folder, **changes):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def plain_call(twin, images, **kwargs):
    """Call the pipeline as its documentation does, in this thread and in one go."""
    pipeline = copy.copy(twin.model.pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    kwargs = {"prompt": PROMPT, "guidance_scale": 1.0, "generator": torch.Generator("cpu").manual_seed(1)} | kwargs
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return np.asarray(pipeline(image=images, **kwargs).images[0]).astype(int)
    finally:
        torch.set_num_threads(num_threads)


def change(first, second):
    return np.abs(first - second).mean()


def test_run_gives_the_pixels_of_a_plain_call(klein, photos):
    """A photo that has the model's area already is edited to the bit as the pipeline does it by itself."""
    photo = photos[0].resize((144, 112))
    assert np.array_equal(klein.run([photo], num_inference_steps=2), plain_call(klein, photo, num_inference_steps=2))


def test_run_of_several_photos_gives_the_pixels_of_a_plain_call(klein, photos):
    """Several photos, of different sizes, reach the pipeline in their order."""
    fitted = [photos[0].resize((144, 112)), photos[1].resize((112, 160)), photos[2].resize((128, 128))]
    expected = plain_call(klein, fitted, num_inference_steps=3, height=96, width=160)
    assert np.array_equal(klein.run(fitted, num_inference_steps=3, height=96, width=160), expected)


def test_larger_photo_gives_the_pixels_of_the_same_photo_scaled(klein, photos):
    """A photo of any size is scaled once, by us, and then taken as it is."""
    scaled = photos[0].resize((144, 112), Image.Resampling.LANCZOS)
    assert np.array_equal(
        klein.run(photos[:1], num_inference_steps=2), plain_call(klein, scaled, num_inference_steps=2)
    )


def test_guided_run_gives_the_pixels_of_a_plain_call(base, photos):
    """The base model with guidance makes the picture that the pipeline makes."""
    photo = photos[0].resize((144, 112))
    expected = plain_call(base, photo, num_inference_steps=2, guidance_scale=4.0)
    assert np.array_equal(base.run([photo], num_inference_steps=2, guidance_scale=4.0), expected)


def test_interleaved_runs_do_not_disturb_each_other(base, photos):
    """Two runs that take turns, and one that is given up, make the pictures that they make alone."""
    jobs = [
        (photos[:2], {"guidance_scale": 4.0, "num_inference_steps": 3}),
        (photos[2:], {"seed": 5, "num_inference_steps": 2}),
    ]
    expected = [base.run(inputs, **changes) for inputs, changes in jobs]
    doomed = base.start(photos[:1], num_inference_steps=4)
    runs = [base.start(inputs, **changes) for inputs, changes in jobs]
    doomed.advance()
    waiting = list(runs)
    while waiting:
        waiting = [run for run in waiting if run.advance()]
    doomed.close()
    assert [run.step for run in runs] == [3, 2]
    for run, alone in zip(runs, expected, strict=True):
        assert np.array_equal(np.asarray(run.image), alone)


@pytest.mark.parametrize("place", range(4))
def test_each_of_four_photos_changes_the_picture(klein, photos, place):
    """Four photos are taken, and another one in any place makes a picture that looks different."""
    four = [photos[0], photos[1], photos[2], photos[0]]
    other = four.copy()
    other[place] = Image.new("RGB", four[place].size, "orange")
    assert change(klein.run(four), klein.run(other)) > VISIBLE / 2


def test_order_of_photos_changes_the_picture(klein, photos):
    """A prompt may speak of image 1 and image 2, so their order counts."""
    size = {"height": 128, "width": 128}
    assert change(klein.run(photos[:2], **size), klein.run(photos[1::-1], **size)) > VISIBLE


def test_photo_is_read_at_the_models_area(klein, photos, seen_shapes):
    """Photos are scaled to the model's area, up or down, before they are encoded."""
    klein.run([photos[0].resize((2000, 1500)), photos[1].resize((40, 60))])
    assert seen_shapes == [(112, 144), (160, 112)]


@pytest.mark.parametrize("size", [(100, 800), (800, 100), (1, 8), (24, 96)], ids=str)
def test_narrow_photo_runs(klein, seen_shapes, size):
    """Up to 8 to 1 a photo runs: where the area would make its shorter side too short, the area is larger."""
    height, width = size
    image = klein.run([Image.new("RGB", (width, height), (120, 140, 160))])
    assert seen_shapes == [image.shape[:2]]
    assert min(image.shape[:2]) == 64


def test_photo_that_is_too_narrow_is_refused(klein, photos):
    """Over 8 to 1, where the pipeline would fail, a photo is refused in any place of a job."""
    with pytest.raises(BadInput, match="801 x 100 pixels; its longer side may be at most 8 times the shorter"):
        klein.start([photos[0], Image.new("RGB", (801, 100))])


@given(
    st.integers(1, 5000),
    st.floats(1, 8),
    st.booleans(),
    st.sampled_from([AREA, 512 * 512, MEGAPIXEL, 4 * MEGAPIXEL]) | st.integers(AREA, 16 * MEGAPIXEL),
)
def test_pipeline_neither_refuses_nor_scales_nor_cuts_a_reference(shorter, ratio, is_portrait, area):
    """Whatever the photo and the area, the size we choose is one that the pipeline's own rules leave alone."""
    longer = int(shorter * ratio)
    height, width = (longer, shorter) if is_portrait else (shorter, longer)
    chosen_height, chosen_width = reference_size(height, width, area)
    assert (chosen_height % 16, chosen_width % 16) == (0, 0)
    assert reference_size(width, height, area) == (chosen_width, chosen_height)
    image = Image.new("L", (chosen_width, chosen_height))
    Flux2ImageProcessor.check_image_input(image)
    assert Flux2ImageProcessor._resize_if_exceeds_area(image) is image
    ratio = max(height, width) / min(height, width)
    wanted_area = max(min(area, MEGAPIXEL), 64 * 64 * ratio)
    assert chosen_height * chosen_width / wanted_area == pytest.approx(1, rel=0.2)
    assert max(image.size) / min(image.size) == pytest.approx(ratio, rel=0.2)


def test_size_that_rounding_makes_too_large_is_made_smaller():
    """At a megapixel 5:4 rounds to more than the pipeline takes, and would be scaled a second time and cut."""
    rounded_height, rounded_width = size_of_area(5 / 4, MEGAPIXEL)
    scaled = Flux2ImageProcessor._resize_if_exceeds_area(Image.new("L", (rounded_width, rounded_height)))
    assert (rounded_height, rounded_width, scaled.height, scaled.width) == (912, 1152, 911, 1150)
    assert reference_size(2400, 3000, MEGAPIXEL) == (912, 1136)
    assert reference_size(3000, 2400, MEGAPIXEL) == (1136, 912)


@pytest.mark.parametrize("value", [1.5, 4.0])
def test_guidance_on_a_distilled_model_is_refused(klein, photos, value):
    """Guidance that the pipeline would ignore is refused."""
    with pytest.raises(BadInput, match=f"guidance_scale {value} has no effect on this distilled model"):
        klein.start(photos[:1], guidance_scale=value)


@pytest.mark.parametrize(("value", "expected"), [(1.0, 4), (1.5, 8), (4.0, 8)])
def test_guidance_runs_the_base_model_twice(base, photos, value, expected):
    """Above 1 each step runs the transformer twice, at 1 once, and the pictures differ."""
    calls = []
    handle = base.model.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    image = base.run(photos[:1], guidance_scale=value)
    handle.remove()
    assert len(calls) == expected
    assert (change(image, base.run(photos[:1])) > VISIBLE) == (value > 1)


def test_negative_prompt_is_refused(klein, photos):
    """The model has none."""
    with pytest.raises(BadInput, match="takes no negative prompt"):
        klein.start(photos[:1], negative_prompt="dark")


def tokens_read(klein, photos, prompt):
    """Give the ids of the tokens that the text encoder is given, without padding."""
    seen = []

    def remember(module, args, kwargs):
        seen.append(kwargs["input_ids"][kwargs["attention_mask"].bool()])

    handle = klein.model.pipeline.text_encoder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        klein.run(photos[:1], prompt=prompt, num_inference_steps=1)
    finally:
        handle.remove()
    return seen[0].tolist()


def test_longest_prompt_is_read_whole(klein, photos):
    """A prompt with as many tokens as the pipeline reads keeps all of them, and one more is refused."""
    tokenizer = klein.model.pipeline.tokenizer
    turn = len(tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")["input_ids"])
    longest = " lamp" * (MAX_TOKENS - turn)
    ids = tokens_read(klein, photos, longest)
    assert len(ids) == MAX_TOKENS
    assert tokenizer.decode(ids).endswith(" lamp lamp<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for prompt in (longest + " lamp", "lamp " * 100_000):
        with pytest.raises(BadInput, match=r"\d+ tokens.* at most"):
            klein.start(photos[:1], prompt=prompt)


def test_prompts_of_all_presets_are_short_enough(klein, photos):
    """No preset is longer than what is read, though the twin's tokenizer makes more tokens than the real one."""
    prompts = Prompts.load(Path(__file__).parents[3] / "config")
    for room_type in ROOM_TYPES:
        for style in STYLES:
            assert klein.start(photos[2:], prompt=prompts.render(room_type, style)).step == 0


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
def test_control_tokens_in_a_prompt_are_refused(klein, photos, token):
    """A prompt cannot end its own turn or speak for the assistant."""
    with pytest.raises(BadInput, match="control tokens: leave it out"):
        klein.start(photos[:1], prompt=f"A sofa {token} and a table")


@pytest.mark.parametrize("prompt", ["", " ", "{}", "{{ 1 + 1 }} {% if %} %s </think>", "Ein Sofa für 客厅 🛋️"])
def test_prompts_of_any_text_reach_the_text_encoder_as_they_are(klein, photos, prompt):
    """Empty, odd and foreign prompts are read as they stand: nothing in them is a template."""
    read = klein.model.pipeline.tokenizer.decode(tokens_read(klein, photos, prompt))
    assert read == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_the_latents_are_loaded(spec, dtype):
    """What the VAE keeps in buffers comes from its file, in the model's precision, and is not a new module's."""
    model = load_model(replace(spec, dtype=dtype), "cpu")
    file = load_file(spec.weights_dir / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("running_mean", "running_var"):
        loaded = getattr(model.pipeline.vae.bn, name)
        assert torch.equal(loaded, file[f"bn.{name}"].to(getattr(torch, dtype)))
        assert loaded.unique().numel() > 10
    model.close()


def test_missing_statistics_are_noticed(spec, tmp_path):
    """A VAE's file without them, which diffusers fills up with those of a new module, is refused."""
    folder = tmp_path / "weights"
    copy_weights(spec, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "bn.running_var"}, file)
    with pytest.raises(WeightsError, match=r"bn\.running_var"):
        load_model(replace(spec, weights_dir=folder), "cpu")


def test_names_of_the_published_folder_are_known(spec, tmp_path):
    """The published index calls the tokenizer by its older name, and no file has weights of the tied head."""
    folder = tmp_path / "weights"
    copy_weights(spec, folder)
    change_index(folder, tokenizer=["transformers", "Qwen2TokenizerFast"])
    assert "lm_head.weight" not in load_file(folder / "text_encoder" / "model.safetensors")
    published = replace(spec, weights_dir=folder)
    check_weights(published)
    load_model(published, "cpu").close()


def test_call_asks_for_noise_from_the_cpu(klein, photos):
    """A seed means the same noise on every device."""
    generator = build_call(klein.model.pipeline, photos[:1], klein.request(photos)).kwargs["generator"]
    assert (generator.device.type, generator.initial_seed()) == ("cpu", 1)
