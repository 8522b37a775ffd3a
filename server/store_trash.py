"""Deletes what the ledger has put into its trash, in as few calls as S3 allows."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import structlog
from minio import Minio
from minio.deleteobjects import DeleteObject

from server.errors import StoreUnavailable
from server.settings import StoreSettings
from server.store_trouble import StoreTrouble

# S3's own bound, for what one call lists and for what one call deletes.
_MAX_OBJECTS = 1000
# One object, or all that one attempt at a job has stored; a prefix that is any shorter would be too much to delete.
_UPLOAD = re.compile(r"uploads/([\w-][\w.-]*)", re.ASCII)
_OUTPUT = re.compile(r"outputs/([\w-][\w.-]*(?:/[\w-][\w.-]*)*)", re.ASCII)
_ATTEMPT = re.compile(r"outputs/([\w-]+/[\w-]+/)", re.ASCII)
_log = structlog.stdlib.get_logger()


@dataclass(frozen=True)
class _Doomed:
    """The objects behind a name; `is_all` is False where there may be more of them."""

    name: str
    keys: frozenset[str]
    is_all: bool = True


class Trash:
    """Deletes objects by the names that they have in the ledger."""

    def __init__(self, client: Minio, trouble: StoreTrouble, settings: StoreSettings) -> None:
        self._client = client
        self._trouble = trouble
        self._uploads_bucket = settings.uploads_bucket
        self._outputs_bucket = settings.outputs_bucket

    def delete(self, names: Sequence[str]) -> list[str]:
        """Delete what stands behind `names`, and return those behind which nothing is left; as `Store.delete`."""
        uploads, outputs, attempts = (_matching(pattern, names) for pattern in (_UPLOAD, _OUTPUT, _ATTEMPT))
        if unknown := set(names) - uploads.keys() - outputs.keys() - attempts.keys():
            # They stay in the trash, where they can be looked at: they are a mistake of ours.
            _log.error("trash.misnamed", names=sorted(unknown)[:10], num_names=len(unknown))
        gone: list[str] = []
        trouble: StoreUnavailable | None = None
        for bucket, doomed in (
            (self._uploads_bucket, (_Doomed(name, frozenset([key])) for name, key in uploads.items())),
            (self._outputs_bucket, (_Doomed(name, frozenset([key])) for name, key in outputs.items())),
            (self._outputs_bucket, (self._look(name, prefix) for name, prefix in attempts.items())),
        ):
            try:
                # One by one, so that what was deleted before trouble came is told.
                for name in self._delete(bucket, doomed):
                    gone.append(name)  # noqa: PERF402
            except StoreUnavailable as error:
                trouble = error
        if trouble and not gone:
            raise trouble
        return gone

    def _look(self, name: str, prefix: str) -> _Doomed:
        """Find the objects under a prefix, at most as many as one call lists."""
        with self._trouble.translated(self._outputs_bucket, prefix):
            found = self._client.list_objects(self._outputs_bucket, prefix, recursive=True)
            keys = frozenset(item.object_name for item in islice(found, _MAX_OBJECTS) if item.object_name)
        return _Doomed(name, keys, is_all=len(keys) < _MAX_OBJECTS)

    def _delete(self, bucket: str, doomed: Iterable[_Doomed]) -> Iterator[str]:
        """Delete in calls as large as may be, and yield the names that are gone after each."""
        waiting: list[_Doomed] = []
        num_keys = 0
        for one in doomed:
            if num_keys + len(one.keys) > _MAX_OBJECTS:
                yield from self._delete_at_once(bucket, waiting)
                waiting, num_keys = [], 0
            waiting.append(one)
            num_keys += len(one.keys)
        yield from self._delete_at_once(bucket, waiting)

    def _delete_at_once(self, bucket: str, doomed: Sequence[_Doomed]) -> Iterator[str]:
        keys = sorted({key for one in doomed for key in one.keys})
        failed: dict[str | None, str] = {}
        if keys:
            with self._trouble.translated(bucket):
                errors = self._client.remove_objects(bucket, [DeleteObject(key) for key in keys])
                # S3 counts what is missing as deleted; a store that is more exact says so.
                failed = {error.name: error.code for error in errors if error.code != "NoSuchKey"}
        if failed:
            code = next(iter(failed.values()))
            _log.warning("trash.refused", bucket=bucket, num_objects=len(failed), code=code)
        if None in failed:  # the store speaks of no object, so of all
            return
        yield from (one.name for one in doomed if one.is_all and not one.keys & failed.keys())


def _matching(pattern: re.Pattern[str], names: Iterable[str]) -> dict[str, str]:
    """The names that `pattern` fits wholly, each with what its first group caught."""
    matches = ((name, pattern.fullmatch(name)) for name in names)
    return {name: match[1] for name, match in matches if match}
