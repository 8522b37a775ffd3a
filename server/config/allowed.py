"""Says in words what a pydantic field allows, for mistakes in configuration and in requests alike."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_MAX_SHOWN_CHARACTERS = 60
# Looking for passwords takes time, and a request may hold a text of a megabyte, which several messages show.
_MAX_SEARCHED_CHARACTERS = 10_000
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    SecretStr: "text",
    Path: "a path",
    list: "a list such as [a, b]",
    dict: "a mapping of names to values",
}


def allowed_values(field: FieldInfo, bounds: tuple[float, float] | None = None) -> str:
    """Describe what a field takes: `a whole number from 1 to 65535`, `keys or none`.

    Args:
        field: of a pydantic model.
        bounds: lowest and highest value, where something else narrows the field's own range.
    """
    kinds = [_describe_kind(kind) for kind in plain_types(field.annotation) if kind is not type(None)]
    text = " or ".join(dict.fromkeys(kinds)) + _describe_range(field, bounds)
    return f"{text}, or null" if is_optional(field.annotation) else text


def plain_types(annotation: Any) -> list[Any]:
    """Take unions and `Annotated` apart into the types that they allow."""
    origin = get_origin(annotation)
    if origin is Union or origin is UnionType:
        return [kind for member in get_args(annotation) for kind in plain_types(member)]
    if hasattr(annotation, "__metadata__"):
        return plain_types(get_args(annotation)[0])
    return [annotation]


def is_optional(annotation: Any) -> bool:
    """Tell whether a field may be null."""
    return type(None) in plain_types(annotation)


def explain(
    error: ErrorDetails, model: type[BaseModel], bounds: Mapping[str, tuple[float, float]] | None = None
) -> str:
    """Say what is wrong with one value and what is allowed, in the words of an operator or caller, not of pydantic.

    Args:
        error: of a pydantic ValidationError.
        model: that was validated.
        bounds: by field, where something else narrows the field's own range.
    """
    parent, field, name = _field_at(model, error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"is unknown; {suggest(str(error['loc'][-1]), parent.model_fields)}"
    if kind == "value_error":
        return str(error.get("ctx", {}).get("error", error["msg"]))
    if field is None:
        return f"needs a mapping with the keys {', '.join(parent.model_fields)}"
    needs = f"needs {allowed_values(field, (bounds or {}).get(name))}"
    if kind == "string_pattern_mismatch" and field.description:
        needs = f"needs {field.description}"
    elif kind == "missing":
        needs = f"is missing; {needs}"
    elif kind == "string_type" and isinstance(error["input"], int | float):
        needs = f"{needs}; put it in quotes"
    return needs


def suggest(name: str, known: Iterable[str]) -> str:
    """Name the known name that was probably meant, or all of them."""
    names = sorted(known)
    # Comparing is slow for long texts, and a request may hold one.
    close = difflib.get_close_matches(name[:100], names, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(names) or 'none'}"


def shown(value: Any) -> str:
    """Show a value in a message: on one line, shortened, without what a list, a mapping or a URL may hide."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 10**_MAX_SHOWN_CHARACTERS:
        return "a very large number"  # Python itself refuses to write one of over 4300 digits
    text = repr(value[:_MAX_SEARCHED_CHARACTERS] if isinstance(value, str) else value)
    text = re.sub(r"//\S*@", "//***@", text)
    text = re.sub(r"(?i)(password=)[^&\s'\"]*", r"\1***", text)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"


def bounds_of(field: FieldInfo) -> tuple[float, float]:
    """Give the lowest and the highest value that a field of numbers takes; infinite where there is no bound."""
    low, high = -math.inf, math.inf
    for rule in _constraints(field):
        match rule:
            case Ge(ge=limit) | Gt(gt=limit) if isinstance(limit, int | float):
                low = limit
            case Le(le=limit) | Lt(lt=limit) if isinstance(limit, int | float):
                high = limit
            case _:
                pass
    return low, high


def _describe_kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        options = [shown(option).strip("'") for option in get_args(kind)]
        return " or ".join([", ".join(options[:-1]), options[-1]]) if len(options) > 1 else options[0]
    kind = get_origin(kind) or kind
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with the keys {', '.join(kind.model_fields)}"
    return _KINDS.get(kind, "another type of value")


def _describe_range(field: FieldInfo, bounds: tuple[float, float] | None) -> str:
    if bounds is not None:
        return f" from {bounds[0]} to {bounds[1]}"
    limits: dict[str, object] = {}
    extra = ""
    for rule in _constraints(field):
        match rule:
            case Ge(ge=limit):
                limits["at least"] = limit
            case Gt(gt=limit):
                limits["over"] = limit
            case Le(le=limit):
                limits["at most"] = limit
            case Lt(lt=limit):
                limits["under"] = limit
            case MultipleOf(multiple_of=step):
                extra += f", a multiple of {step}"
            case MinLen(min_length=length) if length > 0:
                extra += ", not empty"
            case _:
                pass
    if limits.keys() == {"at least", "at most"}:
        return f" from {limits['at least']} to {limits['at most']}{extra}"
    words = " and ".join(f"{word} {limit}" for word, limit in limits.items())
    return f" {words}{extra}" if words else extra


def _constraints(field: FieldInfo) -> list[Any]:
    """List a field's own constraints and those inside its union."""
    inner = [rule for member in get_args(field.annotation) for rule in getattr(member, "__metadata__", ())]
    nested = [rule for holder in inner if isinstance(holder, FieldInfo) for rule in holder.metadata]
    return [*field.metadata, *inner, *nested]


def _field_at(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], FieldInfo | None, str]:
    """Follow an error's location through nested models to the innermost field."""
    parent, field, name = model, None, ""
    for step in location:
        if field is not None:
            kinds = plain_types(field.annotation)
            values = [get_args(kind)[-1] for kind in kinds if get_origin(kind) in {dict, list}]
            if values:  # whatever the names or numbers are, one type of value stands under all of them
                field, name = FieldInfo.from_annotation(values[0]), str(step)
                continue
            nested = [kind for kind in kinds if _is_model(kind)]
            if not nested:
                break
            parent = nested[0]
        field, name = parent.model_fields.get(str(step)), str(step)
        if field is None:
            break
    return parent, field, name


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
