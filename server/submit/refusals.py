"""Says which item of a request was refused, why, and where in the request the mistake stands."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from server.errors import InvalidRequest, ItemError, RequestError, ServerError, json_pointer
from server.model_entry import InvalidParams
from server.submit.request import BatchRequest, Place, RequestModel


class ItemRefused(Exception):
    """Raised when an item cannot be done: `error` says why, and `place` leads from the item to the mistake."""

    def __init__(self, error: RequestError, place: Place) -> None:
        super().__init__(error.detail)
        self.error = error
        self.place = place


@contextmanager
def about(*place: str | int) -> Generator[None]:
    """Note of what is refused in this block that it is about what stands at `place` of the item.

    Raises:
        ItemRefused: in place of a RequestError.
    """
    try:
        yield
    except RequestError as error:
        raise ItemRefused(error, place) from error


def item_error(request: BatchRequest, index: int, error: ServerError, place: Place = ()) -> ItemError:
    """Tell why an item was refused.

    Args:
        request: with the item and the settings that it shares.
        index: of the item.
        error: where it lists mistakes of its own, their locations begin at `place`.
        place: in the item or, where the item has it from there, in `defaults`.
    """
    detail, locations = error.detail, [_locate(request, index, place)]
    if isinstance(error, InvalidRequest) and error.errors:
        locations = [_locate(request, index, (*place, *_steps(one.location))) for one in error.errors]
    if isinstance(error, InvalidParams):
        mistakes = [replace(one, location=location) for one, location in zip(error.errors, locations, strict=True)]
        detail = InvalidParams(error.model, tuple(mistakes)).detail
    return ItemError(index, locations[0], error.code, detail)


def _locate(request: BatchRequest, index: int, place: Place) -> str:
    """Point to where the client wrote what an item has at `place`, or to the closest thing around it."""
    sources = {("items", index): request.items[index], ("defaults",): request.defaults}
    for length in range(len(place), 0, -1):
        for start, settings in sources.items():
            if _holds(settings, place[:length]):
                return json_pointer((*start, *place[:length]))
    return json_pointer(("items", index))


def _holds(settings: RequestModel, place: Place) -> bool:
    value: Any = settings
    for step in place:
        match value:
            case RequestModel() if step in value.model_fields_set:
                value = getattr(value, str(step))
            case dict() if step in value:
                value = cast("dict[Any, Any]", value)[step]
            case list() if isinstance(step, int) and step < len(cast("list[Any]", value)):
                value = cast("list[Any]", value)[step]
            case _:
                return False
    return True


def _steps(pointer: str) -> Place:
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:])
