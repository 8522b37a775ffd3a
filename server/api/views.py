"""What clients see of batches and jobs. Names are part of the contract; times are RFC 3339 in UTC."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.errors import ItemError
from server.jobs import Batch, BatchStatus, Job, JobInput, JobOutput, JobStatus, Priority, Webhook

# Signs the URL of a job's output; returns it and when it stops working.
SignOutput = Callable[[Job, JobOutput], tuple[str, datetime]]


class View(BaseModel):
    """What all answers share."""

    model_config = ConfigDict(frozen=True)


class ItemErrorView(View):
    """Why one item of a request was refused; `index` is its place in the request, from 0."""

    index: int
    location: str = Field(description="JSON pointer into the body, as close to the mistake as can be told.")
    code: str
    detail: str


class JobErrorView(View):
    """Why a job failed, or what went wrong on its last try."""

    code: str
    detail: str


class Progress(View):
    """How far a job has come on the device."""

    step: int
    total_steps: int
    fraction: float = Field(description="From 0 to 1.")


class Timings(View):
    """Where a job's time went, in seconds; null for what it has not come to."""

    queue: float | None
    fetch: float | None
    run: float | None
    store: float | None


class InputView(View):
    """A photo as it was accepted; height and width in pixels as it is shown."""

    upload_id: str
    sha256: str | None = Field(description="As the client told it when it asked for the form.")
    width: int
    height: int


class OutputView(View):
    """A result. The URL downloads it without a key, and is the same for half its life."""

    url: str
    url_expires_at: datetime
    sha256: str
    content_type: str
    width: int
    height: int
    size_bytes: int


class JobView(View):
    """One photo to be staged. With the model's weights this record is enough to make the same picture again."""

    id: str
    batch_id: str
    index: int
    name: str | None
    metadata: dict[str, str]
    status: JobStatus
    model: str
    model_version: str
    weights_sha256: str | None = Field(
        description="Digest of the weights' manifest: of those that workers had at submission, then of those it ran on."
    )
    optimizations: dict[str, Any] = Field(
        description="How its model was run otherwise than its pipeline does by itself; empty before the run."
    )
    prompt: str
    negative_prompt: str | None
    params: dict[str, Any]
    loras: list[dict[str, Any]]
    attempts: int
    progress: Progress | None
    queue_position: int | None = Field(description="Among the owner's jobs of the same model and priority, from 1.")
    error: JobErrorView | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    timings: Timings
    input: InputView
    inputs: list[InputView] = Field(description="All photos of the job; `input` is the first.")
    output: OutputView | None
    worker: str | None


class Counts(View):
    """How many jobs of a batch stand where."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int


class DeliveryView(View):
    """One attempt to deliver the webhook."""

    round: int = Field(description="1 for the first end of the batch; each retry of its jobs begins another round.")
    attempt: int
    at: datetime
    outcome: Literal["delivered", "retrying", "gave_up"]
    http_status: int | None
    detail: str | None


class WebhookView(View):
    """Whom the server tells when the batch has finished; `deliveries` are the latest attempts, oldest first."""

    url: str
    deliveries: list[DeliveryView]


class BatchSummaryView(View):
    """Jobs that were submitted together, without the jobs."""

    id: str
    status: BatchStatus
    label: str | None
    metadata: dict[str, str]
    priority: Priority
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None = Field(
        description="When the records are forgotten; known once the batch has finished."
    )
    counts: Counts
    eta_seconds: float | None = Field(
        description="Until the last job has ended, by what runs took lately; null in lists, and where it is not known."
    )
    webhook: WebhookView | None


class BatchView(BatchSummaryView):
    """Up to 50 jobs that were submitted together."""

    jobs: list[JobView]


class BatchList(View):
    """A page of batches."""

    data: list[BatchSummaryView]
    next_cursor: str | None = Field(description="Goes on behind this page; null at the end.")


class JobList(View):
    """A page of jobs."""

    data: list[JobView]
    next_cursor: str | None = Field(description="Goes on behind this page; null at the end.")


class SubmissionView(View):
    """The answer to a submission: the batch, and the items that were refused."""

    batch: BatchView
    errors: list[ItemErrorView]


def view_batch(batch: Batch, sign_output: SignOutput) -> BatchView:
    """Show a batch with all its jobs."""
    return BatchView(**_summary(batch), jobs=[view_job(job, sign_output) for job in batch.jobs])


def view_batch_summary(batch: Batch) -> BatchSummaryView:
    """Show a batch without its jobs."""
    return BatchSummaryView(**_summary(batch))


def record_of_batch(batch: Batch) -> dict[str, Any]:
    """Write a batch down for outside of the API: JSON values, without URLs.

    Those of results would not work for long, and that of the webhook may hold what lets us in there.
    """
    hidden = {"webhook": {"url"}, "jobs": {"__all__": {"output": {"url", "url_expires_at"}}}}
    return view_batch(batch, _sign_nothing).model_dump(mode="json", exclude=hidden)


def _sign_nothing(_job: Job, _output: JobOutput) -> tuple[str, datetime]:
    return "", _time(0)


def _summary(batch: Batch) -> dict[str, Any]:
    return {
        "id": batch.id,
        "status": batch.status,
        "label": batch.label,
        "metadata": batch.metadata,
        "priority": batch.priority,
        "created_at": _time(batch.created_at_ms),
        "started_at": _time_or_none(batch.started_at_ms),
        "finished_at": _time_or_none(batch.finished_at_ms),
        "expires_at": _time_or_none(batch.expires_at_ms),
        "counts": Counts(**batch.counts),
        "eta_seconds": batch.eta_seconds,
        "webhook": None if batch.webhook is None else _view_webhook(batch.webhook),
    }


def _view_webhook(webhook: Webhook) -> WebhookView:
    deliveries = [
        DeliveryView(
            round=one.round,
            attempt=one.attempt,
            at=_time(one.at_ms),
            outcome=one.outcome,
            http_status=one.http_status,
            detail=one.detail,
        )
        for one in webhook.deliveries
    ]
    return WebhookView(url=webhook.url, deliveries=deliveries)


def view_job(job: Job, sign_output: SignOutput) -> JobView:
    """Show a job; the URL of its output is signed now."""
    inputs = [_view_input(one) for one in job.inputs]
    return JobView(
        id=job.id,
        batch_id=job.batch_id,
        index=job.index,
        name=job.name,
        metadata=job.metadata,
        status=job.status,
        model=job.model,
        model_version=job.model_version,
        weights_sha256=job.weights_sha256,
        optimizations=job.optimizations,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        params=job.params,
        loras=list(job.loras),
        attempts=job.attempts,
        progress=_view_progress(job),
        queue_position=job.queue_position,
        error=None if job.error is None else JobErrorView(code=job.error.code, detail=job.error.detail),
        created_at=_time(job.created_at_ms),
        started_at=_time_or_none(job.started_at_ms),
        finished_at=_time_or_none(job.finished_at_ms),
        timings=_view_timings(job),
        input=inputs[0],
        inputs=inputs,
        output=None if job.output is None else _view_output(job, job.output, sign_output),
        worker=job.worker,
    )


def view_item_error(error: ItemError) -> ItemErrorView:
    """Show why an item was refused."""
    return ItemErrorView(index=error.index, location=error.location, code=error.code, detail=error.detail)


def _view_progress(job: Job) -> Progress | None:
    # The last step is told with the result, not before it.
    step = job.total_steps if job.status == JobStatus.SUCCEEDED else job.step
    return show_progress(step, job.total_steps)


def show_progress(step: int | None, total_steps: int | None) -> Progress | None:
    """Show how far a job has come; None before its first step."""
    if step is None or not total_steps:
        return None
    return Progress(step=step, total_steps=total_steps, fraction=round(step / total_steps, 4))


def _view_timings(job: Job) -> Timings:
    return Timings(
        queue=job.queue_seconds,
        fetch=job.timings.get("fetch"),
        run=job.timings.get("run"),
        store=job.timings.get("store"),
    )


def _view_input(one: JobInput) -> InputView:
    return InputView(upload_id=one.upload_id, sha256=one.sha256, width=one.width, height=one.height)


def _view_output(job: Job, output: JobOutput, sign_output: SignOutput) -> OutputView:
    url, url_expires_at = sign_output(job, output)
    return OutputView(
        url=url,
        url_expires_at=url_expires_at,
        sha256=output.sha256,
        content_type=output.content_type,
        width=output.width,
        height=output.height,
        size_bytes=output.size_bytes,
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _time_or_none(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else _time(milliseconds)
