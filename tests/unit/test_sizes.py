import math
import subprocess
import sys

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import BadInput
from pipelines.flux_kontext.params import Params as KontextParams
from pipelines.qwen_image_edit_plus.params import Params as QwenParams
from pipelines.sizes import MAX_PHOTO_RATIO, MAX_SEED, MIN_AREA, MULTIPLE_OF, SizeParams

MEGAPIXEL = 1024 * 1024
NAMED_RATIOS = ["16:9", "4:3", "3:2", "1:1", "2:3", "3:4", "9:16"]

sides = st.integers(min_value=1, max_value=20_000)


@pytest.mark.parametrize(
    ("photo_height", "photo_width", "area", "expected"),
    [
        (3000, 4000, MEGAPIXEL, (880, 1184)),
        (4000, 3000, MEGAPIXEL, (1184, 880)),
        (1024, 1024, MEGAPIXEL, (1024, 1024)),
        (64, 64, MEGAPIXEL, (1024, 1024)),
        (768, 1024, 128 * 128, (112, 144)),
        (65, 2000, 128 * 128, (16, 704)),
        (2000, 65, MEGAPIXEL, (5680, 192)),
    ],
)
def test_output_follows_the_photo(photo_height, photo_width, area, expected):
    """Without a size in the request, the output has the photo's ratio at the model's area."""
    assert SizeParams().output_size(photo_height, photo_width, area) == expected


@given(sides, sides, st.integers(min_value=MIN_AREA, max_value=4 * MEGAPIXEL))
def test_every_photo_is_refused_or_gets_a_size_that_runs(photo_height, photo_width, area):
    """A size is a multiple of 16 on both sides and near the ratio and area asked for; a photo too narrow is refused."""
    if max(photo_height, photo_width) > MAX_PHOTO_RATIO * min(photo_height, photo_width):
        with pytest.raises(BadInput, match=f"{photo_width} x {photo_height} pixels.* at most {MAX_PHOTO_RATIO} times"):
            SizeParams().output_size(photo_height, photo_width, area)
        return
    height, width = SizeParams().output_size(photo_height, photo_width, area)
    exact_height = math.sqrt(area * photo_height / photo_width)
    exact_width = math.sqrt(area * photo_width / photo_height)
    assert height % MULTIPLE_OF == width % MULTIPLE_OF == 0
    assert min(height, width) >= MULTIPLE_OF
    assert abs(height - exact_height) <= MULTIPLE_OF / 2
    assert abs(width - exact_width) <= MULTIPLE_OF / 2


def test_smallest_area_leaves_every_photo_its_shorter_side():
    """At the smallest area the narrowest photo keeps more than the 16 pixels under which Qwen's rounding fails."""
    assert math.sqrt(MIN_AREA / MAX_PHOTO_RATIO) > 16


@pytest.mark.parametrize("ratio", NAMED_RATIOS)
@pytest.mark.parametrize("area", [MIN_AREA, MEGAPIXEL])
def test_named_ratio_sets_the_size_whatever_the_photo(ratio, area):
    """A named ratio decides the output's size; the photo's own ratio plays no part."""
    params = SizeParams(aspect_ratio=ratio)
    height, width = params.output_size(100, 333, area)
    across, down = (int(part) for part in ratio.split(":"))
    assert (height, width) == params.output_size(333, 100, area)
    assert abs(width / height - across / down) < 0.2
    assert abs(height * width / area - 1) < 0.1


def test_explicit_size_is_taken_as_it_is():
    """Width and height of the request are the output's, at any area of the model."""
    assert SizeParams(width=640, height=2048).output_size(100, 100, MEGAPIXEL) == (2048, 640)


def test_too_narrow_photo_is_refused_for_an_explicit_size_too():
    """The model also reads the photo, so its shape matters whatever the output's size."""
    with pytest.raises(BadInput, match="5101 x 100 pixels"):
        SizeParams(width=512, height=512).output_size(100, 5101, MEGAPIXEL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 512}, "go together"),
        ({"height": 512}, "go together"),
        ({"width": 500, "height": 512}, "multiple of 16"),
        ({"width": 48, "height": 512}, "greater than or equal to 64"),
        ({"width": 512, "height": 2064}, "less than or equal to 2048"),
        ({"width": 512, "height": 512, "aspect_ratio": "16:9"}, "are not 16:9"),
        ({"aspect_ratio": "5:4"}, "match_input"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": MAX_SEED + 1}, "less than or equal to"),
        ({"seed": "7"}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"seed": 7.0}, "valid integer"),
        ({"sead": 7}, "not permitted"),
        ({"num_inference_steps": 1}, "greater than or equal to 2"),
        ({"num_inference_steps": 101}, "less than or equal to 100"),
        ({"true_cfg_scale": 0.5}, "greater than or equal to 1"),
        ({"true_cfg_scale": math.nan}, "finite number"),
        ({"true_cfg_scale": math.inf}, "finite number"),
        ({"guidance_scale": 3.0}, "not permitted"),
    ],
)
def test_value_that_is_not_allowed_is_refused(values, message):
    """Values out of range, of another type or unknown are refused, and the message says what is allowed."""
    with pytest.raises(pydantic.ValidationError, match=message):
        QwenParams(**values)


def test_integers_are_numbers_for_a_scale():
    """A client may write a scale without a decimal point."""
    assert KontextParams.model_validate({"guidance_scale": 3}).guidance_scale == 3.0


@pytest.mark.parametrize("params_model", [QwenParams, KontextParams], ids=["qwen", "kontext"])
def test_resolved_parameters_are_complete_plain_values(params_model):
    """After resolution every field has a value, with the request's seed or else the drawn one."""
    resolved = params_model().resolved(768, 1024, MEGAPIXEL, seed=11)
    assert set(resolved) == set(params_model.model_fields)
    assert all(type(value) in (int, float, str) for value in resolved.values())
    assert (resolved["height"], resolved["width"], resolved["seed"]) == (880, 1184, 11)
    assert params_model(seed=0).resolved(768, 1024, MEGAPIXEL, seed=11)["seed"] == 0


@pytest.mark.parametrize("ratio", ["match_input", *NAMED_RATIOS])
def test_resolved_parameters_may_be_sent_again(ratio):
    """A record's parameters are valid in a new request and resolve to themselves, on another photo too."""
    resolved = QwenParams(aspect_ratio=ratio).resolved(768, 1024, MEGAPIXEL, seed=11)
    assert QwenParams(**resolved).resolved(640, 640, MEGAPIXEL, seed=12) == resolved


def test_parameters_do_not_import_torch():
    """The server's light processes may read every family's parameters."""
    script = (
        "import sys, pipelines.sizes, pipelines.errors, pipelines.qwen_image_edit_plus.params, "
        "pipelines.flux_kontext.params; print(sorted({'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.strip() == "[]"
