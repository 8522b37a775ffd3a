"""The models that are served: reads models.yaml and checks it against the families that run them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard, cast

from pydantic import ValidationError

from pipelines.generic.params import params_of
from pipelines.sizes import SizeParams
from server.config.allowed import allowed_values, bounds_of, explain, plain_types, shown, suggest
from server.config.files import ConfigFile, KeyPath, Problem, describe_problem, read_config_file
from server.errors import ConfigError, RequestError
from server.generic_entry import check_call, check_ranges, names_of
from server.model_entry import (
    GENERIC,
    MAX_INPUT_IMAGES,
    Bounds,
    InvalidParams,
    ModelEntry,
    families,
    merge_params,
    out_of_bounds,
    params_of_family,
)
from server.optimizations_entry import check_optimizations
from server.prompts import PRESET_PLACEHOLDER, ROOM_TYPES, STYLES
from server.settings import Settings

__all__ = ["InvalidParams", "ModelEntry", "ModelNotFound", "Registry", "load_registry", "merge_params"]


class ModelNotFound(RequestError):
    """Raised when a request names a model that is not served here."""

    code = "unknown_model"
    title = "There is no such model"
    http_status = 404


class Registry:
    """The models that are served, in the order of `models.enabled`."""

    def __init__(self, entries: Sequence[ModelEntry]) -> None:
        self._entries = {entry.id: entry for entry in entries}

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def ids(self) -> list[str]:
        """The ids of all models."""
        return list(self._entries)

    def get(self, model_id: str) -> ModelEntry:
        """Find a model.

        Raises:
            ModelNotFound: no model with this id is served.
        """
        entry = self._entries.get(model_id)
        if entry is None:
            raise ModelNotFound(f"there is no model {shown(model_id)}; {suggest(model_id, self._entries)}")
        return entry


def load_registry(settings: Settings) -> Registry:
    """Read `models.file`, check all of its entries, and keep the enabled ones.

    Raises:
        ConfigError: with one line for every mistake, such as `config/models.yaml:12: models[1].famil: is unknown; …`.
    """
    file = read_config_file(settings.models.file)
    problems = [_in_models(problem) for problem in file.problems]
    raw_entries: list[Any] = []
    if file.is_readable and isinstance(file.content, list):
        raw_entries = cast("list[Any]", file.content)
        for index, raw in enumerate(raw_entries):
            problems.extend(_check_entry(file, index, raw))
        problems.extend(_duplicate_ids(file, raw_entries))
        problems.extend(_check_enabled(file, settings, raw_entries))
    elif file.is_readable:
        problems.append(Problem(file.name, 1, "", None, "needs a list of models, each beginning with `- id:`"))
    if problems:
        problems.sort(key=lambda problem: (problem.line is None, problem.line or 0))
        raise ConfigError([describe_problem(problem) for problem in problems])
    by_id = {raw["id"]: raw for raw in raw_entries}
    return Registry([ModelEntry.model_validate(by_id[model_id]) for model_id in settings.models.enabled])


def _problem(file: ConfigFile, path: KeyPath, value: str | None, detail: str) -> Problem:
    return _in_models(file.problem(path, value, detail))


def _in_models(problem: Problem) -> Problem:
    """Give the list, which has no name in the file, one to read."""
    return replace(problem, key=f"models{problem.key}") if problem.key else problem


def _check_entry(file: ConfigFile, index: int, raw: Any) -> Iterator[Problem]:
    if not isinstance(raw, dict):
        yield _problem(file, (index,), shown(raw), "needs a model: a mapping that begins with `id:`")
        return
    entry = cast("dict[Any, Any]", raw)
    yield from _check_fields(file, index, entry)
    yield from _check_presets(file, (index, "presets"), dict(_items(entry.get("presets"))))
    yield from _check_loras_together(file, index, entry)
    yield from _check_previous(file, index, entry)
    for place, value, detail in check_optimizations(entry):
        yield _problem(file, (index, "optimizations", *place), value, detail)
    family = entry.get("family")
    if family == GENERIC:
        yield from _check_generic(file, index, entry)
    elif family in families():
        if entry.get("allow"):
            detail = f"is only for the family {GENERIC}; {family} has its own parameters"
            yield _problem(file, (index, "allow"), None, detail)
        yield from _check_against_family(file, index, entry, params_of_family(family))
    elif isinstance(family, str):
        yield _problem(file, (index, "family"), shown(family), f"is unknown; {suggest(family, families())}")


def _check_fields(file: ConfigFile, index: int, entry: Mapping[Any, Any]) -> Iterator[Problem]:
    try:
        ModelEntry.model_validate(entry, strict=True)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            place = details["loc"]
            if place[:1] == ("presets",) and place[-1] == "[key]":
                continue  # told with what there is by _check_presets
            if place[:2] == ("optimizations", "cache"):
                continue  # told with what each kind takes by check_optimizations
            value = None if details["type"] == "missing" else shown(details["input"])
            yield _problem(file, (index, *place), value, explain(details, ModelEntry))


def _check_generic(file: ConfigFile, index: int, entry: Mapping[Any, Any]) -> Iterator[Problem]:
    names = names_of(entry)
    if names is None:
        return  # told already
    mistakes = list(check_call(*names))
    if not mistakes:
        params_model = params_of(*names)
        mistakes += check_ranges(params_model, dict(_items(entry.get("limits"))))
        yield from _check_against_family(file, index, entry, params_model)
    for path, value, detail in mistakes:
        yield _problem(file, (index, *path), value, detail)


def _check_against_family(
    file: ConfigFile, index: int, entry: Mapping[Any, Any], params_model: type[SizeParams]
) -> Iterator[Problem]:
    pipeline = entry.get("pipeline")
    if isinstance(pipeline, str) and pipeline not in params_model.PIPELINES:
        detail = f"is unknown to the family {entry['family']}; {suggest(pipeline, params_model.PIPELINES)}"
        yield _problem(file, (index, "pipeline"), shown(pipeline), detail)
    bounds: Bounds = {}
    for name, limit in _items(entry.get("limits")):
        detail = _wrong_limit(params_model, name, limit)
        if detail is not None:
            yield _problem(file, (index, "limits", name), shown(limit), detail)
        elif name != MAX_INPUT_IMAGES:
            bounds[name] = (limit[0], limit[1])
    defaults = dict(_items(entry.get("defaults")))
    try:
        values = params_model.model_validate(defaults).model_dump()
    except ValidationError as error:
        values = defaults
        for details in error.errors(include_url=False):
            path = (index, "defaults", *details["loc"])
            yield _problem(file, path, shown(details["input"]), explain(details, params_model))
    for name, detail in out_of_bounds(params_model, bounds, values):
        yield _problem(file, (index, "limits", name), None, f"excludes the default: {name} {detail}")
    for number, lora in enumerate(_mappings(entry.get("loras"))):
        yield from _check_lora(file, (index, "loras", number), lora, params_model, (defaults, bounds))


def _check_lora(
    file: ConfigFile,
    path: KeyPath,
    lora: Mapping[Any, Any],
    params_model: type[SizeParams],
    of_model: tuple[Mapping[str, Any], Bounds],
) -> Iterator[Problem]:
    defaults, bounds = of_model
    own = dict(_items(lora.get("defaults")))
    try:
        values = params_model.model_validate(merge_params(defaults, own)).model_dump()
    except ValidationError as error:
        values = own
        for details in error.errors(include_url=False):
            if details["loc"][:1] and details["loc"][0] not in own:
                continue  # the model's own default, told there
            yield _problem(
                file, (*path, "defaults", *details["loc"]), shown(details["input"]), explain(details, params_model)
            )
    for name, detail in out_of_bounds(params_model, bounds, values):
        if name in own:
            yield _problem(file, (*path, "defaults", name), None, detail)


def _check_loras_together(file: ConfigFile, index: int, entry: Mapping[Any, Any]) -> Iterator[Problem]:
    first: dict[Any, int] = {}
    for number, lora in enumerate(_mappings(entry.get("loras"))):
        lora_id, scale = lora.get("id"), lora.get("scale")
        if isinstance(lora_id, str) and first.setdefault(lora_id, number) != number:
            detail = f"is the id of loras[{first[lora_id]}] already"
            yield _problem(file, (index, "loras", number, "id"), shown(lora_id), detail)
        if _is_pair(scale) and scale[0] > scale[1]:
            yield _problem(file, (index, "loras", number, "scale"), shown(scale), "needs [lowest, highest]")


def _check_previous(file: ConfigFile, index: int, entry: Mapping[Any, Any]) -> Iterator[Problem]:
    seen = {entry.get("version")}
    for number, previous in enumerate(_mappings(entry.get("previous"))):
        version = previous.get("version")
        if not isinstance(version, str):
            continue
        if version in seen:
            detail = "is a version of this entry already; each has its own"
            yield _problem(file, (index, "previous", number, "version"), shown(version), detail)
        seen.add(version)


def _check_presets(file: ConfigFile, path: KeyPath, presets: Mapping[Any, Any]) -> Iterator[Problem]:
    wrap = presets.get("wrap")
    if isinstance(wrap, str) and wrap.count(PRESET_PLACEHOLDER) != 1:
        yield _problem(file, (*path, "wrap"), None, f"needs {PRESET_PLACEHOLDER} once")
    for room_type, styles in _items(presets.get("replace")):
        room_path = (*path, "replace", room_type)
        if room_type not in ROOM_TYPES:
            yield _problem(file, room_path, None, f"is unknown; {suggest(str(room_type), ROOM_TYPES)}")
        for style, prompt in _items(styles):
            if style not in STYLES:
                yield _problem(file, (*room_path, style), None, f"is unknown; {suggest(str(style), STYLES)}")
            elif isinstance(prompt, str) and not prompt.strip():
                yield _problem(file, (*room_path, style), None, "needs text, not empty")


def _items(value: Any) -> list[tuple[Any, Any]]:
    """List a mapping's items; anything else is told by the entry's own check."""
    return list(cast("dict[Any, Any]", value).items()) if isinstance(value, dict) else []


def _mappings(value: Any) -> list[Mapping[Any, Any]]:
    """List a list's mappings; anything else is told by the entry's own check."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("Mapping[Any, Any]", item) if isinstance(item, dict) else {} for item in items]


def _is_pair(value: Any) -> TypeGuard[list[float]]:
    """Tell whether a value is a list of two numbers."""
    pair = cast("list[Any]", value) if isinstance(value, list) else []
    return len(pair) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in pair)


def _wrong_limit(params_model: type[SizeParams], name: Any, limit: Any) -> str | None:
    """Say what is wrong with one limit; None where nothing is."""
    if name == MAX_INPUT_IMAGES:
        highest = params_model.MAX_INPUT_IMAGES
        is_right = isinstance(limit, int) and not isinstance(limit, bool) and 1 <= limit <= highest
        return None if is_right else f"needs a whole number from 1 to {highest}"
    numbers = [
        known
        for known, field in params_model.model_fields.items()
        if {int, float} & {kind for kind in plain_types(field.annotation) if isinstance(kind, type)}
    ]
    if name not in numbers:
        return f"is unknown; {suggest(str(name), [*numbers, MAX_INPUT_IMAGES])}"
    field = params_model.model_fields[name]
    lowest, highest = bounds_of(field)
    if _is_pair(limit) and lowest <= limit[0] <= limit[1] <= highest:
        return None
    return f"needs [lowest, highest], each {allowed_values(field).removesuffix(', or null')}"


def _duplicate_ids(file: ConfigFile, raw_entries: list[Any]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, model_id in enumerate(_ids(raw_entries)):
        if model_id is not None and first.setdefault(model_id, index) != index:
            detail = f"is the id of models[{first[model_id]}] already"
            yield _problem(file, (index, "id"), shown(model_id), detail)


def _check_enabled(file: ConfigFile, settings: Settings, raw_entries: list[Any]) -> Iterator[Problem]:
    known = [model_id for model_id in _ids(raw_entries) if model_id is not None]
    for model_id in settings.models.enabled:
        if model_id not in known:
            detail = f"is no entry of this file; {suggest(model_id, known)}"
            yield Problem(file.name, None, "models.enabled", shown(model_id), detail)
    default = settings.models.default
    if default not in settings.models.enabled:
        detail = f"is not among models.enabled; {suggest(default, settings.models.enabled)}"
        yield Problem(file.name, None, "models.default", shown(default), detail)


def _ids(raw_entries: list[Any]) -> list[str | None]:
    """Give each entry's id, None where there is none to speak of."""
    ids = [cast("dict[Any, Any]", raw).get("id") if isinstance(raw, dict) else None for raw in raw_entries]
    return [model_id if isinstance(model_id, str) else None for model_id in ids]
