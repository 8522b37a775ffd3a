"""One model as an operator describes it in models.yaml, and what a request may ask of it."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipelines.optimization_params import Optimizations
from pipelines.sizes import MIN_AREA, SizeParams
from server.config.allowed import allowed_values, explain, shown
from server.config.files import KeyPath
from server.errors import FieldError, InvalidRequest, json_pointer
from server.prompts import ModelPresets

GENERIC = "generic"
MAX_AREA = 4096 * 4096
MAX_LORAS = 32
MAX_LORA_SCALE = 2.0
MAX_PREVIOUS = 8
_ID = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_ID_IN_WORDS = "1 to 64 lower-case letters, digits, dots, hyphens and underscores, the first a letter or digit"
_WEIGHTS_FOLDER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_WEIGHTS_FOLDER_IN_WORDS = "the name of a folder below models.weights_dir"
# No part begins with a dot, so none is `..`.
_WEIGHTS_FILE = r"^([A-Za-z0-9][A-Za-z0-9._-]*/){0,4}[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$"
# More than any family has.
MAX_PARAMS = 64
# The one limit that is no parameter.
MAX_INPUT_IMAGES = "max_input_images"
# Parameter → lowest and highest value.
Bounds = dict[str, tuple[float, float]]


def _check_plain(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("needs a number, text, true, false or null")
    return value


class InvalidParams(InvalidRequest):
    """Raised when parameters are unknown to a model or out of its range; locations are relative to `params`."""

    code = "invalid_params"
    title = "The model does not take these parameters"

    def __init__(self, model: str, errors: tuple[FieldError, ...]) -> None:
        summary = "; ".join(f"{mistake.location or 'params'} {mistake.detail}" for mistake in errors)
        super().__init__(f"{model} does not take these parameters: {summary}", errors)
        self.model = model


class Source(BaseModel):
    """Where weights can be fetched from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", description="owner/name")
    revision: str = Field(min_length=1)


class LoraSource(Source):
    """Where a LoRA can be fetched from."""

    file: str = Field(pattern=_WEIGHTS_FILE, description="the path of a .safetensors file in the repository")


class LoraEntry(BaseModel):
    """A LoRA that jobs of its model may choose.

    Attributes:
        weights: file below `models.weights_dir`.
        scale: lowest and highest scale that a job may ask for.
        defaults: parameters for jobs that choose it; they lie over the model's defaults, and a request's over them.
        scheduler: values of the scheduler's configuration that it was trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=_ID, description=_ID_IN_WORDS)
    name: str = Field(min_length=1)
    description: str = Field(default="", description="What it is for.")
    weights: str = Field(
        pattern=_WEIGHTS_FILE, description="the path of a .safetensors file below models.weights_dir, without `..`"
    )
    source: LoraSource | None = None
    license: str = Field(min_length=1)
    scale: list[Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)]] = Field(
        default=[0.0, 1.0], min_length=2, max_length=2
    )
    defaults: dict[str, Any] = {}
    scheduler: dict[str, Annotated[Any, AfterValidator(_check_plain)]] = {}


class PreviousVersion(BaseModel):
    """A version that the entry had before, kept so that jobs that were accepted for it still run on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(min_length=1)
    weights: str = Field(pattern=_WEIGHTS_FOLDER, description=_WEIGHTS_FOLDER_IN_WORDS)


class ModelEntry(BaseModel):
    """One model of the registry.

    Attributes:
        family: folder of `pipelines` that builds this model's calls.
        pipeline: class in diffusers.
        weights: folder below `models.weights_dir`.
        area: pixels that the model was trained on; its outputs and what it reads of a photo follow it.
        defaults: parameters for requests that leave them out; they lie over the family's own defaults.
        limits: parameter → [lowest, highest], within the family's own range; `max_input_images` → a number.
        allow: for the family `generic`: the parameters of the class that a request may set.
        presets: what this model wants of the prompts otherwise.
        license_note: what to know before the pictures are used, such as that the licence forbids selling them.
        loras: what jobs may lay over the model.
        previous: versions that were replaced; jobs that were accepted for one of them run on it, all others fail.
        retired: takes no new jobs; those that were accepted still run.
        optimizations: how it is run otherwise than its pipeline does by itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=_ID, description=_ID_IN_WORDS)
    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    version: str = Field(min_length=1)
    family: str
    pipeline: str
    weights: str = Field(pattern=_WEIGHTS_FOLDER, description=_WEIGHTS_FOLDER_IN_WORDS)
    source: Source | None = None
    license: str = Field(min_length=1)
    license_note: str | None = Field(default=None, min_length=1)
    dtype: Literal["bfloat16", "float16", "float32"]
    area: int = Field(ge=MIN_AREA, le=MAX_AREA)
    defaults: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    allow: list[str] = Field(default=[], max_length=MAX_PARAMS)
    presets: ModelPresets = ModelPresets()
    loras: list[LoraEntry] = Field(default=[], max_length=MAX_LORAS)
    previous: list[PreviousVersion] = Field(default=[], max_length=MAX_PREVIOUS)
    retired: bool = False
    optimizations: Optimizations = Optimizations()

    @property
    def params_model(self) -> type[SizeParams]:
        """The parameters that the family takes."""
        return params_of_family(self.family, self.pipeline, tuple(self.allow))

    @property
    def params_schema(self) -> dict[str, Any]:
        """The JSON Schema of `params` as clients see it: the family's, with this entry's limits and defaults."""
        schema = self.params_model.model_json_schema()
        for name, (low, high) in self.bounds.items():
            _narrow(schema["properties"][name], low, high)
        for name, value in self.defaults.items():
            schema["properties"][name]["default"] = value
        return schema

    @property
    def reports_progress(self) -> bool:
        """Whether its runs can be followed, and stopped, between two steps."""
        return self.params_model.REPORTS_STEPS

    @property
    def max_input_images(self) -> int:
        """How many photos one job may have; one, where only the entry could know how many its class takes."""
        most = 1 if self.family == GENERIC else self.params_model.MAX_INPUT_IMAGES
        return int(self.limits.get(MAX_INPUT_IMAGES, most))

    @property
    def has_negative_prompt(self) -> bool:
        """Whether a negative prompt changes anything."""
        return self.params_model.HAS_NEGATIVE_PROMPT

    @property
    def bounds(self) -> Bounds:
        """The limits of parameters, which narrow the family's own ranges."""
        return {name: (limit[0], limit[1]) for name, limit in self.limits.items() if name != MAX_INPUT_IMAGES}

    def lora(self, lora_id: str) -> LoraEntry | None:
        """Find one of the LoRAs."""
        return next((lora for lora in self.loras if lora.id == lora_id), None)

    def resolve_params(self, requested: Mapping[str, Any], loras: Sequence[LoraEntry] = ()) -> SizeParams:
        """Lay a request's parameters over the entry's defaults and those of the chosen LoRAs, and check all of them.

        Args:
            requested: plain JSON values; null is as good as left out.
            loras: those that the request chose; where two of them name the same parameter, the later one's counts.

        Returns:
            An instance of `params_model`.

        Raises:
            InvalidParams: with one FieldError for each mistake.
        """
        known = self.params_model.model_fields
        # A null under an unknown name stays: it is probably a mistyped one, and is told.
        given = {name: value for name, value in requested.items() if value is not None or name not in known}
        # From the top, so that what a LoRA says of the size takes nothing away that the request builds upon.
        for lora in reversed(loras):
            given = merge_params(lora.defaults, given)
        values = merge_params(self.defaults, given)
        if len(values) > MAX_PARAMS:
            # Explaining each of them would take seconds.
            mistake = FieldError("", "invalid_value", f"holds {len(values)} parameters; at most {MAX_PARAMS} are read")
            raise InvalidParams(self.id, (mistake,))
        mistakes: dict[KeyPath, FieldError] = {}
        params = None
        try:
            params = self.params_model.model_validate(values)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                path = details["loc"]
                detail = explain(details, self.params_model, self.bounds)
                is_unknown = details["type"] == "extra_forbidden"
                # A mistake in how parameters go together has no single value to show.
                if path and not is_unknown:
                    detail = f"{detail}, not {shown(details['input'])}"
                code = "unknown_field" if is_unknown else "invalid_value"
                mistakes[path] = FieldError(_pointer(path), code, detail)
        for name, detail in out_of_bounds(self.params_model, self.bounds, params.model_dump() if params else values):
            mistakes.setdefault((name,), FieldError(_pointer((name,)), "invalid_value", detail))
        if mistakes or params is None:
            raise InvalidParams(self.id, tuple(mistakes.values()))
        return params


def merge_params(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay parameters over others, field by field; a size in one form takes the place of an inherited other form.

    `aspect_ratio` and `width` with `height` exclude each other: a request could else never leave what a default chose.
    """
    inherited = dict(lower)
    if upper.get("aspect_ratio") is not None:
        inherited = {name: value for name, value in inherited.items() if name not in {"width", "height"}}
    elif upper.get("width") is not None or upper.get("height") is not None:
        inherited.pop("aspect_ratio", None)
    return {**inherited, **upper}


@cache
def families() -> tuple[str, ...]:
    """List the folders of `pipelines` that describe their parameters."""
    # By the files: looking for a module inside a package would run the package, and some need torch.
    folders = [Path(folder) for folder in importlib.import_module("pipelines").__path__]
    return tuple(sorted(file.parent.name for folder in folders for file in folder.glob("*/params.py")))


@cache
def params_of_family(family: str, pipeline: str = "", allow: tuple[str, ...] = ()) -> type[SizeParams]:
    """Import a family's parameters, which need no torch.

    Args:
        family: one of `families()`.
        pipeline: the class, from whose signature the family `generic` takes its parameters.
        allow: those that it takes.
    """
    module = importlib.import_module(f"pipelines.{family}.params")
    return module.params_of(pipeline, allow) if family == GENERIC else module.Params


def _narrow(schema: dict[str, Any], low: float, high: float) -> None:
    """Write an entry's limits into the JSON Schema of one parameter, which may also be null."""
    for option in schema.get("anyOf", [schema]):
        if option.get("type") in {"integer", "number"}:
            option |= {"minimum": low, "maximum": high}


def out_of_bounds(
    params_model: type[SizeParams], bounds: Bounds, values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Compare numbers with limits; yields the name and what is wrong. What is no number is told elsewhere."""
    for name, (low, high) in bounds.items():
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
            needs = allowed_values(params_model.model_fields[name], (low, high))
            yield name, f"needs {needs}, not {shown(value)}"


def _pointer(path: KeyPath) -> str:
    """Write a path as a JSON pointer; a name of absurd length is cut."""
    return json_pointer([str(step)[:100] for step in path])
