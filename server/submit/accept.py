"""From a request to an accepted batch: resolve each item, look at its photos, accept what is good, all or nothing."""

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from server.errors import (
    ItemError,
    LedgerUnavailable,
    NotFound,
    RequestError,
)
from server.jobs import Batch, Job, JobInput, Priority, Webhook
from server.ledger.api_side import ApiLedger, Idempotency, SubmitResult
from server.ledger.records import UploadRecord
from server.settings import Settings
from server.submit.admission import conflict, no_room_for, not_served, nothing_accepted, refusal_of
from server.submit.files import FileUploads, ReceivedFile
from server.submit.look import PhotoLook, UploadLost, UploadNotFound
from server.submit.refusals import ItemRefused, item_error
from server.submit.request import BatchRequest, Place
from server.submit.resolve import Draft, Resolver

_ID = re.compile(r"[0-9a-f]{32}")


def is_id(text: str) -> bool:
    """Whether `text` has the form of our ids. Any other from outside could be part of another key in Redis."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True)
class IdempotencyKey:
    """What the client sent to make a repeated request the same one; `body_sha256` is of the body in one spelling."""

    key: str
    body_sha256: str


@dataclass(frozen=True)
class Submission:
    """What a client is told: the batch as it is now, and the items that were refused."""

    batch: Batch
    errors: tuple[ItemError, ...]

    @property
    def http_status(self) -> int:
        """201 when every item was accepted, 207 when some were."""
        return 207 if self.errors else 201


class Submitter:
    """Accepts batches. Holds nothing between two calls."""

    def __init__(
        self, settings: Settings, *, resolver: Resolver, look: PhotoLook, uploads: FileUploads, ledger: ApiLedger
    ) -> None:
        self._settings = settings
        self._resolver = resolver
        self._look = look
        self._uploads = uploads
        self._ledger = ledger

    async def submit(
        self,
        owner: str,
        request: BatchRequest,
        idempotency: IdempotencyKey | None,
        files: Mapping[str, ReceivedFile] = MappingProxyType({}),
        *,
        key_id: str | None = None,
        max_owner_jobs: int | None = None,
        charge: Callable[[], Awaitable[None]] | None = None,
    ) -> Submission:
        """Accept the items that can be done, durably, and say of each other one why not.

        Args:
            owner: whose batch it is.
            request: its items may name `files`, and nothing else that is not there.
            idempotency: where the same request may come again.
            files: of the form that the request came in, by the names of their parts.
            key_id: whose secret signs the batch's webhook.
            max_owner_jobs: how many jobs of `owner` may be open with these; None for any number.
            charge: counts the request towards a limit, or raises; a request that came before is not counted again.

        Raises:
            NothingAccepted: every item was refused.
            IdempotencyConflict: the key was used before, with another body.
            QueueFull: too many jobs are open.
            TooManyOpenJobs: too many of this owner are.
            Forbidden: the batch alone has more than this owner may have open.
            LedgerFull: Redis' memory is kept for open jobs.
            ModelNotServed: no item can be done now, and some could be if a worker were ready for their model.
            DependencyError: Redis or the store is away; nothing was accepted, or the same key finds what was.
        """
        if idempotency and (first := await self._ledger.find_idempotent(owner, idempotency.key)):
            if first[0] != idempotency.body_sha256:
                raise conflict()
            return await self._replay(first[1])
        if charge is not None:
            await charge()
        drafts, errors = self._resolve(request)
        drafts = await self._store_files(owner, request, drafts, files, errors)
        photos = await self._look_at_photos(owner, drafts)
        jobs: list[Job] = []
        for draft in drafts:
            try:
                inputs = [
                    _usable(photos[upload_id], place)
                    for upload_id, place in zip(draft.upload_ids, draft.photo_places, strict=True)
                ]
                jobs.append(draft.complete(inputs, owner=owner, priority=Priority(request.priority)))
            except ItemRefused as refused:
                errors.append(item_error(request, draft.index, refused.error, refused.place))
        return await self._accept(owner, key_id, request, jobs, errors, idempotency, max_owner_jobs)

    def _resolve(self, request: BatchRequest) -> tuple[list[Draft], list[ItemError]]:
        drafts: list[Draft] = []
        errors: list[ItemError] = []
        for index, item in enumerate(request.items):
            try:
                drafts.append(self._resolver.draft(index, item, request.defaults))
            except ItemRefused as refused:
                errors.append(item_error(request, index, refused.error, refused.place))
        return drafts, errors

    async def _store_files(
        self,
        owner: str,
        request: BatchRequest,
        drafts: Sequence[Draft],
        files: Mapping[str, ReceivedFile],
        errors: list[ItemError],
    ) -> list[Draft]:
        """Store what good items name, and nothing else; returns the drafts that have uploads, and adds to `errors`."""
        named = dict.fromkeys(draft.file for draft in drafts if draft.file is not None)
        uploads = await self._uploads.store(owner, [files[part] for part in named])
        ready: list[Draft] = []
        for draft in drafts:
            if draft.file is None:
                ready.append(draft)
                continue
            match uploads[draft.file]:
                case RequestError() as error:
                    errors.append(item_error(request, draft.index, error, draft.photo_places[0]))
                case upload_id:
                    name = draft.name or files[draft.file].filename
                    ready.append(replace(draft, upload_ids=(upload_id,), name=name))
        return ready

    async def _look_at_photos(self, owner: str, drafts: Sequence[Draft]) -> Mapping[str, JobInput | RequestError]:
        upload_ids = list(dict.fromkeys(upload_id for draft in drafts for upload_id in draft.upload_ids))
        known = [upload_id for upload_id in upload_ids if is_id(upload_id)]
        records: dict[str, UploadRecord | None] = dict.fromkeys(upload_ids)
        if known:
            records |= dict(zip(known, await self._ledger.get_uploads(owner, known), strict=True))
        photos = await self._look.look(records)
        for upload_id in [upload_id for upload_id, photo in photos.items() if isinstance(photo, UploadLost)]:
            await self._ledger.note_lost_upload(owner, upload_id)
        return photos

    async def _accept(
        self,
        owner: str,
        key_id: str | None,
        request: BatchRequest,
        jobs: list[Job],
        errors: list[ItemError],
        idempotency: IdempotencyKey | None,
        max_owner_jobs: int | None,
    ) -> Submission:
        while jobs:
            batch = _new_batch(owner, key_id, request, jobs)
            errors.sort(key=lambda error: error.index)
            result = await self._ledger.submit(
                batch,
                retention=self._settings.retention,
                max_open_jobs=self._settings.limits.max_open_jobs,
                max_owner_jobs=max_owner_jobs,
                admission=self._settings.admission,
                idempotency=idempotency and self._keep(idempotency, batch.id, errors),
            )
            match result.kind:
                case "accepted":
                    return Submission(await self._read_accepted(batch), tuple(errors))
                case "replayed":
                    return await self._replay(result.text)
                case "missing_upload" | "unserved":
                    # What is left goes under a new id: an id stands for one content.
                    refused = {job.id: error for job in jobs if (error := self._refuse(request, job, result))}
                    errors += refused.values()
                    jobs = [job for job in jobs if job.id not in refused]
                case "owner_full":
                    raise no_room_for(len(jobs), max_owner_jobs)
                case _:
                    raise refusal_of(result, self._settings)
        raise nothing_accepted(sorted(errors, key=lambda error: error.index))

    def _refuse(self, request: BatchRequest, job: Job, result: SubmitResult) -> ItemError | None:
        """Tell what `result` has against one job of several, or None."""
        if result.kind == "unserved":
            is_meant = job.model == result.text
            error = not_served(job.model, self._settings)
            return item_error(request, job.index, error, ("model",)) if is_meant else None
        # It expired since we looked.
        upload_ids = [one.upload_id for one in job.inputs]
        return _expired(request, job, result.text) if result.text in upload_ids else None

    def _keep(self, idempotency: IdempotencyKey, batch_id: str, errors: Sequence[ItemError]) -> Idempotency:
        answer = {"batch_id": batch_id, "errors": [asdict(error) for error in errors]}
        return Idempotency(
            key=idempotency.key,
            body_sha256=idempotency.body_sha256,
            answer=json.dumps(answer),
            ttl_seconds=self._settings.limits.idempotency_ttl_seconds,
        )

    async def _read_accepted(self, batch: Batch) -> Batch:
        """The batch with the ledger's own times. It is accepted whether it can be read now or not, so it is told."""
        try:
            return await self._ledger.read_batch(batch.id) or batch
        except LedgerUnavailable:
            return batch

    async def _replay(self, answer: str) -> Submission:
        first = json.loads(answer)
        batch = await self._ledger.read_batch(first["batch_id"])
        if batch is None:
            raise NotFound(f"batch {first['batch_id']} of this idempotency key is gone; use a new key")
        return Submission(batch, tuple(ItemError(**error) for error in first["errors"]))


def _new_batch(owner: str, key_id: str | None, request: BatchRequest, jobs: Sequence[Job]) -> Batch:
    # The id is drawn before the call, so that a call repeated after a lost reply finds its own work.
    batch_id = secrets.token_hex(16)
    now_ms = int(time.time() * 1000)  # shown only where the ledger's own times cannot be read
    return Batch(
        id=batch_id,
        owner=owner,
        priority=Priority(request.priority),
        label=request.label,
        metadata=request.metadata,
        webhook=None if request.webhook is None else Webhook(request.webhook.url),
        key_id=key_id,
        counts={"total": len(jobs), "queued": len(jobs), "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0},
        created_at_ms=now_ms,
        jobs=tuple(replace(job, batch_id=batch_id, created_at_ms=now_ms, queued_at_ms=now_ms) for job in jobs),
    )


def _usable(found: JobInput | RequestError, place: Place) -> JobInput:
    if isinstance(found, RequestError):
        raise ItemRefused(found, place)
    return found


def _expired(request: BatchRequest, job: Job, upload_id: str) -> ItemError:
    number = [one.upload_id for one in job.inputs].index(upload_id)
    place = request.items[job.index].photo_places[number]
    return item_error(request, job.index, UploadNotFound("the upload has expired"), place)
