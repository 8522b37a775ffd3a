"""Records survive the way through Redis hashes, where every value is a string."""

from dataclasses import asdict, replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.jobs import (
    Batch,
    BatchStatus,
    Delivery,
    Job,
    JobError,
    JobInput,
    JobOutput,
    JobStatus,
    OutputSpec,
    Priority,
    Webhook,
)
from server.ledger.api_side import ApiLedger
from server.ledger.reconciling import LedgerReconciler
from server.ledger.records import (
    UploadRecord,
    batch_fields,
    dump,
    job_fields,
    parse_batch,
    parse_job,
    parse_upload,
    upload_fields,
)
from server.ledger.scripts import as_map, script_keys, script_text
from server.ledger.worker_side import _SCRIPTS as WORKER_SCRIPTS
from server.settings import RetentionSettings

texts = st.text(st.characters(exclude_categories=("Cs",)))  # all that UTF-8 can say
sizes = st.integers(0, 2**53)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=8,
)
inputs = st.builds(
    JobInput,
    upload_id=texts,
    key=texts,
    etag=texts,
    sha256=st.none() | texts,
    content_type=texts,
    size_bytes=sizes,
    height=sizes,
    width=sizes,
)
new_jobs = st.builds(
    Job,
    id=texts,
    batch_id=texts,
    index=st.integers(0, 49),
    owner=texts,
    model=texts,
    model_version=texts,
    prompt=texts,
    inputs=st.lists(inputs, max_size=3).map(tuple),
    name=st.none() | texts,
    metadata=st.dictionaries(texts, texts, max_size=3),
    negative_prompt=st.none() | texts,
    params=st.dictionaries(texts, json_values, max_size=4),
    loras=st.lists(st.fixed_dictionaries({"id": texts, "scale": st.floats(0, 2)}), max_size=2).map(tuple),
    output_spec=st.builds(OutputSpec, quality=st.integers(1, 100), metadata=st.booleans()),
    priority=st.sampled_from(Priority),
)

# What SUBMIT adds to the fields of a new job and of a new batch.
NEW_JOB = {
    "status": "queued",
    "created_at": "1700000000000",
    "queued_at": "1700000000000",
    "fence": "0",
    "attempts": "0",
    "suspect": "0",
}
NEW_BATCH = {
    "status": "queued",
    "round": "1",
    "created_at": "1700000000000",
    "total": "2",
    "queued": "2",
    "running": "0",
    "succeeded": "0",
    "failed": "0",
    "cancelled": "0",
}


def stored(job: Job, **fields: str) -> dict[str, str]:
    """Write a new job as SUBMIT stores it, and change some fields."""
    return job_fields(job) | NEW_JOB | {"id": job.id, "batch_id": job.batch_id, "owner": job.owner} | fields


def plain_job() -> Job:
    """Describe a job with nothing optional."""
    return Job(
        id="j1", batch_id="b1", index=0, owner="ana", model="qwen", model_version="1", prompt="a sofa", inputs=()
    )


@given(new_jobs)
def test_a_new_job_comes_back_as_it_was(job: Job) -> None:
    """Every field of a submitted job is read as it was written; the ledger adds the times."""
    fields = stored(job)
    assert all(isinstance(value, str) for value in fields.values())
    read = parse_job(fields)
    assert (read.created_at_ms, read.queued_at_ms) == (1_700_000_000_000, 1_700_000_000_000)
    assert stored(read) == fields
    for name in ("prompt", "negative_prompt", "name", "metadata", "inputs", "params", "loras", "output_spec"):
        assert getattr(read, name) == getattr(job, name)
    assert (read.priority, read.index, read.status) == (job.priority, job.index, JobStatus.QUEUED)


def test_a_finished_job_is_read_with_its_result() -> None:
    """Output, timings, progress and times become typed values."""
    output = JobOutput(key="k", sha256="s", content_type="image/webp", height=768, width=1024, size_bytes=9)
    job = parse_job(
        stored(
            plain_job(),
            status="succeeded",
            attempts="2",
            fence="2",
            suspect="1",
            worker="w1",
            step="8",
            total_steps="8",
            started_at="1700000001000",
            finished_at="1700000003000",
            output=dump(vars(output)),
            timings='{"run":1.5}',
        ),
    )
    assert (job.output, job.timings, job.step, job.total_steps) == (output, {"run": 1.5}, 8, 8)
    assert (job.attempts, job.fence, job.suspect, job.worker) == (2, 2, True, "w1")
    assert (job.started_at_ms, job.finished_at_ms, job.queue_seconds) == (1_700_000_001_000, 1_700_000_003_000, 1.0)
    assert job.error is None


def test_a_waiting_job_is_read_with_its_place_and_last_error() -> None:
    """The queue position comes from beside the hash; an error without a text is still an error."""
    job = parse_job(stored(plain_job(), error_code="run_failed"), 3)
    assert (job.queue_position, job.error) == (3, JobError("run_failed", ""))
    # RENEW stores an empty text while the number of steps is not known.
    assert parse_job(stored(plain_job(), step="1", total_steps="")).total_steps is None


webhooks = st.builds(Webhook, url=texts)


@given(
    label=st.none() | texts,
    metadata=st.dictionaries(texts, texts, max_size=3),
    priority=st.sampled_from(Priority),
    webhook=st.none() | webhooks,
    key_id=st.none() | texts,
)
def test_a_new_batch_comes_back_as_it_was(
    label: str | None, metadata: dict[str, str], priority: Priority, webhook: Webhook | None, key_id: str | None
) -> None:
    """Label, metadata, priority, webhook and key are read as they were written, and the counts as numbers."""
    batch = Batch(
        id="b1", owner="ana", label=label, metadata=metadata, priority=priority, webhook=webhook, key_id=key_id
    )
    fields = batch_fields(batch, RetentionSettings()) | NEW_BATCH | {"id": "b1", "owner": "ana"}
    assert all(isinstance(value, str) for value in fields.values())
    read = parse_batch(fields, (plain_job(),))
    assert (read.label, read.metadata, read.priority) == (label, metadata, priority)
    assert (read.webhook, read.key_id) == (webhook, key_id)
    assert read.counts == {"total": 2, "queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert (read.status, read.round, read.jobs) == (BatchStatus.QUEUED, 1, (plain_job(),))
    assert (read.started_at_ms, read.finished_at_ms, read.expires_at_ms) == (None, None, None)
    assert read.eta_seconds is None


def test_a_batch_carries_its_own_retention() -> None:
    """The times that hold when it is accepted are stored with it, in milliseconds."""
    retention = RetentionSettings(inputs_seconds=1, outputs_seconds=20, records_seconds=300, orphans_seconds=4000)
    fields = batch_fields(Batch(id="b1", owner="ana"), retention)
    times = {name: value for name, value in fields.items() if name.endswith("_ms")}
    assert times == {"inputs_ms": "1000", "outputs_ms": "20000", "records_ms": "300000", "orphans_ms": "4000000"}


@given(
    st.lists(
        st.builds(
            Delivery,
            round=st.integers(1, 99),
            attempt=st.integers(1, 99),
            at_ms=sizes,
            outcome=st.sampled_from(("delivered", "retrying", "gave_up")),
            http_status=st.none() | st.integers(100, 599),
            detail=st.none() | texts,
        ),
        max_size=3,
    )
)
def test_deliveries_are_read_with_their_webhook(deliveries: list[Delivery]) -> None:
    """In the order in which they were logged; a batch that tells nobody has none."""
    fields = batch_fields(Batch(id="b1", owner="ana", webhook=Webhook("https://a.example")), RetentionSettings())
    stored_texts = [dump(asdict(one)) for one in deliveries]
    read = parse_batch(fields | NEW_BATCH | {"id": "b1", "owner": "ana"}, deliveries=stored_texts)
    assert read.webhook == Webhook("https://a.example", tuple(deliveries))
    del fields["webhook_url"]
    assert parse_batch(fields | NEW_BATCH | {"id": "b1", "owner": "ana"}, deliveries=stored_texts).webhook is None


@given(
    st.builds(
        UploadRecord,
        id=texts,
        owner=texts,
        key=texts,
        filename=texts,
        content_type=texts,
        size_bytes=sizes,
        sha256=st.none() | texts,
    ),
    st.none() | texts,
)
def test_an_upload_comes_back_as_it_was(record: UploadRecord, etag: str | None) -> None:
    """A form that was handed out is read as it was written; its ETag is there once a batch has named it."""
    added = {"id": record.id, "owner": record.owner, "references": "0", "form_until": "1", "keep_until": "1"}
    fields = upload_fields(record) | added | ({} if etag is None else {"etag": etag})
    assert all(isinstance(value, str) for value in fields.values())
    assert parse_upload(fields) == replace(record, etag=etag)


def test_references_are_counted() -> None:
    """How many jobs of batches need an upload."""
    record = UploadRecord("u1", "ana", "k1", "a.jpg", "image/jpeg", 9)
    fields = upload_fields(record) | {"id": "u1", "owner": "ana", "references": "3"}
    assert parse_upload(fields).references == 3


API_SIDES = {*ApiLedger.__mro__, LedgerReconciler}
SCRIPTS = {name for side in API_SIDES for name in getattr(side, "SCRIPTS", ())} | set(WORKER_SCRIPTS)


def test_every_script_is_there_and_is_used() -> None:
    """Each file in the folder of scripts is a script of one side of the ledger, or a part of several scripts."""
    found = {path.name.removesuffix(".lua") for path in (files("server.ledger") / "lua").iterdir()}
    assert found == SCRIPTS | {"prelude", "reading", "expiry"}


# What must go on while memory is full: all but these two, which bring new work.
REFUSED_WHEN_FULL = {"submit", "announce_uploads"}
READING = {"read_batch", "read_jobs", "list_batches", "list_jobs", "read_events", "backlog"}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_is_its_prelude_and_itself_behind_its_flags(name: str) -> None:
    """The flags stand in the very first line, or Redis does not see them; what drains may run while memory is full."""
    flags, _, text = script_text(name).partition("\n")
    expected = dict.fromkeys(REFUSED_WHEN_FULL, "") | dict.fromkeys(READING, "flags=no-writes")
    assert flags.removeprefix("#!lua ") == expected.get(name, "flags=allow-oom")
    assert text.index("local function job_key") < text.index(f"-- {name.upper()}: ")
    assert ("local function batch_reply" in text) == (name in READING - {"backlog", "read_events"} | {"take_webhooks"})
    assert ("local function forget" in text) == (name in {"expire", "delete_batch", "finish_marked"})


def test_replies_and_keys_have_their_shape() -> None:
    """A flat reply becomes a dict, and every script gets the prefix and Dramatiq's namespace."""
    reply: list[Any] = ["id", "j1", "status", "queued"]
    assert as_map(reply) == {"id": "j1", "status": "queued"}
    assert script_keys("restage") == ["restage", "dramatiq"]
