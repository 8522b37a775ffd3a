"""The second half of a batch: results come to the caller's machine, one by one or as one archive."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.client.archive import archive_file, is_whole
from server.client.errors import ClientError, TransferFailed
from server.client.http import RestageClient
from server.client.photos import is_there, result_file
from server.client.request import PhotoResult
from server.client.sending import MAX_PARALLEL_TRANSFERS
from server.client.transfers import fetch_archive, fetch_result

_EXPIRED = "output_expired: the server has removed the result after its time"


class ResultFetcher:
    """Brings results into a folder. What cannot be fetched is told in its photo's `error`; the others go on.

    Args:
        client: the server.
        out_dir: an existing folder.
    """

    def __init__(self, client: RestageClient, out_dir: Path) -> None:
        self._client = client
        self._out_dir = out_dir
        self._transfers = asyncio.Semaphore(MAX_PARALLEL_TRANSFERS)

    async def fetch(self, job: Mapping[str, Any], result: PhotoResult) -> None:
        """Fetch the result of a job that succeeded, unless it is there already."""
        output = job["output"]
        if output is None:
            result.error = _EXPIRED
            return
        file = result_file(self._out_dir, result.index, result.photo, output)
        async with self._transfers:
            try:
                if not await asyncio.to_thread(is_there, file, output["sha256"]):
                    await self._fetch_patiently(job, file)
            except ClientError as error:
                result.error = f"download_failed: {error}"
            except OSError as error:
                result.error = f"download_failed: {file} cannot be written: {error.strerror}"
            else:
                result.file, result.error = file, None

    async def _fetch_patiently(self, job: Mapping[str, Any], file: Path) -> None:
        patience, was_refused = self._client.new_patience(), False
        while True:
            try:
                await fetch_result(self._client, job["output"], file, tag=job["id"])
            except TransferFailed as error:
                # A URL may have expired: once, a refusal is worth a fresh one.
                if was_refused and not error.is_worth_another_try:
                    raise
                was_refused = was_refused or not error.is_worth_another_try
                self._client.on_wait(f"waiting for the store: {error}")
                if not await patience.pause():
                    raise
            else:
                return
            job = await self._client.read_job(job["id"])
            if job["output"] is None:
                raise ClientError(_EXPIRED)

    async def fetch_as_archive(
        self, batch: Mapping[str, Any], jobs: Sequence[tuple[Mapping[str, Any], PhotoResult]]
    ) -> Path | None:
        """Fetch the results of a finished batch as one zip, unless it is there already.

        Args:
            batch: that has finished.
            jobs: those of its jobs that succeeded, each with what is told of it.

        Returns:
            The archive; None where there is nothing to fetch, or it could not be fetched.
        """
        ready = [result for job, result in jobs if job["output"]]
        for job, result in jobs:
            result.error = None if job["output"] else _EXPIRED
        if not ready:
            return None
        sha256s = frozenset(job["output"]["sha256"] for job, _ in jobs if job["output"])
        file = archive_file(self._out_dir, batch["label"], batch["id"])
        try:
            if not await asyncio.to_thread(is_whole, file, sha256s):
                await self._fetch_archive_patiently(batch["id"], file, sha256s)
        except (TransferFailed, OSError) as error:
            why = f"{file} cannot be written: {error.strerror}" if isinstance(error, OSError) else error
            for result in ready:
                result.error = f"download_failed: {why}"
            return None
        for result in ready:
            result.file = file
        return file

    async def _fetch_archive_patiently(self, batch_id: str, file: Path, sha256s: frozenset[str]) -> None:
        patience = self._client.new_patience()
        while True:
            try:
                await fetch_archive(self._client, batch_id, file, sha256s)
            except TransferFailed as error:
                if not error.is_worth_another_try:
                    raise
                self._client.on_wait(f"waiting for the archive: {error}")
                if not await patience.pause():
                    raise
            else:
                return
