"""One batch, from photos on the caller's machine to results on the caller's machine."""

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.client.errors import ApiError, ItemProblem, TransferFailed, read_item_problems
from server.client.http import RestageClient
from server.client.photos import Photo, read_photo, result_file
from server.client.progress import BatchProgress

_PARALLEL_TRANSFERS = 4
_FETCH_ATTEMPTS = 5
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.2, 2.0
_FORBIDDEN = 403  # the store's answer to a form or URL that has expired


@dataclass
class PhotoResult:
    """What became of one photo. `status` is that of its job, or `refused`; `index` is its place among those given."""

    index: int
    photo: Path
    status: str = "queued"
    model: str | None = None
    seconds: float | None = None
    file: Path | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether the result lies on this machine."""
        return self.status == "succeeded" and self.file is not None


@dataclass(frozen=True)
class BatchRequest:
    """What to do with the photos. `overrides` holds settings of single photos by their index, over `defaults`."""

    photos: Sequence[Path]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    label: str | None = None


class BatchRun:
    """Takes one batch through upload, submission, waiting and download, in that order.

    Photos fail one by one: what happened to each stands in `results`, and the others go on. After an interruption
    `batch_id` names the batch that the server goes on with, if it was accepted.

    Args:
        client: the server.
        request: photos and settings.
        progress: told of every advance.
    """

    def __init__(self, client: RestageClient, request: BatchRequest, progress: BatchProgress) -> None:
        self.results = [PhotoResult(index, path) for index, path in enumerate(request.photos)]
        self.batch: dict[str, Any] | None = None
        self._client = client
        self._request = request
        self._progress = progress
        self._transfers = asyncio.Semaphore(_PARALLEL_TRANSFERS)
        # The server numbers items, which are only those photos that could be sent.
        self._sent: list[PhotoResult] = []

    @property
    def batch_id(self) -> str | None:
        """Id of the batch once it was accepted."""
        return None if self.batch is None else self.batch["id"]

    async def submit(self) -> None:
        """Send the photos and submit them as one batch.

        Raises:
            ApiError: the request as a whole is refused.
            ServerUnreachable: the server is away for too long.
        """
        upload_ids = await self._upload()
        self._sent = [self.results[index] for index in sorted(upload_ids)]
        if not self._sent:
            return
        items = [
            {"upload_id": upload_ids[result.index], "name": result.photo.name}
            | dict(self._request.overrides.get(result.index, {}))
            for result in self._sent
        ]
        body: dict[str, Any] = {"defaults": dict(self._request.defaults), "items": items}
        if self._request.label is not None:
            body["label"] = self._request.label
        try:
            answer = await self._client.submit(body, idempotency_key=secrets.token_hex(16))
        except ApiError as error:
            if not error.items:
                raise
            _refuse(self._sent, error.items)
            return
        _refuse(self._sent, read_item_problems(answer))
        self._update(answer["batch"])

    async def finish(self, out_dir: Path) -> None:
        """Wait for the submitted batch and fetch each result as soon as it is there.

        Raises:
            ApiError: the batch is gone.
            ServerUnreachable: the server is away for too long.
        """
        if self.batch is None:
            return
        fetches: dict[str, asyncio.Task[None]] = {}
        poll_seconds = _FIRST_POLL_SECONDS
        while True:
            for job in self.batch["jobs"]:
                if job["status"] == "succeeded" and job["id"] not in fetches:
                    fetches[job["id"]] = asyncio.create_task(self._fetch(job, out_dir))
            if self.batch["status"] == "finished":
                break
            await asyncio.sleep(poll_seconds)
            poll_seconds = min(_LAST_POLL_SECONDS, poll_seconds * 1.2)
            self._update(await self._client.read_batch(self.batch["id"]))
        await asyncio.gather(*fetches.values())

    async def _upload(self) -> dict[int, str]:
        """Send the photos; returns the upload ids by index of the photo."""
        photos = [await asyncio.to_thread(read_photo, result.photo) for result in self.results]
        try:
            answer = await self._client.request_forms(photos)
        except ApiError as error:
            if not error.items:
                raise
            _refuse(self.results, error.items)
            return {}
        _refuse(self.results, read_item_problems(answer))
        forms: dict[int, dict[str, Any]] = {form["index"]: form for form in answer["uploads"]}
        to_send = {index: form for index, form in forms.items() if not form.get("exists")}
        self._progress.start_uploads(sum(photos[index].size_bytes for index in to_send))
        await _all([self._send(self.results[index], photos[index], form) for index, form in to_send.items()])
        return {index: form["upload_id"] for index, form in forms.items() if self.results[index].status != "refused"}

    async def _send(self, result: PhotoResult, photo: Photo, form: dict[str, Any]) -> None:
        async with self._transfers:
            try:
                await self._send_with_fresh_form(photo, form)
            except (TransferFailed, OSError) as error:
                result.status, result.error = "refused", f"upload_failed: {error}"

    async def _send_with_fresh_form(self, photo: Photo, form: dict[str, Any]) -> None:
        try:
            await self._client.send_photo(photo, form, self._progress.count_uploaded)
        except TransferFailed as error:
            if error.http_status != _FORBIDDEN:
                raise
            # Behind many large photos on a slow line a form expires: a new one for this photo alone.
            form.update((await self._client.request_forms([photo]))["uploads"][0])
            if not form.get("exists"):
                await self._client.send_photo(photo, form, self._progress.count_uploaded)

    async def _fetch(self, job: Mapping[str, Any], out_dir: Path) -> None:
        result = self._result_of(job)
        file = result_file(out_dir, result.index, result.photo, job["output"])
        async with self._transfers:
            for attempts_left in reversed(range(_FETCH_ATTEMPTS)):
                try:
                    await self._client.fetch_result(job["output"], file)
                except TransferFailed as error:
                    result.error = f"download_failed: {error}"
                except OSError as error:
                    result.error = f"download_failed: {file} cannot be written: {error.strerror}"
                    return
                else:
                    result.file, result.error = file, None
                    return
                if attempts_left:
                    await asyncio.sleep(_FETCH_ATTEMPTS - attempts_left)
                    job = await self._client.read_job(job["id"])  # its URL is fresh

    def _result_of(self, job: Mapping[str, Any]) -> PhotoResult:
        index: int = job["index"]
        return self._sent[index]

    def _update(self, batch: dict[str, Any]) -> None:
        self.batch = batch
        for job in batch["jobs"]:
            result = self._result_of(job)
            result.status, result.model = job["status"], job["model"]
            if job["error"] and job["status"] == "failed":
                result.error = f"{job['error']['code']}: {job['error']['detail']}"
            timings: dict[str, float | None] = job["timings"]
            if job["status"] == "succeeded":
                result.seconds = sum(seconds or 0.0 for name, seconds in timings.items() if name != "queue")
        self._progress.show_batch(batch)


def _refuse(results: Sequence[PhotoResult], problems: Sequence[ItemProblem]) -> None:
    for problem in problems:
        result = results[problem.index]
        result.status, result.error = "refused", f"{problem.code}: {problem.detail}"


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; if one raises, stop the others and raise what it raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
