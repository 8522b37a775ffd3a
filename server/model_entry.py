"""One model as an operator describes it in models.yaml, and what a request may ask of it."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.sizes import MIN_AREA, SizeParams
from server.config.allowed import allowed_values, explain, shown
from server.config.files import KeyPath
from server.errors import FieldError, InvalidRequest, json_pointer
from server.prompts import ModelPresets

MAX_AREA = 4096 * 4096
# More than any family has.
MAX_PARAMS = 64
# The one limit that is no parameter.
MAX_INPUT_IMAGES = "max_input_images"
# Parameter → lowest and highest value.
Bounds = dict[str, tuple[float, float]]


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


class ModelEntry(BaseModel):
    """One model of the registry.

    Attributes:
        family: folder of `pipelines` that builds this model's calls.
        pipeline: class in diffusers.
        weights: folder below `models.weights_dir`.
        area: pixels that the model was trained on; its outputs and what it reads of a photo follow it.
        defaults: parameters for requests that leave them out; they lie over the family's own defaults.
        limits: parameter → [lowest, highest], within the family's own range; `max_input_images` → a number.
        presets: what this model wants of the prompts otherwise.
        optimizations: empty; nothing reads it yet, and an entry must not promise what does not happen.
        loras: empty, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="1 to 64 lower-case letters, digits, dots, hyphens and underscores, the first a letter or digit",
    )
    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    version: str = Field(min_length=1)
    family: str
    pipeline: str
    weights: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the name of a folder below models.weights_dir"
    )
    source: Source | None = None
    license: str = Field(min_length=1)
    dtype: Literal["bfloat16", "float16", "float32"]
    area: int = Field(ge=MIN_AREA, le=MAX_AREA)
    defaults: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    presets: ModelPresets = ModelPresets()
    optimizations: dict[str, Any] = Field(default={}, max_length=0)
    loras: list[dict[str, Any]] = Field(default=[], max_length=0)

    @property
    def params_model(self) -> type[SizeParams]:
        """The parameters that the family takes; its JSON Schema is what clients see."""
        return params_of_family(self.family)

    @property
    def max_input_images(self) -> int:
        """How many photos one job may have."""
        return int(self.limits.get(MAX_INPUT_IMAGES, self.params_model.MAX_INPUT_IMAGES))

    @property
    def has_negative_prompt(self) -> bool:
        """Whether a negative prompt changes anything."""
        return self.params_model.HAS_NEGATIVE_PROMPT

    @property
    def bounds(self) -> Bounds:
        """The limits of parameters, which narrow the family's own ranges."""
        return {name: (limit[0], limit[1]) for name, limit in self.limits.items() if name != MAX_INPUT_IMAGES}

    def resolve_params(self, requested: Mapping[str, Any]) -> SizeParams:
        """Lay a request's parameters over the entry's defaults and check all of them.

        Args:
            requested: plain JSON values; null is as good as left out.

        Returns:
            An instance of `params_model`.

        Raises:
            InvalidParams: with one FieldError for each mistake.
        """
        known = self.params_model.model_fields
        # A null under an unknown name stays: it is probably a mistyped one, and is told.
        given = {name: value for name, value in requested.items() if value is not None or name not in known}
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
    folder = importlib.import_module("pipelines").__path__
    names = [module.name for module in pkgutil.iter_modules(folder) if module.ispkg]
    return tuple(sorted(name for name in names if importlib.util.find_spec(f"pipelines.{name}.params")))


@cache
def params_of_family(family: str) -> type[SizeParams]:
    """Import a family's parameters, which need no torch.

    Args:
        family: one of `families()`.
    """
    return importlib.import_module(f"pipelines.{family}.params").Params


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
