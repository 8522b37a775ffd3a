"""What is wrong with the `optimizations` of an entry, beyond what each of its values allows by itself."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import ValidationError

from pipelines.optimization_params import CACHE_KINDS, Optimizations, conflicts
from server.config.allowed import explain, shown
from server.config.files import KeyPath

# Where in the optimizations, the value as it is shown, what is wrong with it.
Mistake = tuple[KeyPath, str | None, str]


def check_optimizations(entry: Mapping[Any, Any]) -> Iterator[Mistake]:
    """Look for a step cache that is none, and for what does not go together."""
    raw = entry.get("optimizations", {})
    if not isinstance(raw, dict):
        return  # told already
    values = cast("dict[Any, Any]", raw)
    yield from _check_cache(values.get("cache", "none"))
    try:
        optimizations = Optimizations.model_validate(values, strict=True)
    except ValidationError:
        return  # told already
    for place, detail in conflicts(optimizations, str(entry.get("pipeline")), has_loras=bool(entry.get("loras"))):
        yield place, None, detail


def _check_cache(raw: Any) -> Iterator[Mistake]:
    if raw == "none":
        return
    kind: Any = cast("dict[Any, Any]", raw).get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in CACHE_KINDS:
        *others, last = CACHE_KINDS
        detail = f"needs none, or a mapping with `kind: {', '.join(others)} or {last}`"
        if kind is None:
            yield ("cache",), shown(raw), detail
        else:
            yield ("cache", "kind"), shown(kind), detail
        return
    try:
        CACHE_KINDS[kind].model_validate(raw, strict=True)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            yield ("cache", *details["loc"]), shown(details["input"]), explain(details, CACHE_KINDS[kind])
