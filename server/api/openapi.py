"""The OpenAPI document: Litestar's, with the bodies as pydantic describes them."""

import copy
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from litestar import MediaType, Request
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.serialization import encode_json
from pydantic import BaseModel

from server.api.docs import DocsPage
from server.api.views import View
from server.submit.request import RequestModel

_REFERENCE = "#/components/schemas/{model}"


def describe_api() -> OpenAPIConfig:
    """Return how the document is made, and where it is shown."""
    return OpenAPIConfig(
        title="Restage",
        version=version("restage"),
        description="Virtual staging on your own GPUs: photos of empty rooms in, staged photos out.",
        path="/",
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, _method, _path: handler.handler_name,
        render_plugins=[DocsPage(), _Document(path="/openapi.json", media_type=MediaType.JSON)],
        components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
    )


class _Document(JsonRenderPlugin):
    """Answers the document.

    Litestar describes pydantic's models by itself and loses what is said of optional fields, mappings and unknown
    names; what clients are told must be what is checked.
    """

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        """Return the document as JSON."""
        document = copy.deepcopy(openapi_schema)
        schemas: dict[str, Any] = document["components"]["schemas"]
        for name, model in _models().items():
            if name in schemas:
                schemas[name] = _describe(model)
        return encode_json(document)


def _models() -> dict[str, type[BaseModel]]:
    return {model.__name__: model for base in (RequestModel, View) for model in _descendants(base)}


def _descendants(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for one in model.__subclasses__():
        yield one
        yield from _descendants(one)


def _describe(model: type[BaseModel]) -> dict[str, Any]:
    mode = "validation" if issubclass(model, RequestModel) else "serialization"
    schema = model.model_json_schema(ref_template=_REFERENCE, mode=mode)
    schema.pop("$defs", None)  # each is a component of its own
    return schema
