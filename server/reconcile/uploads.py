"""From the store to the ledger: what the uploads bucket holds, and whether a record of an upload names it."""

import re
from collections.abc import AsyncGenerator

from server.reconcile.comparison import Comparison
from server.reconcile.findings import Finding

# An upload's key is its id.
_UPLOAD = re.compile(r"[\w-]{1,64}", re.ASCII)


async def compare_uploads(comparison: Comparison) -> AsyncGenerator[Finding]:
    """Walk through the uploads bucket."""
    after = ""
    while page := await comparison.ask(comparison.store.inventory.uploads, after):
        after = page[-1].key
        comparison.tally.num_uploads += len(page)
        # After the listing: a record is there before its photo, so what is sent meanwhile is named.
        ids = [one.key for one in page if _UPLOAD.fullmatch(one.key)]
        known = await comparison.ledger.known_uploads(ids)
        trash = await comparison.ledger.in_trash([f"uploads/{one}" for one in ids])
        for one in page:
            if not _UPLOAD.fullmatch(one.key):
                yield Finding("foreign_object", "left", "no upload of this server has such a name", key=one.key)
                continue
            if one.key in known or f"uploads/{one.key}" in trash:
                continue
            if finding := await comparison.judge_stray("stray_upload", one, "upload", named_id=one.key):
                yield finding
