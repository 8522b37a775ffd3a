"""Tells OPTIONS requests which methods a path really has."""

from litestar.datastructures import MutableScopeHeaders
from litestar.types import Message, Scope


async def tell_methods(message: Message, scope: Scope) -> None:
    """Correct `Allow` in an answer to OPTIONS, just before it is sent.

    Litestar makes that answer with the first handler of a path, and does not make it anew when others are added.
    """
    if message["type"] != "http.response.start" or scope["type"] != "http" or scope["method"] != "OPTIONS":
        return
    headers = MutableScopeHeaders.from_message(message)
    item = (scope["litestar_app"].openapi_schema.paths or {}).get(scope.get("path_template", ""))
    if "allow" in headers and item is not None:
        documented = [name for name in ("delete", "get", "patch", "post", "put") if getattr(item, name) is not None]
        headers["allow"] = ", ".join([*(name.upper() for name in documented), "OPTIONS"])
