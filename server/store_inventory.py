"""What is in the store, page by page, for whoever compares it with the ledger."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

from minio import Minio

from server.errors import ObjectNotFound
from server.settings import StoreSettings
from server.store_trouble import StoreTrouble

if TYPE_CHECKING:
    from minio.datatypes import Object

# S3's own bound for what one call lists.
PAGE_OBJECTS = 1000
_BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True)
class StoredObject:
    """An object as the store lists it; `changed_at` is by the store's clock."""

    key: str
    size_bytes: int
    changed_at: datetime


class Inventory:
    """Lists both buckets and looks at single objects. Every call blocks, is bounded, and raises as `Store`'s do."""

    def __init__(self, client: Minio, trouble: StoreTrouble, settings: StoreSettings) -> None:
        self._client = client
        self._trouble = trouble
        self._uploads_bucket = settings.uploads_bucket
        self._outputs_bucket = settings.outputs_bucket

    def uploads(self, after: str = "") -> list[StoredObject]:
        """Return the next uploads behind the key `after`, at most `PAGE_OBJECTS`; an empty list is the end."""
        return self._page(self._uploads_bucket, after)

    def outputs(self, after: str = "") -> list[StoredObject]:
        """Return the next objects of the outputs bucket behind the key `after`; an empty list is the end."""
        return self._page(self._outputs_bucket, after)

    def outputs_of(self, job_id: str) -> dict[str, StoredObject]:
        """Return by key what is stored of a job: results, what tries have left, its marker."""
        with self._trouble.translated(self._outputs_bucket, job_id):
            found = self._client.list_objects(self._outputs_bucket, f"{job_id}/", recursive=True)
            return {one.key: one for one in _described(islice(found, PAGE_OBJECTS))}

    def has_upload(self, key: str) -> bool:
        """Whether an upload is there; a bucket that is missing is trouble with the store, as everywhere."""
        return self._has(self._uploads_bucket, key)

    def has_output(self, key: str) -> bool:
        """Whether a result, or whatever else of a job, is there."""
        return self._has(self._outputs_bucket, key)

    def output_sha256(self, key: str) -> str:
        """Read a whole result, block by block, and return its digest in hexadecimal.

        Raises:
            ObjectNotFound: nothing is stored under `key`.
        """
        digest = hashlib.sha256()
        with self._trouble.translated(self._outputs_bucket, key, moves_object=True):
            response = self._client.get_object(self._outputs_bucket, key)
            try:
                while block := response.read(_BLOCK_BYTES, decode_content=False):
                    digest.update(block)
            finally:
                response.close()
                response.release_conn()
        return digest.hexdigest()

    def _page(self, bucket: str, after: str) -> list[StoredObject]:
        with self._trouble.translated(bucket):
            # One call: the next would be made for the object behind these.
            found = self._client.list_objects(bucket, start_after=after or None, recursive=True)
            return list(_described(islice(found, PAGE_OBJECTS)))

    def _has(self, bucket: str, key: str) -> bool:
        try:
            with self._trouble.translated(bucket, key):
                self._client.stat_object(bucket, key)
        except ObjectNotFound:
            # That answer has no body, so it would be the same without the bucket, or from a proxy before the store.
            with self._trouble.translated(bucket, key):
                found = self._client.list_objects(bucket, prefix=key, recursive=True)
                return any(one.object_name == key for one in islice(found, 1))
        return True


def _described(found: "Iterable[Object]") -> Iterable[StoredObject]:
    for one in found:
        if one.object_name:
            yield StoredObject(one.object_name, one.size or 0, one.last_modified or datetime.now(UTC))
