"""How bytes get to the object store: in one request and block by block, so that a file costs no memory."""

import base64
import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import SplitResult, urlsplit

import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.error import S3Error
from minio.signer import sign_v4_s3
from minio.time import to_amz_date
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from server.settings import StoreSettings
from server.store_deadline import running_transfer

if TYPE_CHECKING:
    from minio.helpers import DictType

_BLOCK_BYTES = 64 * 1024
_SEND_TIMEOUT_SECONDS = 30.0


class Sender:
    """Puts files into the store.

    The SDK knows two ways, and neither will do: it reads the whole file into memory, or it sends it in parts and waits
    without a timeout when a connection is lost. Only its signatures are used here.
    """

    def __init__(self, client: Minio, pool: urllib3.PoolManager, settings: StoreSettings) -> None:
        self._client = client
        self._pool = pool
        self._region = settings.region
        self._credentials = Credentials(settings.access_key.get_secret_value(), settings.secret_key.get_secret_value())

    def put(self, bucket: str, key: str, file: BinaryIO, *, size_bytes: int, content_type: str) -> str:
        """Store all of `file` under `key`; whatever is there is replaced. Raises what the S3 client raises.

        The file is read twice: the store is told its SHA-256 first, and refuses bytes that changed on the way.

        Returns:
            The object's ETag.

        Raises:
            ValueError: the file has another size.
        """
        digest, read_bytes = _digest(file)
        if read_bytes != size_bytes:
            raise ValueError(f"the file for {bucket}/{key} has {read_bytes} bytes; announced were {size_bytes}")
        # A presigned URL would do as well, but urllib3 logs the URL of a request that it tries again.
        url = urlsplit(self._client.presigned_put_object(bucket, key))._replace(query="")
        fields = {
            "Content-Length": str(size_bytes),
            "Content-Type": content_type,
            "x-amz-checksum-sha256": base64.b64encode(digest).decode(),
            # Part of the signature; not every store compares it with the bytes.
            "x-amz-content-sha256": digest.hex(),
        }
        file.seek(0)
        response = self._pool.request("PUT", url.geturl(), body=file, headers=self._signed(url, fields))
        if response.status != 200:
            raise S3Error.fromxml(response)
        return response.headers.get("ETag", "").strip('"')

    def _signed(self, url: SplitResult, fields: dict[str, str]) -> dict[str, str]:
        now = datetime.now(UTC)
        headers: DictType = {**fields, "Host": url.netloc, "x-amz-date": to_amz_date(now)}
        sign_v4_s3(
            method="PUT",
            url=url,
            region=self._region,
            headers=headers,
            credentials=self._credentials,
            content_sha256=fields["x-amz-content-sha256"],
            date=now,
        )
        return cast("dict[str, str]", headers)


def _digest(file: BinaryIO) -> tuple[bytes, int]:
    """SHA-256, and size in bytes, of the whole file."""
    digest, size_bytes = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        size_bytes += len(block)
    return digest.digest(), size_bytes


class UnhurriedPoolManager(urllib3.PoolManager):
    """Connections that give the store its time to take each block of a body.

    urllib3 grants the sending of a body no more time than connecting may take.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(blocksize=_BLOCK_BYTES, **options)
        self.pool_classes_by_scheme = {"http": _UnhurriedPool, "https": _UnhurriedTlsPool}

    def clear(self) -> None:
        """Close all idle connections at once; urllib3 by itself leaves that to the garbage collector."""
        for key in self.pools.keys():  # noqa: SIM118 (it cannot be iterated itself)
            self.pools[key].close()
        super().clear()


class _UnhurriedConnection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self._tell_transfer()

    def send(self, data: Any) -> None:
        if self.sock is not None:  # the first bytes also connect, and that in the time for connecting
            self._tell_transfer()
            self.sock.settimeout(_SEND_TIMEOUT_SECONDS)
        super().send(data)

    def _tell_transfer(self) -> None:
        """A connection may have served other calls before."""
        if (transfer := running_transfer()) is not None:
            transfer.use(self.sock)


class _UnhurriedTlsConnection(_UnhurriedConnection, HTTPSConnection):
    pass


# urllib3's own connections do not fit the protocols that it asks for either.
class _UnhurriedPool(HTTPConnectionPool):
    ConnectionCls = _UnhurriedConnection  # pyright: ignore[reportAssignmentType]

    def _put_conn(self, conn: Any) -> None:
        """Take a connection back; urllib3 does so before a call is over, where it tries again or an answer is read."""
        if conn is not None and (transfer := running_transfer()) is not None:
            transfer.leave(conn.sock)
        super()._put_conn(conn)


class _UnhurriedTlsPool(_UnhurriedPool, HTTPSConnectionPool):
    ConnectionCls = _UnhurriedTlsConnection  # pyright: ignore[reportAssignmentType]
