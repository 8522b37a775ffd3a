"""One batch, from photos on the caller's machine to results on the caller's machine."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.client.errors import ApiError, ClientError, ItemProblem, read_item_problems
from server.client.fetching import ResultFetcher
from server.client.http import RestageClient
from server.client.journal import Journal
from server.client.photos import plain
from server.client.progress import BatchProgress
from server.client.record import ArrivedPhoto
from server.client.request import BatchRequest, PhotoResult
from server.client.sending import PhotoSender

__all__ = ["BatchRequest", "BatchRun", "PhotoResult"]

_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.2, 2.0
_LOST_UPLOADS = frozenset({"upload_not_found", "upload_not_received"})


class BatchRun:
    """Takes one batch through upload, submission, waiting and download, in that order.

    Photos fail one by one: what happened to each stands in `results`, and the others go on. After an interruption
    `batch_id` names the batch that the server goes on with, if it was accepted; with the journal of an earlier run,
    this one goes on where that one stopped.

    Args:
        client: the server.
        request: photos and settings.
        progress: told of every advance.
        journal: of this request; without one nothing outlives the process.
    """

    def __init__(
        self, client: RestageClient, request: BatchRequest, progress: BatchProgress, journal: Journal | None = None
    ) -> None:
        self.results = [PhotoResult(index, path) for index, path in enumerate(request.photos)]
        self.batch: dict[str, Any] | None = None
        self.archive: Path | None = None
        self._client = client
        self._request = request
        self._progress = progress
        self._journal = journal or Journal()
        # The server numbers items, which are only those photos that could be sent.
        self._sent: list[PhotoResult] = []

    @property
    def batch_id(self) -> str | None:
        """Id of the batch once it was accepted."""
        return None if self.batch is None else self.batch["id"]

    @property
    def num_arrived(self) -> int:
        """How many photos lie in the store."""
        return len(self._journal.record.arrived)

    @property
    def num_to_fetch(self) -> int:
        """How many results are on the server and not on this machine."""
        return sum(not result.is_done for job, result in self._succeeded() if job["output"])

    async def submit(self) -> None:
        """Send the photos and submit them as one batch, or find what an earlier run submitted.

        Raises:
            ApiError: the request as a whole is refused.
            ServerUnreachable: the server is away for too long.
        """
        if await self._find_accepted():
            return
        if not await self._try_to_submit(is_last=False):
            await self._try_to_submit(is_last=True)
        if self.batch is None:
            self._journal.remove()

    async def finish(self, out_dir: Path, *, as_archive: bool = False) -> None:
        """Wait for the submitted batch and fetch its results.

        Args:
            out_dir: an existing folder.
            as_archive: fetch all at the end as one zip, in place of each as soon as it is there.

        Raises:
            ApiError: the batch is gone.
            ServerUnreachable: the server is away for too long.
        """
        if self.batch is None:
            return
        fetcher = ResultFetcher(self._client, out_dir)
        fetches: dict[str, asyncio.Task[None]] = {}
        poll_seconds = _FIRST_POLL_SECONDS
        while True:
            for job, result in [] if as_archive else self._succeeded():
                if job["id"] not in fetches:
                    fetches[job["id"]] = asyncio.create_task(fetcher.fetch(job, result))
            if self.batch["status"] == "finished":
                break
            await asyncio.sleep(poll_seconds)
            poll_seconds = min(_LAST_POLL_SECONDS, poll_seconds * 1.2)
            self._update(await self._client.read_batch(self.batch["id"]))
        await asyncio.gather(*fetches.values())
        if as_archive:
            self.archive = await fetcher.fetch_as_archive(self.batch, self._succeeded())
        if not self.num_to_fetch:
            self._journal.remove()

    async def _find_accepted(self) -> bool:
        """Find the batch that an earlier run submitted, if it knew that it was accepted."""
        record = self._journal.record
        for index, reason in record.refused.items():
            self.results[index].refuse(reason)
        if record.batch_id is None:
            self._tell_where_it_goes_on()
            return False
        try:
            batch = await self._client.read_batch(record.batch_id)
        except ApiError as error:
            if error.http_status != 404:
                raise
            await self._start_anew(f"batch {record.batch_id} of an earlier run is not on the server any more")
            return False
        self._progress.note(
            f"going on with batch {record.batch_id} of an earlier run of this command; --anew submits a new one"
        )
        self._sent = [self.results[index] for index in record.submitted or ()]
        self._update(batch)
        return True

    def _tell_where_it_goes_on(self) -> None:
        record = self._journal.record
        if record.submitted is not None:
            self._progress.note("going on with the submission of an earlier run: it is accepted once")
        elif record.arrived:
            self._progress.note(
                f"going on with an earlier run: {len(record.arrived)} of {len(self.results)} photos arrived"
            )

    async def _try_to_submit(self, *, is_last: bool) -> bool:
        """Submit what is in the store, after the rest was sent there; False where that is to be done once more."""
        await self._send_photos()
        record = self._journal.record
        self._sent = [self.results[index] for index in record.submitted or ()]
        if not self._sent:
            return True
        batch: dict[str, Any] | None = None
        try:
            answer = await self._client.submit(self._body(), idempotency_key=record.idempotency_key)
        except ApiError as error:
            if error.code == "not_found" and not is_last:
                await self._start_anew("the batch of an earlier run is not on the server any more")
                return False
            if error.code == "idempotency_conflict":
                raise ClientError(f"{error}\n  --anew submits a new batch") from error
            if not error.items:
                raise
            problems = error.items
        else:
            batch, problems = answer["batch"], read_item_problems(answer)
        if is_last or not await self._replace_lost_uploads(batch, problems):
            await self._settle(batch, problems)
            return True
        return False

    async def _replace_lost_uploads(self, batch: dict[str, Any] | None, problems: Sequence[ItemProblem]) -> bool:
        """Begin anew where uploads have expired; a batch of the other photos alone gives way to one of all."""
        lost = {self._sent[problem.index].index for problem in problems if problem.code in _LOST_UPLOADS}
        if lost:
            await self._start_anew(
                f"{len(lost)} of the photos that were sent are not on the server any more",
                keep={index: photo for index, photo in self._journal.record.arrived.items() if index not in lost},
                superseded_batch_id=None if batch is None else batch["id"],
            )
        return bool(lost)

    async def _send_photos(self) -> None:
        """Bring the photos into the store and settle which of them are submitted."""
        record = self._journal.record
        if record.superseded_batch_id is not None:
            await self._client.cancel_batch(record.superseded_batch_id)
            record.superseded_batch_id = None
        if record.submitted is None:
            await PhotoSender(self._client, self.results, self._journal, self._progress).send_all()
            record.submitted = sorted(record.arrived)
            record.refused = self._refused()
        await self._journal.save()

    async def _start_anew(
        self, why: str, *, keep: Mapping[int, ArrivedPhoto] | None = None, superseded_batch_id: str | None = None
    ) -> None:
        self._progress.note(f"{why}: starting anew")
        for result in self.results:
            result.status, result.error = "queued", None
        await self._journal.start_anew(arrived=keep, superseded_batch_id=superseded_batch_id)

    def _body(self) -> dict[str, Any]:
        arrived = self._journal.record.arrived
        return self._request.body(
            [
                {"upload_id": arrived[result.index].upload_id, "name": plain(result.photo.name)}
                | dict(self._request.overrides.get(result.index, {}))
                for result in self._sent
            ]
        )

    async def _settle(self, batch: dict[str, Any] | None, problems: Sequence[ItemProblem]) -> None:
        """Keep what the server has decided."""
        for problem in problems:
            self._sent[problem.index].refuse(str(problem))
        if batch is not None:
            record = self._journal.record
            record.refused, record.batch_id = self._refused(), batch["id"]
            await self._journal.save()
            self._update(batch)

    def _refused(self) -> dict[int, str]:
        return {result.index: result.error or "" for result in self.results if result.status == "refused"}

    def _succeeded(self) -> list[tuple[dict[str, Any], PhotoResult]]:
        jobs: list[dict[str, Any]] = [] if self.batch is None else self.batch["jobs"]
        return [(job, self._result_of(job)) for job in jobs if job["status"] == "succeeded"]

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
