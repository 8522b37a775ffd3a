"""`POST /v1/uploads`: forms with which clients send photos straight to the store."""

import secrets
from datetime import datetime
from typing import Annotated, ClassVar, Literal

from litestar import Response, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from pydantic import Field

from server.api.errors import problems
from server.api.key_limits import take_bytes
from server.api.services import Services
from server.api.views import ItemErrorView, View, view_item_error
from server.errors import ItemError, NothingAccepted, RequestError, json_pointer
from server.images import CONTENT_TYPES
from server.keys import Principal
from server.ledger.records import UploadRecord
from server.store import UploadForm
from server.submit.look import FileTooLarge
from server.submit.request import CountChecked, RequestModel


class UnsupportedContentType(RequestError):
    """Raised when a file is announced as something that is no photo; its bytes are looked at later."""

    code: ClassVar[str] = "unsupported_content_type"
    title: ClassVar[str] = "Not a type of photo that can be used"
    http_status: ClassVar[int] = 422


class FileRequest(RequestModel):
    """One file to be sent."""

    filename: str = Field(min_length=1, max_length=1024, description="For people; the store's key is another.")
    content_type: str = Field(max_length=255, description="image/jpeg, image/png or image/webp.")
    size_bytes: int = Field(ge=1, le=2**53 - 1, description="Exactly.")
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="With it the store refuses any other bytes."
    )


class UploadsRequest(RequestModel):
    """Files to be sent, at most as many as a batch may have items."""

    files: Annotated[list[FileRequest], Field(min_length=1), CountChecked]


class UploadView(View):
    """A form: POST `fields`, and last the file, named `file`, to `url` as multipart/form-data."""

    upload_id: str
    index: int = Field(description="Place in the request's `files`, from 0.")
    method: str
    url: str
    fields: dict[str, str]
    expires_at: datetime
    max_size_bytes: int


class StoredUploadView(View):
    """A file whose bytes are in the store already: nothing need be sent, and the id can be named in a batch."""

    upload_id: str
    index: int = Field(description="Place in the request's `files`, from 0.")
    exists: Literal[True]


class UploadsView(View):
    """The forms, and the files that were refused."""

    uploads: list[UploadView | StoredUploadView]
    errors: list[ItemErrorView]


@post(
    "/uploads",
    tags=["Uploads"],
    summary="Ask for upload forms",
    response_description="Every file got a form",
    responses={
        207: ResponseSpec(UploadsView, description="Some files got a form", generate_examples=False),
        **problems(403, 413, 415, 422),
    },
)
async def create_uploads(
    data: JSONBody[UploadsRequest], services: NamedDependency[Services], principal: NamedDependency[Principal]
) -> Response[UploadsView]:
    """Answer a form for each file.

    The store takes exactly the announced size and type, and with `sha256` exactly those bytes. Where the store
    has the caller's same bytes already, `exists` is answered in place of a form. 201 when every file can be taken, 207
    when some can, 422 when none can.
    """
    limits = services.settings.limits
    records: dict[int, UploadRecord] = {}
    errors: list[ItemError] = []
    for index, file in enumerate(data.files):
        try:
            records[index] = _announce(file, principal.owner, limits.max_upload_bytes)
        except RequestError as error:
            errors.append(ItemError(index, json_pointer(("files", index)), error.code, error.detail))
    if not records:
        raise NothingAccepted(f"none of the {len(errors)} file(s) can be taken; see errors", tuple(errors))
    await take_bytes(services.ledger, principal, sum(record.size_bytes for record in records.values()))
    upload_ids = await services.ledger.announce_uploads(
        list(records.values()),
        form_ttl_seconds=limits.form_ttl_seconds,
        unused_ttl_seconds=limits.unused_upload_ttl_seconds,
        offer_seconds=services.settings.retention.records_seconds,
    )
    uploads = [
        _view(index, record, _sign(services, record))
        if upload_id == record.id
        else StoredUploadView(upload_id=upload_id, index=index, exists=True)
        for (index, record), upload_id in zip(records.items(), upload_ids, strict=True)
    ]
    view = UploadsView(uploads=uploads, errors=[view_item_error(error) for error in errors])
    return Response(view, status_code=207 if errors else 201)


def _announce(file: FileRequest, owner: str, max_upload_bytes: int) -> UploadRecord:
    content_type = file.content_type.strip().lower()
    if content_type not in CONTENT_TYPES.values():
        raise UnsupportedContentType(f"{file.content_type!a} is not one of {', '.join(CONTENT_TYPES.values())}")
    if file.size_bytes > max_upload_bytes:
        raise FileTooLarge(f"the file has {file.size_bytes} bytes; at most {max_upload_bytes} are allowed")
    upload_id = secrets.token_hex(16)
    return UploadRecord(
        id=upload_id,
        owner=owner,
        key=upload_id,
        filename=file.filename,
        content_type=content_type,
        size_bytes=file.size_bytes,
        sha256=None if file.sha256 is None else file.sha256.lower(),
    )


def _sign(services: Services, record: UploadRecord) -> UploadForm:
    return services.store.upload_form(
        record.key,
        content_type=record.content_type,
        min_size_bytes=record.size_bytes,
        max_size_bytes=record.size_bytes,
        sha256=record.sha256,
        ttl_seconds=services.settings.limits.form_ttl_seconds,
    )


def _view(index: int, record: UploadRecord, form: UploadForm) -> UploadView:
    return UploadView(
        upload_id=record.id,
        index=index,
        method="POST",
        url=form.url,
        fields=form.fields,
        expires_at=form.expires_at,
        max_size_bytes=record.size_bytes,
    )
