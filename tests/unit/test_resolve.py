"""From an item and its defaults to a job: item over defaults over the model's own, field by field, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.jobs import Job, JobInput, OutputSpec, Priority
from server.model_entry import ModelEntry
from server.prompts import Prompts
from server.registry import Registry
from server.submit.refusals import ItemRefused
from server.submit.request import BatchRequest
from server.submit.resolve import Resolver

PROMPTS = Prompts.load(Path(__file__).parents[2] / "config")
PHOTO = JobInput("x", "x", "etag", None, "image/jpeg", 1000, height=300, width=400)
FIELDS: dict[str, Any] = {
    "name": "A",
    "description": "An entry.",
    "version": "1",
    "weights": "a",
    "license": "none",
    "dtype": "float32",
    "area": 16384,
}
QWEN = ModelEntry.model_validate(
    {
        **FIELDS,
        "id": "qwen",
        "family": "qwen_image_edit_plus",
        "pipeline": "QwenImageEditPlusPipeline",
        "defaults": {"num_inference_steps": 8, "aspect_ratio": "4:3"},
        "presets": {"wrap": "Qwen, {preset}", "replace": {"bedroom": {"modern": "Qwen's bedroom."}}},
    }
)
LORAS = {
    "oak": {"scale": [-1, 1], "defaults": {"guidance_scale": 1.5, "aspect_ratio": "1:1"}},
    "ash": {"defaults": {"guidance_scale": 2.0, "num_inference_steps": 4}, "scheduler": {"shift": 2.0}},
    "elm": {"scheduler": {"shift": 4.0}},
}
FLUX = ModelEntry.model_validate(
    {
        **FIELDS,
        "id": "flux",
        "family": "flux_kontext",
        "pipeline": "FluxKontextPipeline",
        "defaults": {"guidance_scale": 3.0, "width": 512, "height": 256},
        "loras": [
            {"id": lora_id, "name": lora_id, "weights": f"{lora_id}.safetensors", "license": "none", **fields}
            for lora_id, fields in LORAS.items()
        ],
    }
)
OLD = FLUX.model_copy(update={"id": "old", "retired": True})
MODELS = {entry.id: entry for entry in (QWEN, FLUX)}
RESOLVER = Resolver(Registry([QWEN, FLUX, OLD]), PROMPTS, default_model="qwen", max_prompt_characters=100)


def resolve(defaults: dict[str, Any], item: dict[str, Any]) -> Job:
    request = BatchRequest.model_validate({"defaults": defaults, "items": [{"upload_id": "x", **item}]})
    draft = RESOLVER.draft(0, request.items[0], request.defaults)
    return draft.complete([PHOTO], owner="ada", priority=Priority.NORMAL)


def refusal(defaults: dict[str, Any], item: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ItemRefused) as caught:
        resolve(defaults, item)
    return caught.value.error.code, caught.value.error.detail


def nullable(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


PARAMS = {
    "seed": st.integers(0, 9),
    "num_inference_steps": st.integers(2, 9),
    "true_cfg_scale": st.sampled_from([1, 2.5]),
    "guidance_scale": st.sampled_from([0, 4.5]),
    "aspect_ratio": st.sampled_from(["match_input", "1:1", "16:9"]),
    "width": st.sampled_from([64, 128]),
    "height": st.sampled_from([64, 128]),
}
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "model": nullable(st.sampled_from(["qwen", "flux"])),
        "room_type": nullable(st.sampled_from(["bedroom", "office"])),
        "style": nullable(st.sampled_from(["modern", "industrial"])),
        "prompt": nullable(st.sampled_from(["One.", "Two."])),
        "negative_prompt": nullable(st.sampled_from(["people", ""])),
        "params": nullable(st.fixed_dictionaries({}, optional={name: nullable(one) for name, one in PARAMS.items()})),
        "loras": nullable(
            st.lists(st.sampled_from(["oak", "ash"]), unique=True, max_size=2).map(
                lambda ids: [{"id": one, "scale": -0.5} if one == "oak" else {"id": one} for one in ids]
            )
        ),
        "output": nullable(
            st.fixed_dictionaries(
                {},
                optional={
                    "format": nullable(st.sampled_from(["png", "jpeg"])),
                    "quality": nullable(st.integers(1, 100)),
                    "size": nullable(st.sampled_from(["model", "input"])),
                    "metadata": nullable(st.booleans()),
                },
            )
        ),
    },
)
SIZES = {"width", "height"}


def expected_field(name: str, item: dict[str, Any], defaults: dict[str, Any], otherwise: Any) -> Any:
    """The rule in other words: who names a field decides on it, and null is nothing."""
    value = item[name] if name in item else defaults.get(name)
    return otherwise if value is None else value


def expected_params(entry: ModelEntry, item: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Go through item, defaults and model from the top; the first to name a parameter, or a form of size, has it."""
    own, shared = item.get("params", {}), defaults.get("params") or {}
    levels = [{}, {}] if own is None else [own, {name: value for name, value in shared.items() if name not in own}]
    if own is not None:
        levels[0] = {name: value for name, value in own.items() if value is not None or name not in shared}
    found: dict[str, Any] = {}
    chosen = [LORAS[lora["id"]].get("defaults", {}) for lora in reversed(expected_field("loras", item, defaults, []))]
    for level in [*levels, *chosen, entry.defaults]:
        taken = {"aspect_ratio"} if SIZES & found.keys() and "aspect_ratio" not in found else set[str]()
        if "aspect_ratio" in found:
            taken = SIZES
        named = {
            name: value
            for name, value in level.items()
            if value is not None or name not in entry.params_model.model_fields
        }
        found |= {name: value for name, value in named.items() if name not in found.keys() | taken}
    return found


@given(SETTINGS, SETTINGS)
@hypothesis_settings(deadline=None, max_examples=400)
def test_an_item_lies_over_defaults_over_the_model(defaults: dict[str, Any], item: dict[str, Any]) -> None:
    """Whatever is combined, the job is what the rule says, or the item is refused for a reason that the rule gives."""
    entry = MODELS[expected_field("model", item, defaults, "qwen")]
    negative_prompt = expected_field("negative_prompt", item, defaults, None)
    loras = expected_field("loras", item, defaults, [])
    reasons = {"unknown_lora"} if loras and entry is QWEN else set[str]()
    params = None
    try:
        params = None if reasons else entry.params_model.model_validate(expected_params(entry, item, defaults))
    except ValidationError:
        reasons.add("invalid_params")
    has_no_effect = entry is FLUX or (params is not None and negative_prompt and not params.uses_negative_prompt)
    if negative_prompt is not None and has_no_effect:
        reasons.add("negative_prompt_not_supported")
    if reasons:
        assert refusal(defaults, item)[0] in reasons
        return
    job = resolve(defaults, item)
    room_type = expected_field("room_type", item, defaults, "default")
    style = expected_field("style", item, defaults, "modern")
    preset = PROMPTS.render(room_type, style, entry.presets)
    own, shared = item.get("output", {}), defaults.get("output") or {}
    output = {} if own is None else {name: value for name, value in (shared | own).items() if value is not None}
    assert params is not None
    assert (job.model, job.prompt) == (entry.id, expected_field("prompt", item, defaults, preset))
    assert job.negative_prompt == negative_prompt
    assert job.loras == tuple({"scale": 1.0, **lora} for lora in loras)
    assert job.output_spec == OutputSpec(**output)
    named = {name: value for name, value in params.model_dump().items() if value is not None}
    assert named.items() <= job.params.items()
    assert job.params.keys() == entry.params_model.model_fields.keys()
    assert None not in job.params.values()


def test_what_nobody_names_is_in_the_record() -> None:
    """Of an empty item the record names model, prompt, output, and every parameter; only the seed differs."""
    one, other = resolve({}, {}), resolve({}, {})

    assert (one.model, one.model_version, one.prompt) == ("qwen", "1", f"Qwen, {PROMPTS.render('default', 'modern')}")
    assert (one.negative_prompt, one.loras, one.output_spec) == (None, (), OutputSpec())
    seed = one.params["seed"]
    assert one.params == {
        "seed": seed,
        "num_inference_steps": 8,
        "true_cfg_scale": 4.0,
        "aspect_ratio": "4:3",
        "height": 112,
        "width": 144,
    }
    assert seed != other.params["seed"]


def test_a_resolved_record_may_be_sent_again() -> None:
    """The parameters of a job, sent as they are, must give the same job, whatever size the model prefers."""
    for model in MODELS:
        for size in ({}, {"aspect_ratio": "16:9"}, {"width": 96, "height": 64}):
            first = resolve({"model": model}, {"params": size})
            again = resolve({"model": model, "params": first.params}, {"params": first.params})
            assert (again.params, again.prompt) == (first.params, first.prompt)


def test_a_null_takes_a_parameter_of_another_model_away() -> None:
    """An item of another model need not give up all shared parameters for the one that its model does not know."""
    defaults = {"model": "qwen", "params": {"true_cfg_scale": 2.0, "seed": 3, "width": 64, "height": 64}}

    assert refusal(defaults, {"model": "flux"})[0] == "invalid_params"
    job = resolve(defaults, {"model": "flux", "params": {"true_cfg_scale": None}})
    assert (job.params["seed"], job.params["width"]) == (3, 64)
    code, detail = refusal(defaults, {"params": {"sed": None}})
    assert (code, "did you mean seed?" in detail) == ("invalid_params", True)


def test_presets_are_those_of_the_item_s_model() -> None:
    """The record must hold the prompt as the item's model wraps or replaces it; a client's prompt stays as it is."""
    assert resolve({"room_type": "bedroom"}, {}).prompt == "Qwen's bedroom."
    assert resolve({"room_type": "bedroom"}, {"model": "flux"}).prompt == PROMPTS.render("bedroom", "modern")
    assert resolve({"room_type": "bedroom"}, {"prompt": "Mine."}).prompt == "Mine."


def test_an_unknown_lora_is_answered_with_those_that_there_are() -> None:
    """The text must name what was asked for, of which model, and what it has."""
    assert refusal({}, {"loras": [{"id": "oak"}]}) == (
        "unknown_lora",
        "model qwen has no LoRA 'oak'; allowed are none",
    )
    code, detail = refusal({"model": "flux", "loras": [{"id": "ash"}, {"id": "oaks"}]}, {})
    assert (code, detail) == ("unknown_lora", "model flux has no LoRA 'oaks'; did you mean oak?")
    assert resolve({"loras": [{"id": "pine"}]}, {"loras": []}).loras == ()
    assert resolve({"loras": [{"id": "pine"}]}, {"loras": None}).loras == ()


@pytest.mark.parametrize(
    ("loras", "code", "detail"),
    [
        ([{"id": "ash", "scale": 1.2}], "invalid_loras", "scale of ash needs a number from 0.0 to 1.0, not 1.2"),
        ([{"id": "oak", "scale": -1.1}], "invalid_loras", "scale of oak needs a number from -1.0 to 1.0, not -1.1"),
        (
            [{"id": "ash"}, {"id": "oak"}, {"id": "elm"}],
            "invalid_loras",
            "ash and elm each need a schedule of their own; choose one of them",
        ),
    ],
)
def test_loras_are_used_as_their_entries_say(loras: list[dict[str, Any]], code: str, detail: str) -> None:
    """A scale out of range, and two LoRAs that want other schedules, are refused with what is allowed."""
    assert refusal({"model": "flux"}, {"loras": loras}) == (code, detail)


def test_a_lora_brings_its_parameters() -> None:
    """What a LoRA was trained for lies over the model's defaults, and what a request says over it."""
    job = resolve({"model": "flux"}, {"loras": [{"id": "ash", "scale": 0.5}]})
    assert (job.params["num_inference_steps"], job.params["guidance_scale"], job.params["width"]) == (4, 2.0, 512)
    assert job.loras == ({"id": "ash", "scale": 0.5},)
    both = resolve({"model": "flux"}, {"loras": [{"id": "ash"}, {"id": "oak"}], "params": {"num_inference_steps": 9}})
    assert (both.params["num_inference_steps"], both.params["guidance_scale"]) == (9, 1.5)
    assert both.params["aspect_ratio"] == "1:1"
    assert both.params["width"] == both.params["height"] == 128


def test_a_retired_model_takes_no_new_jobs() -> None:
    """The answer names the models that do."""
    assert refusal({"model": "old"}, {}) == ("model_retired", "model old takes no new jobs; there are qwen, flux")
