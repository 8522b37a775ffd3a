"""How a request that is JSON may come as a form instead: the JSON in one part, and files beside it."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from litestar.openapi.spec import Encoding, OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat

from server.api.bodies import Patience, StrictRequest
from server.api.json_bodies import parse_json
from server.api.multipart import BATCH_PART, Form, max_form_bytes, read_form
from server.api.request_context import opened_files
from server.errors import MalformedBody, PayloadTooLarge, UnsupportedMediaType
from server.settings import LimitsSettings
from server.submit.files import ReceivedFile

_JSON, _FORM = "application/json", "multipart/form-data"


class FormRequest(StrictRequest):
    """A request whose body is JSON, or a form with that JSON in its part `batch`.

    The files of a form are open until the request is done.
    """

    _received: Form | None = None

    @property
    def files(self) -> Mapping[str, ReceivedFile] | None:
        """The files of the form by the names of their parts, once the body was read; None where it was no form."""
        return None if self._received is None else self._received.files

    async def body(self) -> bytes:
        """Return the raw JSON; the files of a form go to disk on the way.

        Raises:
            UnsupportedMediaType: the content type is neither JSON nor a form.
            PayloadTooLarge: the form is larger than a form can be.
            BodyTimeout: the client has gone silent, or is far too slow.
            RequestError: what `StrictRequest.body` and `read_form` raise.
            FilesNotKept: the disk does not take the files.
        """
        content_type, options = self.content_type
        if content_type == _JSON:
            return await super().body()
        if content_type != _FORM:
            found = self.headers.get("content-type", "none at all")
            raise UnsupportedMediaType(f"the content type must be {_JSON} or {_FORM}, not {found}")
        if self._received is None:
            limits: LimitsSettings = self.app.state.services.settings.limits
            self._received = await read_form(
                self._chunks(max_form_bytes(limits)),
                options.get("boundary"),
                limits=limits,
                large_bodies=self.app.state.services.large_bodies,
                opened=opened_files(self.scope),
            )
        return self._received.batch

    async def json(self) -> Any:
        """Return the JSON as plain values; raises what `parse_json` raises."""
        body = await self.body()
        try:
            return parse_json(body)
        except MalformedBody as error:
            if self._received is None:
                raise
            raise MalformedBody(f"in the part {BATCH_PART}: {error.detail}") from error

    async def _chunks(self, max_bytes: int) -> AsyncIterator[bytes]:
        """The body as it comes; Litestar's limit on a body is for JSON, so it is not asked."""
        if (self.content_length or 0) > max_bytes:
            raise _too_large(max_bytes)
        patience = Patience(self.limits)
        size_bytes, is_complete = 0, False
        while not is_complete:
            message = await patience.receive(self.receive)
            if message["type"] == "http.disconnect":
                raise MalformedBody("the connection ended before the body did")
            chunk: bytes = message.get("body", b"")
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise _too_large(max_bytes)
            yield chunk
            is_complete = not message.get("more_body", False)


@dataclass
class FormOperation(Operation):
    """Adds to the description of an operation with a JSON body that it may come as a form too."""

    def __post_init__(self) -> None:
        body = self.request_body
        if not isinstance(body, RequestBody):
            raise TypeError("an operation without a body cannot come as a form")
        file = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY, description="A photo that items name.")
        form = Schema(
            type=OpenAPIType.OBJECT,
            # A name for a file, so that the API page has a field for one; any other will do.
            properties={BATCH_PART: body.content[_JSON].schema, "photo1": file},  # pyright: ignore[reportArgumentType]
            required=[BATCH_PART],
            additional_properties=file,
        )
        body.content[_FORM] = OpenAPIMediaType(schema=form, encoding={BATCH_PART: Encoding(content_type=_JSON)})


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the form is larger than {max_bytes} bytes, which is what limits.* allow for all its parts")
