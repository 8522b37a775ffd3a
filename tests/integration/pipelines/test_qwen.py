"""What is particular to the Qwen-Image-Edit models: each trap of their pipelines has a test."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from pipelines.errors import BadInput
from pipelines.photos import decode_photo
from pipelines.sizes import MAX_PHOTO_RATIO, MIN_AREA

VISIBLE = 1.0  # mean change of a colour value, of 255
MEGAPIXEL = 1024 * 1024


@pytest.fixture(params=["qwen", "qwen_2509", "qwen_original"])
def any_qwen(request, load_twin):
    """Give the twin of each Qwen-Image-Edit model in turn."""
    return load_twin(request.param)


@pytest.fixture(params=["qwen", "qwen_original"])
def each_pipeline(request, load_twin):
    """Give one twin of each of the two pipelines in turn."""
    return load_twin(request.param)


@pytest.fixture
def original(load_twin):
    """Give the twin of the original Qwen-Image-Edit."""
    return load_twin("qwen_original")


@pytest.fixture
def what_is_seen(monkeypatch):
    """Give a function that starts a run and lists (height, width) of photos: as the VAE, and as the encoder sees them.

    The encoder's are counted in patches, once for each of its calls.
    """

    def watch(twin, photos, area):
        vae_sizes, encoder_sizes = [], []
        pipeline = twin.model.pipeline
        encode = pipeline.vae.encode

        def encode_and_remember(image, *args, **kwargs):
            vae_sizes.append(tuple(image.shape[-2:]))
            return encode(image, *args, **kwargs)

        def remember_patches(module, args, kwargs):
            encoder_sizes.append([tuple(grid[1:].tolist()) for grid in kwargs["image_grid_thw"]])

        monkeypatch.setattr(pipeline.vae, "encode", encode_and_remember)
        handle = pipeline.text_encoder.register_forward_pre_hook(remember_patches, with_kwargs=True)
        run = twin.model.start(photos, replace(twin.request(photos[:1]), area=area))
        try:
            run.advance()
        finally:
            run.close()
            handle.remove()
        return vae_sizes, encoder_sizes

    return watch


def change(twin, first, second):
    """Run twice and give the mean change of a colour value."""
    return np.abs(twin.run(*first[0], **first[1]) - twin.run(*second[0], **second[1])).mean()


def count_transformer_calls(twin, photos, **changes):
    """Count how often a twin's transformer is called during a run."""
    calls = []
    handle = twin.model.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        twin.run(photos, **changes)
    finally:
        handle.remove()
    return len(calls)


def test_versions_make_different_pictures(load_twin, photos):
    """The three twins are three models, though they share most of their weights."""
    pictures = [load_twin(name).run(photos[:1]) for name in ("qwen", "qwen_2509", "qwen_original")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pictures[one] - pictures[other]).mean() > VISIBLE


def test_order_of_photos_changes_the_picture(qwen, photos):
    """The prompt speaks of Picture 1 and Picture 2, so their order counts."""
    size = {"width": 128, "height": 128}
    assert change(qwen, ([photos[:2]], size), ([photos[1::-1]], size)) > VISIBLE


def test_photo_with_transparency_is_seen_on_white(any_qwen, photos):
    """Four channels would stop the VAE; after decoding there are three, and the photo is what lies on white."""
    content = io.BytesIO()
    photo = photos[2].copy()
    photo.putalpha(Image.linear_gradient("L"))
    photo.save(content, "PNG")
    on_white = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")

    seen = decode_photo(content.getvalue(), max_pixels=MEGAPIXEL)

    assert change(any_qwen, ([[seen]], {"num_inference_steps": 2}), ([[on_white]], {"num_inference_steps": 2})) == 0


@pytest.mark.parametrize(
    ("area", "name", "vae_sizes", "patches"),
    [
        (MIN_AREA, "qwen", [(96, 160), (160, 96)], [(6, 12), (12, 6)]),
        (MIN_AREA, "qwen_original", [(96, 160)], [(6, 12)]),
        (512 * 512, "qwen", [(416, 640)], [(22, 34)]),
        (512 * 512, "qwen_original", [(416, 640)], [(30, 46)]),
    ],
)
def test_photos_are_seen_at_the_models_area(load_twin, photos, what_is_seen, area, name, vae_sizes, patches):
    """However large a photo is, the VAE sees it at the model's area, and the text encoder likewise, or at 384 x 384.

    That limit is Plus's. The original's encoder would see a photo in a list in full.
    """
    large = [photos[0].resize((3000, 2000)), photos[1].resize((2000, 3000))][: len(vae_sizes)]

    seen = what_is_seen(load_twin(name), large, area)

    # With guidance the encoder is called twice.
    assert seen == (vae_sizes, [patches, patches])


@pytest.mark.parametrize("module", [pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus])
@pytest.mark.parametrize("area", [MIN_AREA, 512 * 512, MEGAPIXEL])
@pytest.mark.parametrize("ratio", [MAX_PHOTO_RATIO, 1 / MAX_PHOTO_RATIO])
def test_narrowest_photo_suits_qwens_own_rounding(module, area, ratio):
    """At every area the pipeline's own size rules, and those of its text encoder, keep both sides above nothing."""
    for target in (area, min(area, pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE)):
        width, height = module.calculate_dimensions(target, ratio)[:2]
        assert min(width, height) >= 32
        assert min(smart_resize(height, width)) >= 28


def test_qwens_own_area_is_back_after_the_first_step(each_pipeline, photos):
    """The pipeline's module is changed only while a run begins, so that other models find it as it was."""

    def areas():
        plus = pipeline_qwenimage_edit_plus
        return plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE, pipeline_qwenimage_edit.calculate_dimensions(10**6, 1)

    own = (MEGAPIXEL, 384 * 384, (992, 992, None))
    run = each_pipeline.start(photos[:1])
    assert areas() == own
    run.advance()
    assert areas() == own
    run.close()


def test_qwens_own_area_is_back_after_a_failure(each_pipeline, photos):
    """A run that fails while it begins leaves the pipeline's module as it was, too."""

    def fail(*_):
        raise ValueError("a step went wrong")

    before = dict(vars(pipeline_qwenimage_edit)), dict(vars(pipeline_qwenimage_edit_plus))
    handle = each_pipeline.model.pipeline.transformer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="a step went wrong"):
            each_pipeline.run(photos[:1])
    finally:
        handle.remove()
    assert (vars(pipeline_qwenimage_edit), vars(pipeline_qwenimage_edit_plus)) == before


@pytest.mark.parametrize(("name", "scale"), [("qwen", 1.0), ("qwen_original", 4.0)])
def test_full_size_pictures_are_those_of_the_bare_pipeline(load_twin, photos, name, scale):
    """At a million pixels, for which both pipelines are written, a run computes what their documentation would."""
    twin = load_twin(name)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "true_cfg_scale": scale}
    request = replace(twin.request(photos[:1], **size), area=MEGAPIXEL)
    run = twin.model.start(photos[:1], request, num_threads=1)
    while run.advance():
        pass
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = copy.copy(twin.model.pipeline)(
            image=photos[0],
            prompt=request.prompt,
            negative_prompt=" " if scale > 1 else None,
            generator=torch.Generator().manual_seed(1),
            **size,
        )
    finally:
        torch.set_num_threads(num_threads)
    assert np.array_equal(twin.pixels(run), np.asarray(output.images[0]))


def test_negative_prompt_changes_the_picture(any_qwen, photos):
    """What a request wants kept away makes a difference."""
    assert change(any_qwen, ([photos[:1]], {}), ([photos[:1]], {"negative_prompt": "dark, crowded"})) > VISIBLE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 8), ({"negative_prompt": ""}, 8), ({"negative_prompt": "dark"}, 8), ({"true_cfg_scale": 1.0}, 4)],
    ids=["no negative prompt", "empty", "given", "guidance off"],
)
def test_guidance_is_on_unless_switched_off(each_pipeline, photos, changes, expected):
    """Guidance runs the transformer twice a step, with or without a negative prompt; at 1 it is off."""
    assert count_transformer_calls(each_pipeline, photos[:1], **changes) == expected


def test_no_negative_prompt_is_as_good_as_a_space(each_pipeline, photos):
    """What the models were trained with, a single space, stands in for a negative prompt that is not given."""
    for left_out in (None, ""):
        assert (
            change(
                each_pipeline,
                ([photos[:1]], {"negative_prompt": left_out}),
                ([photos[:1]], {"negative_prompt": " "}),
            )
            == 0
        )


def test_negative_prompt_without_guidance_is_refused(each_pipeline, photos):
    """A negative prompt that would silently do nothing is refused, with what would help."""
    with pytest.raises(BadInput, match="no effect unless true_cfg_scale is above 1"):
        each_pipeline.start(photos[:1], negative_prompt="dark", true_cfg_scale=1.0)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_control_tokens_in_a_prompt_are_refused(each_pipeline, photos, token, field):
    """A prompt cannot speak for the system or ask for a photo that is not there."""
    name = field.replace("_", " ")
    with pytest.raises(BadInput, match=f"^the {name} holds <.*control tokens: leave it out"):
        each_pipeline.start(photos[:1], **{field: f"A sofa {token} and a table"})


def test_original_takes_one_photo(original, photos):
    """Several photos are refused, with what is allowed, and not one of them is dropped in silence."""
    with pytest.raises(BadInput, match=r"^this model takes exactly one photo, not 2$"):
        original.model.start(photos[:2], original.request(photos[:1]))


def test_families_have_their_own_defaults(qwen, original):
    """The original was published with 50 steps, its successors with 40."""
    assert (original.params_model().num_inference_steps, qwen.params_model().num_inference_steps) == (50, 40)
