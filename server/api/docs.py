"""`/docs`: the API page. All of it comes from this server, so it works without the internet and calls nobody."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litestar import Request, Response, Router, get
from litestar.datastructures import CacheControlHeader
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.params import FromPath

from server.errors import NotFound

_CONTENT_TYPES = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
# The policy holds the browser to this server. Swagger UI sets styles from its script and draws icons from data: URLs.
_PAGE = b"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Restage API</title>
<link rel="icon" type="image/png" href="/docs/files/favicon-32x32.png">
<link rel="stylesheet" href="/docs/files/swagger-ui.css">
<div id="page"></div>
<script src="/docs/files/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"""
# Without a null validatorUrl Swagger UI asks a server on the internet to look at the document.
_START = b"""SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#page",
  validatorUrl: null,
  deepLinking: true,
  persistAuthorization: false,
});
"""


class DocsPage(OpenAPIRenderPlugin):
    """Litestar's place for an API page: `/docs`, and `/` for those who only know the address."""

    def __init__(self) -> None:
        super().__init__(path=["/docs", "/"])

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        """Return the page; it fetches the document by itself."""
        return _PAGE

    def receive_router(self, router: Router) -> None:
        """Take out Litestar's page for unknown paths: unknown paths are told as every other error."""
        router.routes[:] = [route for route in router.routes if route.path != "/{path:str}"]


@get("/docs/start.js", media_type="text/javascript", include_in_schema=False, sync_to_thread=False)
def start_script() -> bytes:
    """Answer the few lines that start the page; a script of its own, since the page may hold none."""
    return _START


@get(
    "/docs/files/{name:str}",
    include_in_schema=False,
    sync_to_thread=True,
    cache_control=CacheControlHeader(max_age=3600, public=True),
)
def docs_file(name: FromPath[str]) -> Response[bytes]:
    """Answer one of the three files of Swagger UI that the page uses.

    Raises:
        NotFound: another file is asked for.
    """
    if name not in _CONTENT_TYPES:
        raise NotFound(f"there is nothing at /docs/files/{name}")
    return Response((_static_folder() / name).read_bytes(), media_type=_CONTENT_TYPES[name])


def _static_folder() -> Path:
    # Looked up, not imported: the package is only a box of files here, and its code would load web frameworks.
    spec = find_spec("swagger_ui")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound("swagger-ui-py is not installed; the document itself is at /openapi.json")
    return Path(spec.submodule_search_locations[0]) / "static"
