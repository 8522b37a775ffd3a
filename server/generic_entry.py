"""What an entry of the family `generic` must say so that any class of diffusers can be offered to clients."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pipelines.generic.params import (
    NUM_STEPS,
    GenericParams,
    allowable_parameters,
    pipeline_names,
    why_not_class,
    why_not_parameter,
)
from pipelines.sizes import SizeParams
from server.config.allowed import plain_types, shown, suggest
from server.config.files import KeyPath

# Where in the entry, the value as it is shown, what is wrong with it.
Mistake = tuple[KeyPath, str | None, str]


def names_of(entry: Mapping[Any, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Give the class of an entry and the parameters that it allows; None where one of them is not even text."""
    pipeline, allow = entry.get("pipeline"), entry.get("allow", [])
    if not isinstance(pipeline, str) or not isinstance(allow, list):
        return None
    names = tuple(cast("list[Any]", allow))
    return (pipeline, names) if all(isinstance(name, str) for name in names) else None


def check_call(pipeline: str, allow: tuple[str, ...]) -> Iterator[Mistake]:
    """Look for what keeps the class from being called with the parameters that its entry allows."""
    if pipeline not in pipeline_names():
        yield ("pipeline",), shown(pipeline), f"is no pipeline of the diffusers that is installed{_suggest(pipeline)}"
        return
    reason = why_not_class(pipeline)
    if reason is not None:
        yield ("pipeline",), shown(pipeline), f"cannot be used: it {reason}"
        return
    allowable = allowable_parameters(pipeline)
    for number, name in enumerate(allow):
        if name not in allowable:
            reason = why_not_parameter(pipeline, name) or f"is no parameter of {pipeline}; {suggest(name, allowable)}"
            yield ("allow", number), shown(name), reason


def check_ranges(params_model: type[GenericParams], limits: Mapping[Any, Any]) -> Iterator[Mistake]:
    """Look for numbers without a range: a class names none, and would take any."""
    for name, field in params_model.model_fields.items():
        is_number = bool({int, float} & {kind for kind in plain_types(field.annotation) if isinstance(kind, type)})
        if is_number and name not in SizeParams.model_fields and name not in limits:
            why = "each job has it" if name == NUM_STEPS else "allow names it"
            yield ("limits", name), None, f"is missing; needs [lowest, highest], since {why} and the class has no range"


def _suggest(pipeline: str) -> str:
    close = difflib.get_close_matches(pipeline[:100], pipeline_names(), n=1)
    return f"; did you mean {close[0]}?" if close else ""
