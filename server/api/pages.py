"""What all lists share: how long a page is, and where it begins."""

import re
from typing import Annotated

from litestar.params import QueryParameter

from server.errors import FieldError, InvalidRequest

# A batch's place in all lists, and for jobs how many of its jobs were shown.
_CURSOR = r"[0-9]{1,19}(\.[0-9]{1,6})?"
PageLimit = Annotated[int, QueryParameter(ge=1, le=100, description="Most entries on the page.")]
PageCursor = Annotated[
    str | None,
    QueryParameter(
        max_length=64,
        description="`next_cursor` of the page before, with the same filters.",
        schema_extra={"pattern": f"^{_CURSOR}$"},
    ),
]


def check_cursor(cursor: str | None) -> str | None:
    """Return a cursor that a page of ours gave out.

    Raises:
        InvalidRequest: it has another form.
    """
    if cursor is None or re.fullmatch(_CURSOR, cursor):
        return cursor
    detail = "needs the next_cursor of the page before, or nothing"
    raise InvalidRequest(f"cursor {detail}", (FieldError("?cursor", "invalid_value", detail),))
