"""Sets up the two buckets: makes them, opens them to browsers, and has the store remove what everybody forgot."""

import base64
import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import structlog
from minio import Minio
from minio.error import S3Error

from server.errors import StoreUnavailable
from server.settings import LimitsSettings, RetentionSettings, StoreSettings
from server.store_trouble import StoreTrouble

if TYPE_CHECKING:
    from minio.helpers import DictType

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_DAY_SECONDS = 24 * 3600
_PREFLIGHT_SECONDS = 3600
# By these we know our rules again; rules with other ids, or none, are somebody else's.
_CORS_ID = "restage"
_LIFECYCLE_ID = "restage-backstop"
_ROOTS = {"cors": "CORSConfiguration", "lifecycle": "LifecycleConfiguration"}
_log = structlog.stdlib.get_logger()


class Buckets:
    """The bucket of uploads and the bucket of outputs, each as a whole."""

    def __init__(self, client: Minio, trouble: StoreTrouble, settings: StoreSettings) -> None:
        self._client = client
        self._trouble = trouble
        self._settings = settings
        self._names = (settings.uploads_bucket, settings.outputs_bucket)

    def ensure(self) -> None:
        """Make the buckets that are missing."""
        for bucket in self._names:
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
        for bucket in self._names:
            with self._trouble.translated(bucket):
                exists = self._client.bucket_exists(bucket)
            if not exists:
                raise self._trouble.unavailable(f"has no bucket {bucket}")

    def prepare(self, retention: RetentionSettings, limits: LimitsSettings) -> None:
        """Bring the rules for browsers and the lifecycle of both buckets up to date, where they are ours.

        The server works without them, so whatever the store answers is logged and no more.
        """
        origins = self._settings.cors_origins
        cors = (_cors(origins, "POST"), _cors(origins, "GET", "HEAD")) if origins else None
        self._settle("cors", _CORS_ID, cors)
        days = backstop_days(retention, limits)
        lifecycle = (_lifecycle(days[0]), _lifecycle(days[1])) if self._settings.lifecycle else None
        self._settle("lifecycle", _LIFECYCLE_ID, lifecycle)

    def _settle(self, subject: str, rule_id: str, wanted: tuple[str, str] | None) -> None:
        try:
            for bucket, xml in zip(self._names, wanted or (None, None), strict=True):
                with self._trouble.translated(bucket):
                    self._settle_bucket(bucket, subject, rule_id, xml)
        except StoreUnavailable as trouble:
            if wanted:  # who switched it off may have done so because of this very answer
                _log.warning("store.rules_refused", subject=subject, error=trouble.detail)

    def _settle_bucket(self, bucket: str, subject: str, rule_id: str, wanted: str | None) -> None:
        """Write `wanted`, or with None remove what is there; an operator's own rules are left alone."""
        found = self._read(bucket, subject)
        is_ours = {rule.findtext("{*}ID") for rule in found} <= {rule_id}
        if wanted is None:
            if found and is_ours:
                self._call("DELETE", bucket, subject)
        elif _meaning(found) != _meaning(ET.fromstring(wanted)):  # noqa: S314 (made here)
            if is_ours:
                self._call("PUT", bucket, subject, wanted.encode())
            else:
                _log.warning("store.rules_kept", subject=subject, bucket=bucket)

    def _read(self, bucket: str, subject: str) -> list[ET.Element]:
        """The rules that a bucket has by now; none where it never had any."""
        try:
            answer = self._call("GET", bucket, subject)
        except S3Error as error:
            if error.code in {"NoSuchCORSConfiguration", "NoSuchLifecycleConfiguration"}:
                return []
            raise
        root = ET.fromstring(answer)  # noqa: S314 (expat stops at entities that would grow)
        # A store that does not know the question may answer another one: what is in the bucket.
        if root.tag.rpartition("}")[2] != _ROOTS[subject]:
            raise self._trouble.unavailable(f"does not tell the {subject} rules of {bucket}")
        return list(root)

    def _call(self, method: str, bucket: str, subject: str, body: bytes | None = None) -> bytes:
        """Ask for `/<bucket>?<subject>`.

        The SDK has no call for CORS at all, and those that it has for the lifecycle stumble over rules that it does not
        expect. Its own way of making a signed request is private, but `minio` is held below its next version.
        """
        headers: DictType | None = None
        if body is not None:
            digest = hashlib.md5(body, usedforsecurity=False).digest()  # S3 wants it for these calls
            headers = {"Content-MD5": base64.b64encode(digest).decode()}
        response = self._client._execute(  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            method, bucket, body=body, headers=headers, query_params={subject: ""}
        )
        return response.data


def backstop_days(retention: RetentionSettings, limits: LimitsSettings) -> tuple[int, int]:
    """After how many days the store itself removes an upload and an output.

    Twice the longest life that the server gives an object, so that it never comes before the server does.
    """
    outputs_seconds = retention.records_seconds + retention.outputs_seconds
    uploads_seconds = retention.records_seconds + retention.inputs_seconds + limits.unused_upload_ttl_seconds
    return math.ceil(2 * uploads_seconds / _DAY_SECONDS), math.ceil(2 * outputs_seconds / _DAY_SECONDS)


def _cors(origins: Iterable[str], *methods: str) -> str:
    """Let pages of `origins` make these requests and read the answers.

    That gives nobody a right: the store takes no cookies, and each form and URL is signed for one object and a while.
    """
    allowed = [f"<AllowedOrigin>{escape(origin)}</AllowedOrigin>" for origin in origins]
    allowed += [f"<AllowedMethod>{method}</AllowedMethod>" for method in methods]
    return (
        f'<CORSConfiguration xmlns="{_NAMESPACE}"><CORSRule><ID>{_CORS_ID}</ID>{"".join(allowed)}'
        "<AllowedHeader>*</AllowedHeader><ExposeHeader>ETag</ExposeHeader>"
        f"<MaxAgeSeconds>{_PREFLIGHT_SECONDS}</MaxAgeSeconds></CORSRule></CORSConfiguration>"
    )


def _lifecycle(days: int) -> str:
    """Remove every object of a bucket after so many days."""
    return (
        f'<LifecycleConfiguration xmlns="{_NAMESPACE}"><Rule><ID>{_LIFECYCLE_ID}</ID><Filter><Prefix></Prefix></Filter>'
        f"<Status>Enabled</Status><Expiration><Days>{days}</Days></Expiration></Rule></LifecycleConfiguration>"
    )


def _meaning(rules: Iterable[ET.Element]) -> list[tuple[str, str]]:
    """What rules say, without what stores change in telling it: order, namespaces and ids."""
    said = [
        (element.tag.rpartition("}")[2], element.text.strip())
        for rule in rules
        for element in rule.iter()
        if element.text and element.text.strip()
    ]
    return sorted((name, text) for name, text in said if name != "ID")
