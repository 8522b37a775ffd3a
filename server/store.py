"""The object store, where photos come in and results go out; the only code that knows S3."""

import base64
import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

import urllib3
from minio import Minio
from minio.datatypes import PostPolicy
from minio.error import S3Error

from server.errors import ObjectChanged
from server.settings import StoreSettings
from server.store_trouble import EmptyObject, Patience, StoreTrouble

if TYPE_CHECKING:
    from minio.helpers import DictType
    from urllib3.response import BaseHTTPResponse

# An output is sent in one request up to this size; a multipart upload can wait for ever on a lost connection.
_PART_SIZE_BYTES = 64 * 1024 * 1024
_UNSAFE_IN_FILENAMES = re.compile(r"[^\w .()+-]")


@dataclass(frozen=True)
class UploadForm:
    """What a client needs to send one file to the store: a form POST of `fields`, then the file as `file`."""

    url: str
    fields: dict[str, str]
    expires_at: datetime


@dataclass(frozen=True)
class ObjectStart:
    """The first bytes of an object, and what the store says about the whole of it."""

    data: bytes
    size_bytes: int
    etag: str
    content_type: str


class Store:
    """Uploads and outputs in an S3 store. Every call blocks; safe to share between threads, not between processes.

    Every method that talks to the store raises StoreUnavailable when it cannot be reached, is silent for
    `read_timeout_seconds`, answers with a server error, or refuses our keys.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._trouble = StoreTrouble(settings)
        self._pool = self._make_pool(settings.pool_size)
        self._client = self._make_client(settings.endpoint, secure=settings.secure, pool=self._pool)
        # The Host is part of a signature, so URLs for clients are signed for the address that clients use. This client
        # never connects: its region is set, and signing is arithmetic.
        public_endpoint = settings.public_endpoint or settings.endpoint
        public_secure = settings.secure if settings.public_secure is None else settings.public_secure
        self._public_pool = self._make_pool(1)
        self._public_client = self._make_client(public_endpoint, secure=public_secure, pool=self._public_pool)
        self._upload_url = f"{'https' if public_secure else 'http'}://{public_endpoint}/{settings.uploads_bucket}"

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.clear()
        self._public_pool.clear()

    def ensure_buckets(self) -> None:
        """Make the two buckets where they are missing."""
        for bucket in (self._settings.uploads_bucket, self._settings.outputs_bucket):
            with self._trouble.translated(bucket):
                if self._client.bucket_exists(bucket):
                    continue
                try:
                    self._client.make_bucket(bucket)
                except S3Error as error:
                    # Another process may have made it since we looked.
                    if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                        raise

    def check(self) -> None:
        """Ask for both buckets.

        Raises:
            StoreUnavailable: the store cannot serve; a bucket that is missing counts.
        """
        for bucket in (self._settings.uploads_bucket, self._settings.outputs_bucket):
            with self._trouble.translated(bucket):
                exists = self._client.bucket_exists(bucket)
            if not exists:
                raise self._trouble.unavailable(f"has no bucket {bucket}")

    def upload_form(
        self,
        key: str,
        *,
        content_type: str,
        max_size_bytes: int,
        min_size_bytes: int = 1,
        sha256: str | None = None,
        ttl_seconds: float,
    ) -> UploadForm:
        """Sign a form that lets its holder store one file under `key`; the store is not asked.

        Until it expires, the form may be used again: what was looked at is told from what came later by its ETag.

        Args:
            key: the object's key in the uploads bucket, exactly.
            content_type: the file's type, exactly.
            max_size_bytes: largest size that the store takes.
            min_size_bytes: smallest; the same as the largest for one exact size.
            sha256: hexadecimal; the store then refuses any other bytes.
            ttl_seconds: how long the store takes the form.
        """
        expires_at = datetime.now(UTC) + timedelta(seconds=ttl_seconds)
        fields = {"key": key, "Content-Type": content_type}
        if sha256 is not None:
            fields["x-amz-checksum-algorithm"] = "SHA256"
            fields["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(sha256)).decode()
        policy = PostPolicy(self._settings.uploads_bucket, expires_at)
        for name, value in fields.items():
            policy.add_equals_condition(name, value)
        policy.add_content_length_range_condition(min_size_bytes, max_size_bytes)
        signature = self._public_client.presigned_post_policy(policy)
        return UploadForm(self._upload_url, fields | signature, expires_at)

    def read_start(self, key: str, num_bytes: int) -> ObjectStart:
        """Read the first bytes of an upload, and its size, ETag and type, in one request.

        Raises:
            ObjectNotFound: nothing is stored under `key`.
        """
        bucket = self._settings.uploads_bucket
        try:
            with self._opened(bucket, key, length=num_bytes) as response:
                data = response.read(decode_content=False)
        except EmptyObject:
            return ObjectStart(b"", 0, "", "")
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return ObjectStart(
            data=data[:num_bytes],
            # A store that ignores the range sends the whole object.
            size_bytes=int(total) if total.isdigit() else len(data),
            etag=_bare_etag(response),
            content_type=response.headers.get("Content-Type", ""),
        )

    def fetch_upload(self, key: str, etag: str) -> bytes:
        """Read a whole upload, if it is still the one with `etag`.

        Raises:
            ObjectNotFound: nothing is stored under `key` any more.
            ObjectChanged: other bytes were stored since.
        """
        bucket = self._settings.uploads_bucket
        with self._opened(bucket, key, if_match=etag) as response:
            if _bare_etag(response) != etag:  # a store that ignores If-Match
                raise ObjectChanged(f"{bucket}/{key} was stored again with other bytes after it was accepted")
            return response.read(decode_content=False)

    def put_output(self, key: str, data: bytes, content_type: str) -> None:
        """Store a result; whatever is under `key` is replaced."""
        bucket = self._settings.outputs_bucket
        part_size = max(_PART_SIZE_BYTES, len(data))
        with self._trouble.translated(bucket, key):
            self._client.put_object(
                bucket, key, io.BytesIO(data), len(data), content_type=content_type, part_size=part_size
            )

    def output_url(self, key: str, *, filename: str, content_type: str, ttl_seconds: float) -> tuple[str, datetime]:
        """Sign a URL that downloads a result under `filename`; the store is not asked.

        Returns:
            The URL, and when it stops working.
        """
        expires_at = datetime.now(UTC) + timedelta(seconds=ttl_seconds)
        url = self._public_client.presigned_get_object(
            self._settings.outputs_bucket,
            key,
            expires=timedelta(seconds=ttl_seconds),
            # Saved, never shown: so no browser takes a picture with a script inside for a page.
            response_headers={
                "response-content-disposition": _attachment(filename),
                "response-content-type": content_type,
            },
        )
        return url, expires_at

    def delete_output(self, key: str) -> None:
        """Remove a result; it is no error if there is none."""
        bucket = self._settings.outputs_bucket
        with self._trouble.translated(bucket, key):
            self._client.remove_object(bucket, key)

    def _make_pool(self, size: int) -> urllib3.PoolManager:
        return urllib3.PoolManager(
            timeout=urllib3.Timeout(
                connect=self._settings.connect_timeout_seconds, read=self._settings.read_timeout_seconds
            ),
            maxsize=size,
            retries=Patience(
                total=2,
                backoff_factor=0.2,
                status_forcelist=[500, 502, 503, 504],
                redirect=False,  # a signature holds for one host only
                respect_retry_after_header=False,  # the store does not decide how long our callers wait
            ),
        )

    def _make_client(self, endpoint: str, *, secure: bool, pool: urllib3.PoolManager) -> Minio:
        return Minio(
            endpoint,
            self._settings.access_key.get_secret_value(),
            self._settings.secret_key.get_secret_value(),
            secure=secure,
            region=self._settings.region,
            http_client=pool,
        )

    @contextmanager
    def _opened(
        self, bucket: str, key: str, *, length: int = 0, if_match: str | None = None
    ) -> "Generator[BaseHTTPResponse]":
        with self._trouble.translated(bucket, key):
            headers: DictType = {} if if_match is None else {"If-Match": f'"{if_match}"'}
            response = self._client.get_object(bucket, key, length=length, request_headers=headers)
            try:
                yield response
            finally:
                # Both are needed: the one drops a body that was not read, the other gives the connection back.
                response.close()
                response.release_conn()


def _bare_etag(response: "BaseHTTPResponse") -> str:
    return response.headers.get("ETag", "").strip('"')


def _attachment(filename: str) -> str:
    """`Content-Disposition` of a download; its plain name is for clients that do not know RFC 6266."""
    plain = _UNSAFE_IN_FILENAMES.sub("_", filename.encode("ascii", "replace").decode())
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
