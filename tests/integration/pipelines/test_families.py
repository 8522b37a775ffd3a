import logging

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import BadInput

VISIBLE = 1.0  # mean change of a colour value, of 255


def change(twin, first, second):
    """Run twice and give the mean change of a colour value."""
    return np.abs(twin.run(*first[0], **first[1]) - twin.run(*second[0], **second[1])).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "Furnish this empty room as an industrial office."},
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
    if twin.model.pipeline.config.get("is_distilled"):
        pytest.skip("a distilled model takes no guidance; its family's tests have one that does")
    is_qwen = twin.takes("true_cfg_scale")
    name, values = ("true_cfg_scale", (3.0, 1.0)) if is_qwen else ("guidance_scale", (4.0, 1.0))
    for value in values:
        assert change(twin, ([photos[:1]], {}), ([photos[:1]], {name: value})) > VISIBLE


def test_same_request_makes_the_same_picture(twin, photos):
    """Twice the same request gives the same pixels."""
    assert change(twin, ([photos[:1]], {}), ([photos[:1]], {})) == 0


@pytest.mark.parametrize(
    "size", [(65, 2000), (2000, 65), (60, 3000), (3000, 60), (1, 1), (64, 64), (3000, 4000)], ids=str
)
def test_photos_of_any_shape_run(twin, size):
    """From one pixel to twelve million, as narrow as the family allows, a photo makes an output of the rules' size."""
    ratio = twin.params_model.MAX_PHOTO_RATIO
    height, width = min(size[0], size[1] * ratio), min(size[1], size[0] * ratio)
    photo = Image.new("RGB", (width, height), (120, 140, 160))
    request = twin.request([photo])
    run = twin.start([photo], num_inference_steps=2)
    assert run.advance() is True
    assert run.advance() is False
    assert (run.image.height, run.image.width) == (request.params["height"], request.params["width"])


def test_photo_that_is_too_narrow_is_refused(twin, photos):
    """A narrower photo than the family allows is refused, also where another one sets the size of the output."""
    ratio = twin.params_model.MAX_PHOTO_RATIO
    narrow = Image.new("RGB", (60 * ratio + 1, 60))
    request = twin.request(photos[:1])
    inputs = [photos[0], narrow] if twin.params_model.MAX_INPUT_IMAGES > 1 else [narrow]
    with pytest.raises(BadInput, match=f"{narrow.width} x 60 pixels; .* at most {ratio} times the shorter"):
        twin.model.start(inputs, request)


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
    # Qwen's pipelines round to multiples of 32.
    assert shapes == [(96, 160) if twin.takes("true_cfg_scale") else (112, 144)]


def test_pipelines_have_nothing_to_remark(twin, photos, caplog):
    """The pipelines warn where they change or ignore an argument; here is nothing to change or ignore."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        twin.run(photos[:1], prompt="Add a sofa.", num_inference_steps=2)
        if twin.takes("true_cfg_scale"):
            twin.run(photos[:1], prompt="Add a sofa.", num_inference_steps=2, true_cfg_scale=1.0)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_negative_prompt_is_refused_where_there_is_none(kontext, photos):
    """Kontext has no negative prompt."""
    with pytest.raises(BadInput, match="takes no negative prompt"):
        kontext.start(photos[:1], negative_prompt="dark")


def test_number_of_photos_is_the_models(twin, photos):
    """A model takes at least one photo, and no more than its family allows."""
    asked = twin.request(photos[:1])
    for count in (0, twin.params_model.MAX_INPUT_IMAGES + 1):
        with pytest.raises(BadInput, match=f"photos?, not {count}"):
            twin.model.start((photos * 2)[:count], asked)


@pytest.mark.parametrize(
    "prompt", ["", " ", "{}", "{0} %s <extra_id_0> </s>", "Ein Sofa für 客厅 🛋️", "kitchen " * 100], ids=range(6)
)
def test_prompts_of_any_text_run(twin, photos, prompt):
    """Empty, odd, foreign and long prompts make a picture."""
    assert twin.run(photos[:1], prompt=prompt, num_inference_steps=2).std() > 10
