"""Reads JSON strictly: what lenient readers guess at, drop or choke on is refused, with its place."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from inspect import isclass
from itertools import islice
from typing import Any, NoReturn, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.config.allowed import shown, suggest
from server.errors import FieldError, InvalidRequest, MalformedBody, json_pointer
from server.submit.request import TOO_MANY_ITEMS

_MAX_DEPTH = 16
_MAX_INTEGER_DIGITS = 20
_MAX_REPORTED_ERRORS = 50
# Control characters but tab and line ends; lone surrogates, which JSON can spell and UTF-8 cannot.
_FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_json(body: bytes) -> Any:
    """Parse a body into plain values.

    Raises:
        MalformedBody: it is not JSON in UTF-8, nests too deeply, names a field twice, or holds a number that is none.
        InvalidRequest: a text holds a character that no text may hold.
    """
    try:
        value = json.loads(
            body.decode(),
            object_pairs_hook=_read_object,
            parse_constant=_refuse_constant,
            parse_int=_read_integer,
            parse_float=_read_float,
        )
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8: byte {error.start} cannot be read") from error
    except json.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise _too_deep() from error
    if mistakes := list(islice(_find_forbidden_texts(value, ()), _MAX_REPORTED_ERRORS)):
        raise InvalidRequest("the body holds texts that cannot be used; see errors", tuple(mistakes))
    return value


def decode_model(model: type[ModelT], value: Any, *, max_items: int) -> ModelT:
    """Check parsed JSON against a request model.

    Args:
        model: what is wanted.
        value: from `parse_json`.
        max_items: how many entries the list of items or files may have.

    Raises:
        InvalidRequest: with a JSON pointer to every mistake.
    """
    try:
        return model.model_validate(value, context={"max_items": max_items})
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False)
        shown = tuple(_field_error(model, mistake) for mistake in mistakes[:_MAX_REPORTED_ERRORS])
        first = f"{shown[0].location or 'the body'}: {shown[0].detail}"
        more = f" (and {len(mistakes) - 1} more; see errors)" if len(mistakes) > 1 else ""
        raise InvalidRequest(f"{first}{more}", shown) from error


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise MalformedBody(f"the field {shown(twice)} stands twice in one object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise MalformedBody(f"{text} is not a JSON number")


def _read_integer(text: str) -> int:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise MalformedBody(f"an integer has {len(text)} digits; at most {_MAX_INTEGER_DIGITS} are read")
    return int(text)


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedBody("a number is out of the range of 64 bits")
    return value


def _too_deep() -> MalformedBody:
    return MalformedBody(f"the body nests deeper than {_MAX_DEPTH} levels")


def _find_forbidden_texts(value: object, path: tuple[str | int, ...]) -> Iterator[FieldError]:
    """Look at every text, names of fields too."""
    if len(path) > _MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        if found := _FORBIDDEN_CHARACTERS.search(value):
            yield _forbidden_text(path, found[0])
    elif isinstance(value, dict):
        for name, inner in cast("dict[str, Any]", value).items():
            if found := _FORBIDDEN_CHARACTERS.search(name):
                yield _forbidden_text(path, found[0])
            else:
                yield from _find_forbidden_texts(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(cast("list[Any]", value)):
            yield from _find_forbidden_texts(inner, (*path, index))


def _forbidden_text(path: Sequence[str | int], character: str) -> FieldError:
    return FieldError(json_pointer(path), "invalid_value", f"holds U+{ord(character):04X}, which no text may hold")


def _field_error(model: type[BaseModel], mistake: ErrorDetails) -> FieldError:
    location = json_pointer(mistake["loc"])
    match mistake["type"]:
        case "extra_forbidden":
            fields = _model_at(model, mistake["loc"][:-1]).model_fields
            detail = f"there is no such field here; {suggest(str(mistake['loc'][-1]), fields)}"
            return FieldError(location, "unknown_field", detail)
        case "missing":
            return FieldError(location, "missing", "is needed")
        case kind:
            # Few codes of our own instead of pydantic's hundred: a client can know them all.
            code = kind if kind == TOO_MANY_ITEMS else "invalid_value"
            return FieldError(location, code, mistake["msg"][0].lower() + mistake["msg"][1:])


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """Find the model of the object at `path` within a body of `model`."""
    for name in path:
        if isinstance(name, str):
            model = next(_models_within(model.model_fields[name].annotation))
    return model


def _models_within(annotation: object) -> Iterator[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_within(inner)
