import logging

import numpy as np
import pytest
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from pipelines.errors import BadInput
from pipelines.sizes import MAX_PHOTO_RATIO, MIN_AREA

VISIBLE = 1.0  # mean change of a colour value, of 255


@pytest.fixture
def count_transformer_calls():
    """Give a function that counts how often a twin's transformer is called during a run."""

    def count(twin, photos, **changes):
        calls = []
        handle = twin.model.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            twin.run(photos, **changes)
        finally:
            handle.remove()
        return len(calls)

    return count


def change(twin, first, second):
    """Run twice and give the mean change of a colour value."""
    return np.abs(twin.run(*first[0], **first[1]) - twin.run(*second[0], **second[1])).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Furnish this empty room as a modern dining room."},
        {"seed": 2},
        {"num_inference_steps": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_input_changes_the_picture(twin, photos, changes):
    """Another prompt, seed or number of steps makes a picture that looks different."""
    assert change(twin, ([photos[:1]], {}), ([photos[:1]], changes)) > VISIBLE


def test_photo_changes_the_picture(twin, photos):
    """Another photo of the same size makes a picture that looks different."""
    other = photos[1].resize(photos[0].size)
    assert change(twin, ([photos[:1]], {}), ([[other]], {})) > VISIBLE


def test_guidance_changes_the_picture(twin, photos):
    """A weaker or stronger guidance makes a picture that looks different."""
    name, values = {"qwen": ("true_cfg_scale", (3.0, 1.0)), "kontext": ("guidance_scale", (4.0, 1.0))}[twin.name]
    for value in values:
        assert change(twin, ([photos[:1]], {}), ([photos[:1]], {name: value})) > VISIBLE


def test_negative_prompt_changes_the_picture(qwen, photos):
    """What a request wants kept away makes a difference."""
    assert change(qwen, ([photos[:1]], {}), ([photos[:1]], {"negative_prompt": "dark, crowded"})) > VISIBLE


def test_order_of_photos_changes_the_picture(qwen, photos):
    """The prompt speaks of Picture 1 and Picture 2, so their order counts."""
    size = {"width": 128, "height": 128}
    assert change(qwen, ([photos[:2]], size), ([photos[1::-1]], size)) > VISIBLE


def test_same_request_makes_the_same_picture(twin, photos):
    """Twice the same request gives the same pixels."""
    assert change(twin, ([photos[:1]], {}), ([photos[:1]], {})) == 0


@pytest.mark.parametrize(
    "size", [(65, 2000), (2000, 65), (60, 3000), (3000, 60), (1, 1), (64, 64), (3000, 4000)], ids=str
)
def test_photos_of_any_shape_run(twin, size):
    """From one pixel to twelve million, and up to 50 to 1, a photo runs and the output has the size of the rules."""
    height, width = size
    photo = Image.new("RGB", (width, height), (120, 140, 160))
    request = twin.request([photo])
    run = twin.start([photo], num_inference_steps=2)
    assert run.advance() is True
    assert run.advance() is False
    assert (run.image.height, run.image.width) == (request.params["height"], request.params["width"])


def test_photo_that_is_too_narrow_is_refused(twin, photos):
    """Over 50 to 1 every photo is refused, also where another one sets the size of the output."""
    narrow = Image.new("RGB", (3001, 60))
    request = twin.request(photos[:1])
    inputs = [photos[0], narrow] if twin.name == "qwen" else [narrow]
    with pytest.raises(BadInput, match="3001 x 60 pixels; its longer side may be at most 50 times the shorter"):
        twin.model.start(inputs, request)


@pytest.mark.parametrize("area", [MIN_AREA, 512 * 512, 1024 * 1024])
@pytest.mark.parametrize("ratio", [MAX_PHOTO_RATIO, 1 / MAX_PHOTO_RATIO])
def test_narrowest_photo_suits_qwens_own_rounding(area, ratio):
    """At every area the pipeline's own size rules, and those of its text encoder, keep both sides above nothing."""
    for target in (area, min(area, pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE)):
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(target, ratio)
        assert min(width, height) >= 32
        assert min(smart_resize(height, width)) >= 28


@pytest.mark.parametrize("size", [(512, 64), (64, 512), (128, 256), (208, 176)], ids=str)
def test_output_has_the_size_asked_for(twin, photos, size):
    """An explicit size is the size of the output, not a ratio of something else."""
    height, width = size
    run = twin.start(photos[:1], height=height, width=width, num_inference_steps=2)
    while run.advance():
        pass
    assert (run.image.height, run.image.width) == size


def test_size_that_the_pipeline_computes_is_the_one_asked_for():
    """Kontext computes height and width anew from their ratio and area: over the whole range that changes nothing."""
    for height in range(16, 2049, 16):
        for width in range(16, 2049, 16):
            ratio, area = width / height, width * height
            assert (round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)) == (height, width)


def test_reference_is_read_at_the_models_area(twin, photos):
    """A photo is scaled to the model's area before it is encoded, however large it is."""
    shapes = []
    encode = "encode"
    original = getattr(twin.model.pipeline.vae, encode)

    def remember_shape(image, *args, **kwargs):
        shapes.append(tuple(image.shape[-2:]))
        return original(image, *args, **kwargs)

    setattr(twin.model.pipeline.vae, encode, remember_shape)
    try:
        twin.run([photos[0].resize((2000, 1500))], num_inference_steps=2)
    finally:
        delattr(twin.model.pipeline.vae, encode)
    assert shapes == [{"qwen": (96, 160), "kontext": (112, 144)}[twin.name]]


def test_qwens_own_area_is_back_after_the_first_step(qwen, photos):
    """The pipeline's module is changed only while a run begins, so that other models find it as it was."""
    module = pipeline_qwenimage_edit_plus
    run = qwen.start(photos[:1])
    assert (module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE) == (1024 * 1024, 384 * 384)
    run.advance()
    assert (module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE) == (1024 * 1024, 384 * 384)
    run.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 8), ({"negative_prompt": ""}, 8), ({"negative_prompt": "dark"}, 8), ({"true_cfg_scale": 1.0}, 4)],
    ids=["no negative prompt", "empty", "given", "guidance off"],
)
def test_qwens_guidance_is_on_unless_switched_off(qwen, photos, count_transformer_calls, changes, expected):
    """Guidance runs the transformer twice a step, with or without a negative prompt; at 1 it is off."""
    assert count_transformer_calls(qwen, photos[:1], **changes) == expected


def test_pipelines_have_nothing_to_remark(twin, photos, caplog):
    """The pipelines warn where they change or ignore an argument; here is nothing to change or ignore."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        twin.run(photos[:1], prompt="Add a sofa.", num_inference_steps=2)
        if twin.name == "qwen":
            twin.run(photos[:1], prompt="Add a sofa.", num_inference_steps=2, true_cfg_scale=1.0)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_negative_prompt_without_guidance_is_refused(qwen, photos):
    """A negative prompt that would silently do nothing is refused, with what would help."""
    with pytest.raises(BadInput, match="no effect unless true_cfg_scale is above 1"):
        qwen.start(photos[:1], negative_prompt="dark", true_cfg_scale=1.0)


def test_negative_prompt_is_refused_where_there_is_none(kontext, photos):
    """Kontext has no negative prompt."""
    with pytest.raises(BadInput, match="takes no negative prompt"):
        kontext.start(photos[:1], negative_prompt="dark")


@pytest.mark.parametrize(("name", "count"), [("qwen", 0), ("qwen", 4), ("kontext", 0), ("kontext", 2)])
def test_number_of_photos_is_the_models(request, photos, name, count):
    """Qwen takes one to three photos, Kontext one."""
    twin = request.getfixturevalue(name)
    asked = twin.request(photos[:1])
    with pytest.raises(BadInput, match=f"photos?, not {count}"):
        twin.model.start((photos * 2)[:count], asked)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_control_tokens_in_a_prompt_are_refused(qwen, photos, token, field):
    """A prompt cannot speak for the system or ask for a photo that is not there."""
    with pytest.raises(BadInput, match="control tokens: leave it out"):
        qwen.start(photos[:1], **{field: f"A sofa {token} and a table"})


@pytest.mark.parametrize(
    "prompt", ["", " ", "{}", "{0} %s <extra_id_0> </s>", "Ein Sofa für 客厅 🛋️", "word " * 800], ids=range(6)
)
def test_prompts_of_any_text_run(twin, photos, prompt):
    """Empty, odd, foreign and very long prompts make a picture."""
    assert twin.run(photos[:1], prompt=prompt, num_inference_steps=2).std() > 10
