"""The generic family as the server knows it: what is read of a class's source, and what an entry must say."""

import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.errors import BadInput
from pipelines.generic.params import (
    allowable_parameters,
    has_step_callback,
    params_of,
    pipeline_names,
    why_not_class,
    why_not_parameter,
)
from pipelines.generic.signatures import read_signature
from server.errors import ConfigError
from server.model_entry import InvalidParams, ModelEntry
from server.registry import load_registry
from server.settings import load_settings

AREA = 1024 * 1024
PIX2PIX = "StableDiffusionInstructPix2PixPipeline"
LONGCAT = "LongCatImageEditPipeline"
ALLOW = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt")
ENTRY = {
    "id": "a",
    "name": "A",
    "description": "An entry.",
    "version": "1",
    "family": "generic",
    "pipeline": PIX2PIX,
    "weights": "a",
    "license": "mit",
    "dtype": "float16",
    "area": 262144,
    "allow": list(ALLOW),
    "defaults": {"num_inference_steps": 20},
    "limits": {
        "num_inference_steps": [1, 100],
        "guidance_scale": [0.0, 20.0],
        "image_guidance_scale": [1.0, 5.0],
        "max_input_images": 1,
    },
}
# A class that edits photos → whether it calls back after a step, whether it can be told a size, its number of steps.
CLASSES = {
    PIX2PIX: (True, False, 100),
    LONGCAT: (False, False, 50),
    "DreamLitePipeline": (False, True, 30),
    "StableDiffusionXLInstructPix2PixPipeline": (False, True, 100),
    "JoyImageEditPipeline": (True, True, 40),
    "BriaFibo2Pipeline": (True, True, 30),
    "ZImageOmniPipeline": (True, True, 50),
    "GlmImagePipeline": (True, True, 50),
    "Flux2Pipeline": (True, True, 50),
    "QwenImage21Pipeline": (True, True, 40),
    "FluxImg2ImgPipeline": (True, True, 28),
    "StableDiffusion3Img2ImgPipeline": (True, True, 50),
}


@pytest.fixture
def problems_of(tmp_path):
    """Give a function that changes the good entry and says what is wrong with it then."""

    def check(**changes):
        entry = {name: value for name, value in (ENTRY | changes).items() if value is not None}
        (tmp_path / "models.yaml").write_text(yaml.safe_dump([entry], sort_keys=False))
        (tmp_path / "base.yaml").write_text("models: {default: a, enabled: [a]}\n")
        (tmp_path / "local.yaml").write_text("")
        keys = {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}
        try:
            load_registry(load_settings(tmp_path, keys))
        except ConfigError as error:
            return [problem.partition("models[0].")[2] for problem in error.problems]
        return []

    return check


@pytest.mark.parametrize("pipeline", CLASSES)
def test_classes_that_edit_photos_can_be_used(pipeline):
    """What the family must know of a class stands in its source."""
    assert why_not_class(pipeline) is None
    params_model = params_of(pipeline, ())
    num_steps = params_model().model_dump()["num_inference_steps"]
    assert (params_model.REPORTS_STEPS, params_model.TAKES_SIZE, num_steps) == CLASSES[pipeline]
    assert has_step_callback(pipeline) == params_model.REPORTS_STEPS
    assert list(params_model.PIPELINES) == [pipeline]


def test_source_is_read_without_the_engine():
    """Reading classes loads neither diffusers nor torch, and one takes milliseconds (a second is allowed)."""
    read_signature.cache_clear()
    before = set(sys.modules)
    started = time.monotonic()
    assert read_signature(PIX2PIX) is not None
    assert time.monotonic() - started < 1
    assert {"torch", "diffusers", "transformers"}.isdisjoint(set(sys.modules) - before)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("StableDiffusionPipeline", "takes no image"),
        ("MarigoldDepthPipeline", "takes no prompt"),
        ("FluxPriorReduxPipeline", "takes no num_inference_steps"),
        ("StableDiffusionInpaintPipeline", "needs mask_image, which no job has"),
        ("FluxControlNetImg2ImgPipeline", "needs control_image, which no job has"),
        ("CycleDiffusionPipeline", "needs source_prompt, which no job has"),
        ("LTXImageToVideoPipeline", "returns no images"),
        ("VersatileDiffusionPipeline", "has no call of its own"),
        ("NoSuchPipeline", "has no call of its own"),
    ],
)
def test_classes_that_do_something_else_are_refused(pipeline, reason):
    """A class that makes no picture of a photo and a prompt is refused, with what it lacks."""
    assert (why_not_class(pipeline) or "").startswith(reason)
    with pytest.raises(ValueError, match=f"{pipeline} {reason}"):
        params_of(pipeline, ())


def test_call_of_a_base_class_counts():
    """A class that takes over its call from another has that one's arguments."""
    inherited, own = read_signature("StableDiffusionOnnxPipeline"), read_signature("OnnxStableDiffusionPipeline")
    assert "StableDiffusionOnnxPipeline" in pipeline_names()
    assert inherited == own
    assert inherited is not None
    assert inherited.arguments["guidance_scale"].default == 7.5


def test_modular_pipelines_are_no_classes_of_this_kind():
    """They are called in another way, so they are not offered."""
    assert "QwenImageEditModularPipeline" not in pipeline_names()
    assert len(pipeline_names()) > 250


def test_allowable_parameters_are_numbers_and_the_negative_prompt():
    """What is a number, true or false can be allowed; text and objects cannot, nor what Restage gives itself."""
    assert allowable_parameters(PIX2PIX) == (
        "num_inference_steps",
        "guidance_scale",
        "image_guidance_scale",
        "negative_prompt",
        "eta",
    )
    assert {"strength", "max_sequence_length"} < set(allowable_parameters("FluxImg2ImgPipeline"))
    assert "cfg_normalization" in allowable_parameters("ZImageOmniPipeline")
    for name in ("height", "seed", "image", "latents", "_auto_resize", "return_dict", "sigmas"):
        assert name not in allowable_parameters("FluxKontextPipeline")
    assert allowable_parameters("NoSuchPipeline") == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("height", "set by Restage itself"),
        ("num_images_per_prompt", "set by Restage itself"),
        ("return_dict", "set by Restage itself"),
        ("prompt_2", "no plain value"),
        ("latents", "no plain value"),
        ("callback_on_step_end", "no plain value"),
        ("_auto_resize", "an inner matter"),
        ("guidance_scale", None),
        ("no_such_parameter", None),
    ],
)
def test_reason_against_a_parameter_is_told(name, reason):
    """An operator hears why an argument that is there may not be allowed."""
    found = why_not_parameter("FluxKontextPipeline", name)
    assert (found is None) if reason is None else (reason in str(found))


def test_schema_tells_what_the_class_and_the_entry_say():
    """Clients see the class's words and types, the entry's ranges, and the defaults of whichever has one."""
    entry = ModelEntry.model_validate(ENTRY)
    properties = entry.params_schema["properties"]
    assert list(properties) == [
        "seed",
        "aspect_ratio",
        "width",
        "height",
        "num_inference_steps",
        "guidance_scale",
        "image_guidance_scale",
    ]
    assert properties["num_inference_steps"] == {
        "default": 20,
        "description": "The number of denoising steps.",
        "maximum": 100,
        "minimum": 1,
        "title": "Num Inference Steps",
        "type": "integer",
    }
    assert properties["image_guidance_scale"]["default"] == 1.5
    assert properties["image_guidance_scale"]["description"] == "Push the generated image towards the initial `image`."
    assert (properties["guidance_scale"]["minimum"], properties["guidance_scale"]["maximum"]) == (0.0, 20.0)
    assert (entry.max_input_images, entry.has_negative_prompt, entry.reports_progress) == (1, True, True)


def test_argument_that_may_be_null_keeps_the_default_of_the_class():
    """`None` as a class's own default stays one."""
    params = params_of("FluxKontextPipeline", ("max_sequence_length",))()
    assert params.model_dump()["max_sequence_length"] == 512
    optional = params_of("StableDiffusionImg2ImgPipeline", ("clip_skip", "strength", "eta"))()
    assert optional.model_dump()["clip_skip"] is None
    assert optional.model_validate({"clip_skip": 2}).model_dump()["clip_skip"] == 2


@pytest.mark.parametrize(
    ("params", "detail"),
    [
        ({"guidance_scale": 20.5}, "guidance_scale needs a number from 0.0 to 20.0, not 20.5"),
        ({"guidance_scale": float("inf")}, "guidance_scale needs a number from 0.0 to 20.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale needs a number from 0.0 to 20.0"),
        ({"guidance_scale": True}, "guidance_scale needs a number"),
        ({"guidance_scale": "3"}, "guidance_scale needs a number"),
        ({"guidance_scale": 10**400}, "guidance_scale needs a number"),
        ({"num_inference_steps": 0}, "num_inference_steps needs a whole number from 1 to 100, not 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps needs a whole number"),
        ({"eta": 0.5}, "eta is unknown"),
        ({"latents": [1]}, "latents is unknown"),
        ({"negative_prompt": "dark"}, "negative_prompt is unknown"),
        ({"aspect_ratio": "16:9"}, "aspect_ratio needs match_input"),
    ],
    ids=str,
)
def test_request_is_held_to_the_entry(params, detail):
    """A value of another type or out of the entry's range is refused, and so is what the entry does not allow."""
    with pytest.raises(InvalidParams) as caught:
        ModelEntry.model_validate(ENTRY).resolve_params(params)
    assert detail in str(caught.value).replace("/", "")


def test_output_of_a_class_without_a_size_has_the_shape_of_the_photo():
    """Such a class would stretch the photo to any other shape, which is refused; the photo's own is taken."""
    params_model = params_of(PIX2PIX, ())
    height, width = params_model().output_size(3000, 4000, AREA)
    assert (height, width) == (880, 1184)
    assert params_model(height=height, width=width).output_size(3000, 4000, AREA) == (880, 1184)
    assert params_model(height=480, width=640).output_size(3000, 4000, AREA) == (480, 640)
    with pytest.raises(BadInput, match="640 x 640 is not that of 4000 x 3000: leave width and height out"):
        params_model(height=640, width=640).output_size(3000, 4000, AREA)
    assert params_of("DreamLitePipeline", ())(height=640, width=640).output_size(3000, 4000, AREA) == (640, 640)


@pytest.mark.parametrize("photo", [(3000, 4000), (401, 299), (600, 1000), (777, 778)], ids=str)
@pytest.mark.parametrize("pipeline", [PIX2PIX, "DreamLitePipeline"])
def test_resolved_parameters_may_be_sent_again(pipeline, photo):
    """A record's parameters are valid in a new request for the same photo, and resolve to themselves."""
    params_model = params_of(pipeline, ("guidance_scale",))
    height, width = photo
    resolved = params_model().resolved(height, width, AREA, seed=1)
    assert params_model(**resolved).resolved(height, width, AREA, seed=2) == resolved


def test_number_of_photos_is_one_unless_the_entry_says_otherwise():
    """Only the entry knows how many photos the class takes together."""
    limits = dict(ENTRY["limits"])
    del limits["max_input_images"]
    assert ModelEntry.model_validate(ENTRY | {"limits": limits}).max_input_images == 1
    assert ModelEntry.model_validate(ENTRY | {"limits": limits | {"max_input_images": 3}}).max_input_images == 3


def test_good_entry_passes(problems_of):
    """The example of the documentation is valid, and so is one that allows nothing."""
    assert problems_of() == []
    assert problems_of(allow=None, limits={"num_inference_steps": [1, 50]}) == []
    assert problems_of(allow=[*ALLOW, *ALLOW]) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"pipeline": PIX2PIX[:-8]},
            f"pipeline = '{PIX2PIX[:-8]}': is no pipeline of the diffusers that is installed; did you mean {PIX2PIX}?",
        ),
        (
            {"pipeline": "os.system"},
            "pipeline = 'os.system': is no pipeline of the diffusers that is installed",
        ),
        (
            {"pipeline": "StableDiffusionPipeline"},
            (
                "pipeline = 'StableDiffusionPipeline': cannot be used: it takes no image; the family generic needs a "
                "class that takes image, prompt, num_inference_steps, generator"
            ),
        ),
        (
            {"allow": [*ALLOW, "image_guidance"]},
            f"allow[4] = 'image_guidance': is no parameter of {PIX2PIX}; did you mean image_guidance_scale?",
        ),
        ({"allow": [*ALLOW, "image"]}, "allow[4] = 'image': is set by Restage itself"),
        (
            {"allow": [*ALLOW, "latents"]},
            "allow[4] = 'latents': is no plain value; only numbers, true or false, and negative_prompt can be allowed",
        ),
        (
            {"allow": [*ALLOW, "eta"]},
            "limits.eta: is missing; needs [lowest, highest], since allow names it and the class has no range",
        ),
        (
            {"limits": {"guidance_scale": [0, 20], "image_guidance_scale": [1, 5]}},
            (
                "limits.num_inference_steps: is missing; needs [lowest, highest], since each job has it and the class "
                "has no range"
            ),
        ),
        (
            {"limits": ENTRY["limits"] | {"guidance_scale": [0, float("inf")]}},
            "limits.guidance_scale = a list: needs [lowest, highest], each a number from -1000000 to 1000000",
        ),
        (
            {"limits": ENTRY["limits"] | {"max_input_images": 11}},
            "limits.max_input_images = 11: needs a whole number from 1 to 10",
        ),
        (
            {"limits": ENTRY["limits"] | {"guidance_scale": [0, 5]}},
            "limits.guidance_scale: excludes the default: guidance_scale needs a number from 0 to 5, not 7.5",
        ),
        (
            {"family": "flux_kontext", "pipeline": "FluxKontextPipeline", "limits": {}},
            "allow: is only for the family generic; flux_kontext has its own parameters",
        ),
    ],
)
def test_bad_entry_is_told_in_one_line(problems_of, changes, problem):
    """Each mistake is one line, with the place, the value and what is allowed."""
    assert problems_of(**changes) == [problem]


def test_allow_of_the_wrong_type_is_told_once(problems_of):
    """What is no list of names is told by the entry's own check, and nothing falls over it."""
    assert len(problems_of(allow="guidance_scale")) == 1
    assert len(problems_of(allow=[1])) == 1
    assert len(problems_of(pipeline=7)) == 1


def test_every_call_of_diffusers_can_be_read():
    """No class of diffusers, whatever its arguments, makes the reading of its source fail."""
    usable = 0
    for pipeline in pipeline_names():
        signature = read_signature(pipeline)
        if signature is not None and why_not_class(pipeline) is None:
            usable += 1
            params_of(pipeline, allowable_parameters(pipeline)).model_json_schema()
    assert usable > 50


def test_configuration_serves_generic_twins():
    """Both twins of the family are entries of the shipped registry, one with steps and one without."""
    config = Path(__file__).parents[2] / "config"
    keys = {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}
    registry = load_registry(load_settings(config, {"RESTAGE_ENV": "test", **keys}))
    twins = {entry.pipeline: entry.reports_progress for entry in registry if entry.family == "generic"}
    assert twins == {PIX2PIX: True, LONGCAT: False}
