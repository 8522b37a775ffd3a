"""The object store, where photos come in and results go out; with its `store_*` parts the only code that knows S3."""

import base64
import io
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import urllib3
from minio import Minio
from minio.datatypes import PostPolicy

from server.errors import ObjectChanged
from server.settings import LimitsSettings, RetentionSettings, StoreSettings
from server.store_buckets import Buckets
from server.store_deadline import Deadlines
from server.store_inventory import Inventory
from server.store_sending import Sender, UnhurriedPoolManager
from server.store_trash import Trash
from server.store_trouble import EmptyObject, Patience, StoreTrouble

if TYPE_CHECKING:
    from minio.helpers import DictType
    from urllib3.response import BaseHTTPResponse

# A few megabytes.
_MAX_KEPT_URLS = 5000
# Of one object, where nobody knows better: more than any photo or result has.
_MOST_BYTES = 1_000_000_000
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
    `read_timeout_seconds`, answers with a server error, or refuses our keys. It raises StoreTooSlow, which is one of
    them, when the call is not done after `transfer_timeout_seconds`, or where no object moves after two read timeouts.

    Attributes:
        inventory: lists what is in the store.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._deadlines = Deadlines()
        self._trouble = StoreTrouble(settings, self._deadlines)
        self._pool = self._make_pool(settings.pool_size)
        self._client = self._make_client(settings.endpoint, secure=settings.secure, pool=self._pool)
        self._sender = Sender(self._client, self._pool, settings)
        self._buckets = Buckets(self._client, self._trouble, settings)
        self._trash = Trash(self._client, self._trouble, settings)
        self.inventory = Inventory(self._client, self._trouble, settings)
        # The Host is part of a signature, so URLs for clients are signed for the address that clients use. This client
        # never connects: its region is set, and signing is arithmetic.
        public_endpoint = settings.public_endpoint or settings.endpoint
        public_secure = settings.secure if settings.public_secure is None else settings.public_secure
        self._public_pool = self._make_pool(1)
        self._public_client = self._make_client(public_endpoint, secure=public_secure, pool=self._public_pool)
        # Half of what reading a batch costs would be signing; most reads are polls that want the same URLs again.
        self._sign_output = lru_cache(_MAX_KEPT_URLS)(self._sign_output_anew)
        self._upload_url = f"{'https' if public_secure else 'http'}://{public_endpoint}/{settings.uploads_bucket}"

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.clear()
        self._public_pool.clear()
        self._deadlines.close()

    def ensure_buckets(self) -> None:
        """Make the two buckets where they are missing."""
        self._buckets.ensure()

    def prepare_buckets(self, retention: RetentionSettings, limits: LimitsSettings) -> None:
        """Set what the buckets allow to pages in browsers, and when the store itself removes what was forgotten.

        A store that refuses is logged, and raises nothing: the server works without.
        """
        self._buckets.prepare(retention, limits)

    def check(self) -> None:
        """Ask for both buckets.

        Raises:
            StoreUnavailable: the store cannot serve; a bucket that is missing counts.
        """
        self._buckets.check()

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
                data = self._read(response, f"{bucket}/{key}", num_bytes)
        except EmptyObject:
            return ObjectStart(b"", 0, "", "")
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        # A store that ignores the range begins with the whole object.
        total = total if total.isdigit() else response.headers.get("Content-Length", "")
        return ObjectStart(
            data=data,
            size_bytes=int(total) if total.isdigit() else len(data),
            etag=_bare_etag(response),
            content_type=response.headers.get("Content-Type", ""),
        )

    def fetch_upload(self, key: str, etag: str, *, size_bytes: int | None = None) -> bytes:
        """Read a whole upload, if it is still the one with `etag`.

        Args:
            key: the object's key in the uploads bucket.
            etag: as the object was looked at.
            size_bytes: then too; None: whatever it is.

        Raises:
            ObjectNotFound: nothing is stored under `key` any more.
            ObjectChanged: other bytes were stored since.
        """
        bucket = self._settings.uploads_bucket
        with self._opened(bucket, key, if_match=etag, moves_object=True) as response:
            # First the whole body: without it nobody knows whether the header was whole.
            data = self._read_all(response, f"{bucket}/{key}", size_bytes)
            # A store may ignore If-Match.
            if _bare_etag(response) != etag or size_bytes not in {None, len(data)}:
                raise ObjectChanged(f"{bucket}/{key} was stored again with other bytes after it was accepted")
            return data

    def put_upload(self, key: str, file: BinaryIO, size_bytes: int, content_type: str) -> str:
        """Store a photo that a client sent to us; whatever is under `key` is replaced.

        Args:
            key: the object's key in the uploads bucket.
            file: is read twice from its start, in small blocks, and stays open.
            size_bytes: of the whole file.
            content_type: the object's type.

        Returns:
            The object's ETag.

        Raises:
            ValueError: the file has another size.
        """
        bucket = self._settings.uploads_bucket
        with self._trouble.translated(bucket, key, moves_object=True):
            return self._sender.put(bucket, key, file, size_bytes=size_bytes, content_type=content_type)

    def put_output(self, key: str, data: bytes, content_type: str) -> None:
        """Store a result; whatever is under `key` is replaced."""
        bucket = self._settings.outputs_bucket
        with self._trouble.translated(bucket, key, moves_object=True):
            self._sender.put(bucket, key, io.BytesIO(data), size_bytes=len(data), content_type=content_type)

    def put_marker(self, key: str, data: bytes) -> None:
        """Store what is to be known of a result beside it; whatever is under `key` is replaced."""
        bucket = self._settings.outputs_bucket
        with self._trouble.translated(bucket, key):
            self._sender.put(bucket, key, io.BytesIO(data), size_bytes=len(data), content_type="application/json")

    def read_marker(self, key: str, max_bytes: int) -> bytes:
        """Read what is to be known of a result, or a byte more than `max_bytes` of it.

        Raises:
            ObjectNotFound: nothing is stored under `key`.
        """
        bucket = self._settings.outputs_bucket
        with self._opened(bucket, key) as response:
            return self._read(response, f"{bucket}/{key}", max_bytes + 1)

    def read_output(self, key: str, *, size_bytes: int | None = None) -> bytes:
        """Read a whole result, which has `size_bytes` where that is known: another size is trouble with the store.

        Raises:
            ObjectNotFound: nothing is stored under `key` any more.
        """
        bucket = self._settings.outputs_bucket
        with self._opened(bucket, key, moves_object=True) as response:
            data = self._read_all(response, f"{bucket}/{key}", size_bytes)
        if size_bytes not in {None, len(data)}:
            raise self._trouble.unavailable(f"has another size for {bucket}/{key} than the {size_bytes} bytes written")
        return data

    def output_url(self, key: str, *, filename: str, content_type: str, ttl_seconds: int) -> tuple[str, datetime]:
        """Sign a URL that downloads a result under `filename`; the store is not asked.

        For half its life the URL is the same, whoever asks which process: a page that polls loads each picture once.

        Args:
            key: the object's key in the outputs bucket.
            filename: what a browser saves it as.
            content_type: what the store says that it is.
            ttl_seconds: how long a new URL works; at least half of that is left when it is given out.

        Returns:
            The URL, and when it stops working.
        """
        signed_at = _window_start(datetime.now(UTC), ttl_seconds // 2)
        lifetime = timedelta(seconds=ttl_seconds)
        return self._sign_output(key, filename, content_type, signed_at, lifetime), signed_at + lifetime

    def _sign_output_anew(
        self, key: str, filename: str, content_type: str, signed_at: datetime, lifetime: timedelta
    ) -> str:
        return self._public_client.presigned_get_object(
            self._settings.outputs_bucket,
            key,
            expires=lifetime,
            request_date=signed_at,
            # Saved, never shown: so no browser takes a picture with a script inside for a page.
            response_headers={
                "response-content-disposition": _attachment(filename),
                "response-content-type": content_type,
            },
        )

    def delete_output(self, key: str) -> None:
        """Remove a result; it is no error if there is none."""
        bucket = self._settings.outputs_bucket
        with self._trouble.translated(bucket, key):
            self._client.remove_object(bucket, key)

    def delete(self, names: Sequence[str]) -> list[str]:
        """Delete objects of both buckets, each by the name that it has in the ledger's trash.

        Args:
            names: `uploads/<key>`, `outputs/<key>`, or `outputs/<job>/<fence>/` for all that is stored under it. Of the
                last at most 1000 objects go in one call.

        Returns:
            The names behind which nothing is left, or never was anything. Those that the store refused are missing.

        Raises:
            StoreUnavailable: not one could be deleted.
        """
        return self._trash.delete(names)

    def _make_pool(self, size: int) -> urllib3.PoolManager:
        return UnhurriedPoolManager(
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
        self, bucket: str, key: str, *, length: int = 0, if_match: str | None = None, moves_object: bool = False
    ) -> "Generator[BaseHTTPResponse]":
        with self._trouble.translated(bucket, key, moves_object=moves_object):
            headers: DictType = {} if if_match is None else {"If-Match": f'"{if_match}"'}
            response = self._client.get_object(bucket, key, length=length, request_headers=headers)
            try:
                yield response
            finally:
                # Both are needed: the one drops a body that was not read, the other gives the connection back.
                response.close()
                response.release_conn()

    def _read_all(self, response: "BaseHTTPResponse", place: str, size_bytes: int | None) -> bytes:
        """Read to the end, but of what has no end no more than a byte too many: it would cost all of our memory."""
        return self._read(response, place, 1 + (_MOST_BYTES if size_bytes is None else size_bytes))

    def _read(self, response: "BaseHTTPResponse", place: str, num_bytes: int) -> bytes:
        """Read so many bytes, or all that there are.

        urllib3 takes a body that is cut short for its end, and a header that is cut short for all of it: what tells of
        no length may be either.
        """
        if response.length_remaining is None and response.headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise self._trouble.unavailable(f"broke off over {place}, or does not tell its length")
        data = response.read(num_bytes, decode_content=False)
        if len(data) < num_bytes and response.length_remaining:
            raise self._trouble.unavailable(f"broke off over {place} ({response.length_remaining} bytes are missing)")
        return data


def _bare_etag(response: "BaseHTTPResponse") -> str:
    return response.headers.get("ETag", "").strip('"')


def _window_start(now: datetime, window_seconds: int) -> datetime:
    """Begin of the window that `now` lies in; the first one began with 1970, for every process alike."""
    seconds = int(now.timestamp())
    return datetime.fromtimestamp(seconds - seconds % max(window_seconds, 1), UTC)


def _attachment(filename: str) -> str:
    """`Content-Disposition` of a download; its plain name is for clients that do not know RFC 6266."""
    plain = _UNSAFE_IN_FILENAMES.sub("_", filename.encode("ascii", "replace").decode())
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
