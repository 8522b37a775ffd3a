"""The registry: what models.yaml may say, and how a request's parameters are resolved."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipelines.flux_kontext.params import Params as KontextParams
from pipelines.qwen_image_edit_plus.params import Params as QwenParams
from server.errors import ConfigError
from server.model_entry import families
from server.prompts import ModelPresets
from server.registry import InvalidParams, ModelEntry, ModelNotFound, Registry, load_registry, merge_params
from server.settings import Settings, load_settings

CONFIG_DIR = Path(__file__).parents[2] / "config"
SECRETS = {"RESTAGE__STORE__ACCESS_KEY": "access", "RESTAGE__STORE__SECRET_KEY": "secret"}
ENTRY: dict[str, Any] = {
    "id": "a",
    "name": "A",
    "description": "An entry.",
    "version": "1",
    "family": "qwen_image_edit_plus",
    "pipeline": "QwenImageEditPlusPipeline",
    "weights": "a",
    "license": "apache-2.0",
    "dtype": "bfloat16",
    "area": 1048576,
    "defaults": {"num_inference_steps": 8},
    "limits": {"num_inference_steps": [2, 50], "max_input_images": 2},
}

Load = Callable[..., Registry]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Give a function that loads the given entries, or text, with `enabled` models, the first as default."""

    def load_entries(content: object, enabled: tuple[str, ...] = ("a",)) -> Registry:
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (tmp_path / "models.yaml").write_text(text)
        models = {"default": enabled[0], "enabled": list(enabled)}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({"models": models}))
        (tmp_path / "local.yaml").write_text("")
        return load_registry(load_settings(tmp_path, SECRETS))

    return load_entries


@pytest.fixture
def local_settings() -> Settings:
    """Give the settings of a developer's machine."""
    return load_settings(CONFIG_DIR, {"RESTAGE_ENV": "local", **SECRETS})


def problems_of(load: Load, content: object, enabled: tuple[str, ...] = ("a",)) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(content, enabled)
    return [problem[problem.index("models.yaml") :] for problem in caught.value.problems]


def entry_of(**fields: Any) -> ModelEntry:
    return ModelEntry.model_validate({**ENTRY, **fields})


def test_shipped_models(local_settings: Settings) -> None:
    """The shipped registry must hold both real models and their twins, with what is known of them."""
    registry = load_registry(local_settings)

    assert registry.ids == [
        "qwen-image-edit-2511",
        "flux-kontext-dev",
        "tiny-qwen-image-edit-2511",
        "tiny-flux-kontext",
        "tiny-flux2-klein",
        "tiny-qwen-image-edit-2509",
        "tiny-qwen-image-edit",
        "tiny-instruct-pix2pix",
        "tiny-longcat-image-edit",
    ]
    qwen, kontext = registry.get("qwen-image-edit-2511"), registry.get("flux-kontext-dev")
    assert (qwen.pipeline, qwen.license, qwen.area) == ("QwenImageEditPlusPipeline", "apache-2.0", 1024 * 1024)
    assert (kontext.pipeline, kontext.area) == ("FluxKontextPipeline", 1024 * 1024)
    assert kontext.license == "flux-1-dev-non-commercial-license"
    assert kontext.source is not None
    assert kontext.source.repo == "black-forest-labs/FLUX.1-Kontext-dev"
    assert (qwen.max_input_images, kontext.max_input_images) == (3, 1)
    assert (qwen.has_negative_prompt, kontext.has_negative_prompt) == (True, False)
    assert qwen.resolve_params({}) == QwenParams(num_inference_steps=40, true_cfg_scale=4.0)
    assert kontext.resolve_params({}) == KontextParams(num_inference_steps=28, guidance_scale=2.5)
    for entry in registry:
        if entry.id.startswith("tiny-") and entry.id != "tiny-longcat-image-edit":  # it has an area of its own
            assert (entry.weights, entry.area, entry.dtype) == (entry.id, 128 * 128, "float32")
            assert entry.resolve_params({}).model_dump()["num_inference_steps"] == 4


def test_twins_are_not_served_in_production() -> None:
    """Only the local and test configuration may serve models whose weights are random."""
    registry = load_registry(load_settings(CONFIG_DIR, {"RESTAGE_ENV": "prod", **SECRETS}))

    assert registry.ids == ["qwen-image-edit-2511", "flux-kontext-dev"]
    with pytest.raises(ModelNotFound, match="there is no model 'tiny-flux-kontext'"):
        registry.get("tiny-flux-kontext")


def test_a_twin_has_its_model_s_family(local_settings: Settings) -> None:
    """A twin that ran other code than its model would prove nothing."""
    registry = load_registry(local_settings)

    for twin_id, model_id in (
        ("tiny-qwen-image-edit-2511", "qwen-image-edit-2511"),
        ("tiny-flux-kontext", "flux-kontext-dev"),
    ):
        twin, model = registry.get(twin_id), registry.get(model_id)
        assert (twin.family, twin.pipeline) == (model.family, model.pipeline)


def test_unknown_model_names_the_probable_one(local_settings: Settings) -> None:
    """A misspelt model must be answered with 404 and the id that was probably meant."""
    with pytest.raises(ModelNotFound, match="did you mean tiny-flux-kontext") as caught:
        load_registry(local_settings).get("tiny-flux-kontex")

    assert (caught.value.code, caught.value.http_status) == ("unknown_model", 404)


def test_enabled_models_are_served_in_their_order(load: Load) -> None:
    """The registry must keep exactly the enabled models, in the order of the setting."""
    entries = [{**ENTRY, "id": name} for name in ("a", "b", "c")]

    assert load(entries, ("c", "a")).ids == ["c", "a"]
    assert len(load(entries, ("b",))) == 1


def test_all_mistakes_are_told_at_once(load: Load) -> None:
    """Every mistake of every entry must be told at once, with line, path, value and what is allowed."""
    text = """\
- id: a
  name: A
  description: x
  version: 2511
  famil: flux_kontext
  family: flux_kontxt
  pipeline: FluxKontextPipeline
  weights: ../a
  license: x
  dtype: float8
  area: 100
- id: b
  name: B
  description: x
  version: "1"
  family: flux_kontext
  pipeline: FluxPipeline
  weights: b
  source: {repo: x, revision: main, branch: y}
  license: x
  dtype: float32
  area: 16384
  defaults: {num_inference_steps: 0, true_cfg_scale: 4.0}
  limits:
    guidance: [1, 2]
    num_inference_steps: [5, 1000]
    guidance_scale: 3
    max_input_images: 2
    aspect_ratio: [1, 2]
  optimizations: {compile: regonal}
  loras:
    - {id: x, name: X, weights: ../x.safetensors, license: none, scale: [1, 0], defaults: {guidance_scale: 99}}
    - {id: x, name: "", weights: x.bin, license: none, scale: [0, 3], scheduler: {shift: [1]}}
    - 7
  previous: [{version: "1", weights: old}, {version: "0", weights: a/b}]
- just text
- id: a
"""

    assert problems_of(load, text, ("a", "d")) == [
        "models.yaml:4: models[0].version = 2511: needs text, not empty; put it in quotes",
        "models.yaml:5: models[0].famil = 'flux_kontext': is unknown; did you mean family?",
        "models.yaml:6: models[0].family = 'flux_kontxt': is unknown; did you mean flux_kontext?",
        "models.yaml:8: models[0].weights = '../a': needs the name of a folder below models.weights_dir",
        "models.yaml:10: models[0].dtype = 'float8': needs bfloat16, float16 or float32",
        "models.yaml:11: models[0].area = 100: needs a whole number from 16384 to 16777216",
        (
            "models.yaml:17: models[1].pipeline = 'FluxPipeline': is unknown to the family flux_kontext; "
            "did you mean FluxKontextPipeline?"
        ),
        "models.yaml:19: models[1].source.repo = 'x': needs owner/name",
        "models.yaml:19: models[1].source.branch = 'y': is unknown; allowed are repo, revision",
        "models.yaml:23: models[1].defaults.num_inference_steps = 0: needs a whole number from 1 to 100",
        (
            "models.yaml:23: models[1].defaults.true_cfg_scale = 4.0: is unknown; allowed are aspect_ratio, "
            "guidance_scale, height, num_inference_steps, seed, width"
        ),
        "models.yaml:25: models[1].limits.guidance = a list: is unknown; did you mean guidance_scale?",
        (
            "models.yaml:26: models[1].limits.num_inference_steps = a list: needs [lowest, highest], each a whole "
            "number from 1 to 100"
        ),
        "models.yaml:27: models[1].limits.guidance_scale = 3: needs [lowest, highest], each a number from 0.0 to 20.0",
        "models.yaml:28: models[1].limits.max_input_images = 2: needs a whole number from 1 to 1",
        (
            "models.yaml:29: models[1].limits.aspect_ratio = a list: is unknown; allowed are guidance_scale, height, "
            "max_input_images, num_inference_steps, seed, width"
        ),
        "models.yaml:30: models[1].optimizations.compile = 'regonal': needs none or regional",
        (
            "models.yaml:32: models[1].loras[0].weights = '../x.safetensors': needs the path of a .safetensors file "
            "below models.weights_dir, without `..`"
        ),
        "models.yaml:32: models[1].loras[0].scale = a list: needs [lowest, highest]",
        "models.yaml:32: models[1].loras[0].defaults.guidance_scale = 99: needs a number from 0.0 to 20.0",
        "models.yaml:33: models[1].loras[1].name = '': needs text, not empty",
        (
            "models.yaml:33: models[1].loras[1].weights = 'x.bin': needs the path of a .safetensors file below "
            "models.weights_dir, without `..`"
        ),
        "models.yaml:33: models[1].loras[1].scale[1] = 3: needs a number from -2.0 to 2.0",
        "models.yaml:33: models[1].loras[1].scheduler.shift = a list: needs a number, text, true, false or null",
        "models.yaml:33: models[1].loras[1].id = 'x': is the id of loras[0] already",
        (
            "models.yaml:34: models[1].loras[2] = 7: needs a mapping with the keys id, name, description, weights, "
            "source, license, scale, defaults, scheduler"
        ),
        "models.yaml:35: models[1].previous[1].weights = 'a/b': needs the name of a folder below models.weights_dir",
        "models.yaml:35: models[1].previous[0].version = '1': is a version of this entry already; each has its own",
        "models.yaml:36: models[2] = 'just text': needs a model: a mapping that begins with `id:`",
        *(
            f"models.yaml:37: models[3].{name}: is missing; needs {needs}"
            for name, needs in (
                ("name", "text, not empty"),
                ("description", "text, not empty"),
                ("version", "text, not empty"),
                ("family", "text"),
                ("pipeline", "text"),
                ("weights", "text"),
                ("license", "text, not empty"),
                ("dtype", "bfloat16, float16 or float32"),
                ("area", "a whole number from 16384 to 16777216"),
            )
        ),
        "models.yaml:37: models[3].id = 'a': is the id of models[0] already",
        "models.yaml: models.enabled = 'd': is no entry of this file; allowed are a, a, b",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "models.yaml:1: needs a list of models, each beginning with `- id:`"),
        ("a: {}", "models.yaml:1: needs a list of models, each beginning with `- id:`"),
        ("[]", "models.yaml: models.enabled = 'a': is no entry of this file; allowed are none"),
        ("- id: a\n  id: b", "models.yaml:2: models[0].id: is given twice, first in line 1"),
        ("- {id: a", "models.yaml:1: is not YAML: did not find expected ',' or '}'"),
    ],
)
def test_odd_files_are_told(load: Load, text: str, problem: str) -> None:
    """A file that is no list of models must be told with its line."""
    assert problem in problems_of(load, text)


def test_missing_file_is_told(load: Load, tmp_path: Path) -> None:
    """A registry that is not there must be told by its path."""
    load([ENTRY])
    (tmp_path / "models.yaml").unlink()

    with pytest.raises(ConfigError, match=r"models.yaml: no such file or directory"):
        load_registry(load_settings(tmp_path, SECRETS))


def test_default_must_be_enabled(load: Load, tmp_path: Path) -> None:
    """A default model that is not served must be told, as every request without a model would fail."""
    load([ENTRY])

    with pytest.raises(ConfigError, match=r"models.default = 'b': is not among models.enabled; allowed are a"):
        load_registry(load_settings(tmp_path, {"RESTAGE__MODELS__DEFAULT": "b", **SECRETS}))


PRESET_MISTAKES = """\
  presets:
    wrap: "{preset} and {preset}"
    wraps: x
    replace:
      livingroom:
        modern: A sofa.
      bedroom:
        moderne: A bed.
        industrial: " "
        traditional: 3
        scandinavian:
      kitchen: Stools.
      3:
        modern: x
      office:
        modern: One.
        modern: Two.
"""


def test_all_mistakes_of_presets_are_told(load: Load) -> None:
    """Unknown, empty, wrongly typed and doubled presets, and a placeholder that stands twice, have their lines."""
    start = yaml.safe_dump([ENTRY], sort_keys=False)
    first = len(start.splitlines())
    rooms = "bathroom, bedroom, default, dining_room, entryway, kitchen, living_room, office, outdoor"

    assert problems_of(load, start + PRESET_MISTAKES) == [
        f"models.yaml:{first + line}: models[0].presets.{problem}"
        for line, problem in (
            (2, "wrap: needs {preset} once"),
            (3, "wraps = 'x': is unknown; did you mean wrap?"),
            (5, "replace.livingroom: is unknown; did you mean living_room?"),
            (8, "replace.bedroom.moderne: is unknown; did you mean modern?"),
            (9, "replace.bedroom.industrial: needs text, not empty"),
            (10, "replace.bedroom.traditional = 3: needs text; put it in quotes"),
            (11, "replace.bedroom.scandinavian = null: needs text"),
            (12, "replace.kitchen = 'Stools.': needs a mapping of names to values"),
            (13, f"replace[3]: is unknown; allowed are {rooms}"),
            (17, f"replace.office.modern: is given twice, first in line {first + 16}"),
        )
    ]


@pytest.mark.parametrize(
    ("presets", "problem"),
    [
        (None, " = null: needs a mapping with the keys wrap, replace"),
        ([], " = a list: needs a mapping with the keys wrap, replace"),
        ({"wrap": None}, ".wrap = null: needs text"),
        ({"wrap": ""}, ".wrap: needs {preset} once"),
        ({"wrap": "{room} in {style}"}, ".wrap: needs {preset} once"),
        ({"replace": "Everything."}, ".replace = 'Everything.': needs a mapping of names to values"),
    ],
)
def test_odd_presets_are_told(load: Load, presets: object, problem: str) -> None:
    """Presets of another shape must be told, not stop the loader."""
    (found,) = problems_of(load, [{**ENTRY, "presets": presets}])

    assert found.partition("models[0].presets")[2] == problem


def test_presets_are_read_as_they_are_written(load: Load) -> None:
    """What an entry says about prompts reaches the model, other braces included; an entry may say nothing."""
    presets = {"wrap": "{preset} {style}", "replace": {"office": {"modern": "{x} {preset} {preset}"}, "outdoor": {}}}
    registry = load(
        [{**ENTRY, "presets": presets}, {**ENTRY, "id": "b"}, {**ENTRY, "id": "c", "presets": {}}], ("a", "b", "c")
    )

    assert registry.get("a").presets.model_dump() == presets
    assert registry.get("b").presets == registry.get("c").presets == ModelPresets()


def test_the_example_of_presets_loads(load: Load) -> None:
    """What the head of models.yaml shows must work as it stands there."""
    head = (CONFIG_DIR / "models.yaml").read_text().partition("\n\n")[0]
    example = textwrap.dedent(head.partition("such as\n")[2].replace("#", ""))

    presets = load([{**ENTRY, **yaml.safe_load(example)}]).get("a").presets

    assert presets.wrap != ModelPresets().wrap
    assert presets.replace["outdoor"]["modern"]


@pytest.mark.parametrize("defaults", [{}, {"num_inference_steps": 60}])
def test_limits_must_allow_the_default(load: Load, defaults: dict[str, Any]) -> None:
    """Limits that exclude a default, the entry's or the family's, must be told: no request could leave it out."""
    entry = {**ENTRY, "defaults": defaults, "limits": {"num_inference_steps": [2, 10]}}
    steps = defaults.get("num_inference_steps", 40)

    (problem,) = problems_of(load, [entry])

    assert problem == (
        f"models.yaml:{13 + len(defaults)}: models[0].limits.num_inference_steps: excludes the default: "
        f"num_inference_steps needs a whole number from 2 to 10, not {steps}"
    )


def test_a_request_lies_over_the_defaults() -> None:
    """What a request gives must win, field by field, over the entry's defaults, and those over the family's."""
    params = entry_of().resolve_params({"true_cfg_scale": 2, "seed": 7})

    assert params == QwenParams(num_inference_steps=8, true_cfg_scale=2.0, seed=7)
    assert entry_of().resolve_params({"num_inference_steps": 9}) == QwenParams(num_inference_steps=9)


def test_all_wrong_parameters_are_told_at_once() -> None:
    """Each wrong parameter must be told by JSON pointer, with the range of this model, not only of its family."""
    requested = {"num_inference_steps": 60, "true_cfg_scale": "3", "sed": 1, "a/b~": 2, "aspect_ratio": "7:1"}

    with pytest.raises(InvalidParams) as caught:
        entry_of().resolve_params(requested)

    errors = {error.location: (error.code, error.detail) for error in caught.value.errors}
    assert errors == {
        "/num_inference_steps": ("invalid_value", "needs a whole number from 2 to 50, not 60"),
        "/true_cfg_scale": ("invalid_value", "needs a number from 1.0 to 20.0, not '3'"),
        "/sed": ("unknown_field", "is unknown; did you mean seed?"),
        "/a~1b~0": (
            "unknown_field",
            "is unknown; allowed are aspect_ratio, height, num_inference_steps, seed, true_cfg_scale, width",
        ),
        "/aspect_ratio": (
            "invalid_value",
            "needs match_input, 16:9, 4:3, 3:2, 1:1, 2:3, 3:4 or 9:16, not '7:1'",
        ),
    }
    assert (caught.value.code, caught.value.http_status) == ("invalid_params", 422)
    assert caught.value.detail.startswith("a does not take these parameters: /")
    assert "; /num_inference_steps needs a whole number from 2 to 50, not 60" in caught.value.detail


def test_a_null_is_as_good_as_left_out() -> None:
    """A null must leave the entry's default in place, and under an unknown name must be told as a mistyped one."""
    entry = entry_of(defaults={"num_inference_steps": 8, "width": 640, "height": 320})
    nulls = dict.fromkeys(QwenParams.model_fields)

    assert entry.resolve_params(nulls) == entry.resolve_params({})
    assert entry.resolve_params(nulls).num_inference_steps == 8  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InvalidParams, match="/sed is unknown; did you mean seed") as caught:
        entry.resolve_params({"sed": None, "seed": None})
    assert len(caught.value.errors) == 1


def test_parameters_that_do_not_go_together_are_told() -> None:
    """A mistake of several parameters together must be told at the parameters as a whole."""
    with pytest.raises(InvalidParams) as caught:
        entry_of().resolve_params({"width": 512})

    assert [(error.location, error.detail) for error in caught.value.errors] == [
        ("", "width and height go together: give both or neither")
    ]


def test_absurd_requests_are_refused_quickly() -> None:
    """Very many or very long parameters must be refused with a short answer."""
    many = {f"p{number}": number for number in range(10_000)}
    with pytest.raises(InvalidParams) as caught:
        entry_of().resolve_params(many)
    assert len(caught.value.errors) == 1

    with pytest.raises(InvalidParams) as caught:
        entry_of().resolve_params({"x" * 1_000_000: "y" * 1_000_000, "seed": "z" * 1_000_000})
    assert len(caught.value.detail) < 1000
    with pytest.raises(ModelNotFound) as not_found:
        Registry([entry_of()]).get("x" * 1_000_000)
    assert len(not_found.value.detail) < 200


def test_sizes_replace_one_another() -> None:
    """A size in one form must take the place of an inherited other form, or no request could leave a default."""
    assert merge_params({"aspect_ratio": "16:9", "seed": 1}, {"width": 64, "height": 64}) == {
        "width": 64,
        "height": 64,
        "seed": 1,
    }
    assert merge_params({"width": 64, "height": 64}, {"aspect_ratio": "1:1"}) == {"aspect_ratio": "1:1"}
    assert merge_params({"width": 64, "height": 64}, {"width": 128}) == {"width": 128, "height": 64}
    assert merge_params({"width": 64, "height": 64}, {"aspect_ratio": None, "seed": 1}) == {
        "width": 64,
        "height": 64,
        "aspect_ratio": None,
        "seed": 1,
    }


def test_every_family_describes_itself() -> None:
    """Each folder of a family must name its pipeline classes, and defaults that its own parameters take."""
    assert families() == ("flux2_klein", "flux_kontext", "generic", "qwen_image_edit", "qwen_image_edit_plus")
    for family in families():
        params_model = entry_of(family=family).params_model
        assert params_model.PIPELINES
        assert params_model.MAX_INPUT_IMAGES >= 1
        assert params_model.model_validate(params_model().model_dump()) == params_model()


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from([*QwenParams.model_fields, "guidance_scale", ""]), VALUES))
@hypothesis_settings(deadline=None)
def test_parameters_are_resolved_or_each_is_told(requested: dict[str, Any]) -> None:
    """Whatever is asked, the answer must be parameters within the limits that repeat the request, or its mistakes.

    A null is as good as left out.
    """
    entry = entry_of()
    try:
        params = entry.resolve_params(requested).model_dump()
    except InvalidParams as error:
        locations = [mistake.location for mistake in error.errors]
        told = len(locations) == len(set(locations)) > 0 and set(locations) <= {"", *(f"/{name}" for name in requested)}
    else:
        given = {name: value for name, value in requested.items() if value is not None}
        expected = entry.resolve_params({}).model_dump() | given
        told = 2 <= params["num_inference_steps"] <= 50 and params == expected

    assert told


@given(st.binary(max_size=150) | st.text(max_size=150).map(lambda text: text.encode("utf-8", "replace")))
@hypothesis_settings(deadline=None)
def test_no_bytes_break_the_loader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever bytes the file holds, the answer must be a ConfigError with lines to read."""
    folder = tmp_path_factory.getbasetemp() / "any-registry"
    folder.mkdir(exist_ok=True)
    (folder / "models.yaml").write_bytes(content)
    for name in ("base", "local"):
        (folder / f"{name}.yaml").write_text("")

    with pytest.raises(ConfigError) as caught:
        load_registry(load_settings(folder, SECRETS))
    assert all("models.yaml" in problem and "\n" not in problem for problem in caught.value.problems)


FIRST_BLOCK = {"kind": "first_block"}


@pytest.mark.parametrize(
    ("optimizations", "problem"),
    [
        ({"compil": "regional"}, ".compil = 'regional': is unknown; did you mean compile?"),
        ("fast", " = 'fast': needs a mapping with the keys compile, attention, quantization, layerwise_casting, "),
        ({"vae_tiling": "yes"}, ".vae_tiling = 'yes': needs true or false"),
        (
            {"cache": "magcache"},
            ".cache = 'magcache': needs none, or a mapping with `kind: magcache, first_block or ta",
        ),
        ({"cache": {"kind": "pab"}}, ".cache.kind = 'pab': needs none, or a mapping with `kind: magcache, first_block"),
        ({"cache": {"kind": "first_block", "threshold": 2}}, ".cache.threshold = 2: needs a number from 0 to 1"),
        (
            {"cache": {"kind": "taylorseer", "x": 1}},
            ".cache.x = 1: is unknown; allowed are cache_interval, kind, max_o",
        ),
        ({"cache": {"kind": "magcache"}}, ".cache.ratios: is missing; magcache needs what was measured of the model"),
        ({"quantization": "int8", "layerwise_casting": "fp8"}, ".quantization: does not go with layerwise_casting: b"),
        (
            {"cache": FIRST_BLOCK, "offload": "group"},
            ".cache: does not go with offload: the hooks of both are on the same",
        ),
        ({"compile": "regional"}, ".compile: does not go with loras: each other choice of them would be compiled"),
    ],
)
def test_wrong_optimizations(load: Load, optimizations: object, problem: str) -> None:
    """A mistake in an entry's optimizations, or two that do not go together, is told in one line with its place."""
    lora = {"id": "x", "name": "X", "weights": "x.safetensors", "license": "none"}
    (found,) = problems_of(load, [{**ENTRY, "optimizations": optimizations, "loras": [lora]}])
    assert f"models[0].optimizations{problem}" in found


def test_no_network_attention(load: Load) -> None:
    """What fetches its code from the network is no attention that an entry may name."""
    (found,) = problems_of(load, [{**ENTRY, "optimizations": {"attention": "flash_hub"}}])
    assert "optimizations.attention = 'flash_hub': needs native, _native_cudnn, " in found


@pytest.mark.parametrize(
    ("pipeline", "family", "kind"),
    [("FluxKontextPipeline", "flux_kontext", "first_block"), ("LongCatImageEditPipeline", "generic", "taylorseer")],
)
def test_step_caches_that_break(load: Load, pipeline: str, family: str, kind: str) -> None:
    """A step cache that fails with a class, or that nobody has tried with it, is refused with what there is."""
    limits = {"num_inference_steps": [2, 50]}
    entry = ENTRY | {
        "family": family,
        "pipeline": pipeline,
        "limits": limits,
        "optimizations": {"cache": {"kind": kind}},
    }
    (found,) = problems_of(load, [entry])
    assert f"models[0].optimizations.cache.kind: does not work with {pipeline}; " in found


def test_optimizations_that_are_done() -> None:
    """Only what differs from the pipeline by itself is in a job's record; a step cache excludes other runs."""
    cache = {"kind": "first_block", "threshold": 0.1}
    entry = entry_of(optimizations={"compile": "none", "attention": "_native_math", "cache": cache})
    assert entry.optimizations.applied == {"attention": "_native_math", "cache": cache}
    assert entry.optimizations.exclusive
    assert entry_of().optimizations.applied == {}
    assert not entry_of(optimizations={"compile": "regional"}).optimizations.exclusive
