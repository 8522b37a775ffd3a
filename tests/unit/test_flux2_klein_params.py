"""FLUX.2 [klein] as the server knows it: its entries, and what is refused before a worker sees it."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import BadInput
from pipelines.flux2_klein.params import Params, reference_size
from server.jobs import JobInput, Priority
from server.model_entry import InvalidParams
from server.prompts import Prompts
from server.registry import load_registry
from server.settings import load_settings
from server.submit.refusals import ItemRefused
from server.submit.request import BatchRequest
from server.submit.resolve import Resolver

CONFIG = Path(__file__).parents[2] / "config"
MEGAPIXEL = 1024 * 1024
TINY = "tiny-flux2-klein"
PHOTO = JobInput("x", "x", "etag", None, "image/jpeg", 1000, height=300, width=400)


@pytest.fixture(scope="module")
def registry():
    """Give the models that the configuration of the tests serves, and the real one."""
    enabled = f'["tiny-qwen-image-edit-2511", "{TINY}", "flux2-klein-4b"]'
    keys = {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}
    return load_registry(load_settings(CONFIG, {"RESTAGE_ENV": "test", "RESTAGE__MODELS__ENABLED": enabled, **keys}))


def complete(registry, photos, **item):
    resolver = Resolver(registry, Prompts.load(CONFIG), default_model=TINY, max_prompt_characters=100)
    request = BatchRequest.model_validate({"items": [{"upload_ids": ["x"] * len(photos), "prompt": "A sofa.", **item}]})
    draft = resolver.draft(0, request.items[0], request.defaults)
    return draft.complete(photos, owner="ada", priority=Priority.NORMAL)


@pytest.mark.parametrize("model", [TINY, "flux2-klein-4b"])
def test_distilled_entries_take_no_guidance(registry, model):
    """Both entries are of distilled models: four steps without guidance, and nothing else is taken for it."""
    entry = registry.get(model)
    resolved = entry.resolve_params({})
    assert (resolved.num_inference_steps, resolved.guidance_scale) == (4, 1.0)
    assert (entry.max_input_images, entry.has_negative_prompt) == (4, False)
    with pytest.raises(InvalidParams, match="guidance_scale needs"):
        entry.resolve_params({"guidance_scale": 4.0})


def test_narrow_photo_is_refused_at_submission(registry):
    """Over 8 to 1 a photo is refused at submission with its place, also as the last of several."""
    widest, narrow = replace(PHOTO, height=100, width=800), replace(PHOTO, height=801, width=100)
    assert complete(registry, [widest]).params["width"] == 512
    for photos in ([narrow], [PHOTO, narrow]):
        with pytest.raises(ItemRefused) as caught:
            complete(registry, photos)
        assert caught.value.error.code == "unusable_shape"
        assert "100 x 801 pixels; its longer side may be at most 8 times" in caught.value.error.detail


def test_narrow_photo_is_refused_whatever_the_output():
    """An explicit size of the output does not help, since the model also reads the photo."""
    for size in ((100, 801), (801, 100)):
        with pytest.raises(BadInput, match="at most 8 times the shorter"):
            Params(height=64, width=64).output_size(*size, MEGAPIXEL)


@pytest.mark.parametrize(
    ("params", "area", "expected"),
    [
        ({}, MEGAPIXEL, (912, 1136)),
        ({"aspect_ratio": "1:1"}, MEGAPIXEL, (1024, 1024)),
        ({"height": 512, "width": 640}, MEGAPIXEL, (512, 640)),
        ({}, 4 * MEGAPIXEL, (1824, 2288)),
    ],
)
def test_output_has_the_size_of_the_photo_as_it_is_read(params, area, expected):
    """Output and photo have the same rows and columns, unless another size was asked for or the area is larger."""
    assert reference_size(2400, 3000, area) == (912, 1136)
    assert Params(**params).output_size(2400, 3000, area) == expected
    resolved = Params(**params).resolved(2400, 3000, area, seed=1)
    assert (resolved["height"], resolved["width"]) == expected


@pytest.mark.parametrize("ratio", ["match_input", "16:9", "4:3", "1:1", "9:16"])
def test_resolved_parameters_may_be_sent_again(ratio):
    """A record's parameters are valid in a new request and resolve to themselves, on another photo too."""
    resolved = Params(aspect_ratio=ratio).resolved(2400, 3000, MEGAPIXEL, seed=1)
    assert Params(**resolved).resolved(640, 640, MEGAPIXEL, seed=2) == resolved
