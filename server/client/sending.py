"""The first half of a batch: photos are read, announced and sent, all at the same time."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from server.client.errors import ApiError, ItemProblem, TransferFailed, read_item_problems
from server.client.http import RestageClient
from server.client.journal import Journal
from server.client.photos import Photo, read_photo, size_of
from server.client.progress import BatchProgress
from server.client.record import ArrivedPhoto
from server.client.request import PhotoResult
from server.client.transfers import send_photo

# Measured with 50 photos of 1 MB: beside the store 4 at once are 1.7, 8 are 1.9 and 16 are 2.0 times as fast as one;
# behind 50 ms of line 3, 5 and 7 times. Few large photos fill a line by themselves, and the more of them share a slow
# one, the longer each takes: a form must not expire before its photo has arrived.
MAX_PARALLEL_TRANSFERS = 16
_PARALLEL_BYTES = 64_000_000
_PARALLEL_READS = 2
_FORBIDDEN = 403  # the store's answer to a form that has expired


def count_parallel(sizes_bytes: Sequence[int]) -> int:
    """How many of these photos are sent at once."""
    return max(2, min(MAX_PARALLEL_TRANSFERS, _PARALLEL_BYTES * len(sizes_bytes) // max(1, sum(sizes_bytes))))


class PhotoSender:
    """Brings photos into the store. What arrives is in the journal before it is relied on; what is refused is told.

    Args:
        client: the server.
        results: of all photos of the request; those whose photos cannot be sent become `refused`.
        journal: knows which photos lie in the store already.
        progress: told of every advance.
    """

    def __init__(
        self, client: RestageClient, results: Sequence[PhotoResult], journal: Journal, progress: BatchProgress
    ) -> None:
        self._client = client
        self._results = results
        self._journal = journal
        self._progress = progress
        self._reads = asyncio.Semaphore(_PARALLEL_READS)
        self._transfers = asyncio.Semaphore(MAX_PARALLEL_TRANSFERS)
        self._forms = asyncio.Semaphore(MAX_PARALLEL_TRANSFERS)
        self._num_there = 0

    async def send_all(self) -> None:
        """Send every photo that is not in the store.

        Raises:
            BadPhotos: a photo cannot be read.
            ApiError: the request as a whole is refused.
            ServerUnreachable: the server is away for too long.
        """
        to_send = [result for result in self._results if result.index not in self._journal.record.arrived]
        if not to_send:
            return
        sizes_bytes = [size_of(result.photo) for result in to_send]
        num_parallel = count_parallel(sizes_bytes)
        self._transfers = asyncio.Semaphore(num_parallel)
        self._forms = asyncio.Semaphore(2 * num_parallel)
        self._progress.start_uploads(sum(sizes_bytes))
        # Before the first call, so that a death after it finds a key to go on with.
        await self._journal.save()
        try:
            async with asyncio.TaskGroup() as group:
                await self._announce_all(to_send, group)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self._journal.save()
        if self._num_there:
            self._progress.note(f"photos that were on the server already: {self._num_there}")

    async def _announce_all(self, to_send: Sequence[PhotoResult], group: asyncio.TaskGroup) -> None:
        """Announce photos as they have been read: while one call is under way, the photos of the next are read.

        No more are announced than will be sent soon: on a slow line a form would expire before its turn came.
        """
        read: asyncio.Queue[tuple[PhotoResult, Photo]] = asyncio.Queue()
        for result in to_send:
            group.create_task(self._read(result, read))
        num_left = len(to_send)
        while num_left:
            await self._forms.acquire()
            ready = [await read.get()]
            while not (read.empty() or self._forms.locked()):
                await self._forms.acquire()
                ready.append(read.get_nowait())
            num_left -= len(ready)
            for form in await self._request_forms(ready):
                place: int = form["index"]
                group.create_task(self._send(*ready[place], form))

    async def _read(self, result: PhotoResult, read: asyncio.Queue[tuple[PhotoResult, Photo]]) -> None:
        async with self._reads:
            read.put_nowait((result, await asyncio.to_thread(read_photo, result.photo)))

    async def _request_forms(self, ready: Sequence[tuple[PhotoResult, Photo]]) -> list[dict[str, Any]]:
        try:
            answer = await self._client.request_forms([photo for _, photo in ready])
        except ApiError as error:
            if not error.items:
                raise
            forms, problems = list[dict[str, Any]](), list(error.items)
        else:
            forms, problems = answer["uploads"], read_item_problems(answer)
        for problem in problems:
            result, photo = ready[problem.index]
            self._refuse(result, photo, problem)
        return forms

    def _refuse(self, result: PhotoResult, photo: Photo, problem: ItemProblem) -> None:
        self._forms.release()
        result.refuse(str(problem))
        self._progress.skip_upload(photo.size_bytes)

    async def _send(self, result: PhotoResult, photo: Photo, form: Mapping[str, Any]) -> None:
        async with self._transfers:
            try:
                upload_id = await self._send_with_fresh_form(photo, form)
            except (TransferFailed, OSError) as error:
                result.refuse(f"upload_failed: {error}")
                return
            finally:
                self._forms.release()
        self._journal.record.arrived[result.index] = ArrivedPhoto(upload_id=upload_id, sha256=photo.sha256)
        await self._journal.save()

    async def _send_with_fresh_form(self, photo: Photo, form: Mapping[str, Any]) -> str:
        """Send a photo; returns its upload id."""
        if not form.get("exists"):
            try:
                await send_photo(self._client, photo, form, self._progress.count_uploaded)
            except TransferFailed as error:
                if error.http_status != _FORBIDDEN:
                    raise
            else:
                return form["upload_id"]
            # Behind very large photos on a very slow line a form expires all the same: a new one for this photo alone.
            (form,) = (await self._client.request_forms([photo]))["uploads"]
            if not form.get("exists"):
                await send_photo(self._client, photo, form, self._progress.count_uploaded)
                return form["upload_id"]
        self._num_there += 1
        self._progress.skip_upload(photo.size_bytes)
        return form["upload_id"]
