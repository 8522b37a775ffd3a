"""Stories of lists: what stands on a page, and what happens between one page and the next."""

from typing import Any

import pytest

from server.jobs import BatchStatus, JobStatus
from server.ledger import reading
from server.ledger.reading import Page


def batches(
    ledger: Any,
    cursor: str | None = None,
    *,
    owner: str = "ana",
    status: BatchStatus | None = None,
    label: str | None = None,
    limit: int = 2,
) -> tuple[list[str], str | None]:
    """Read a page of batches: their ids, and where the next page begins."""
    return ids_of(ledger.run(ledger.api.list_batches(owner, status=status, label=label, limit=limit, cursor=cursor)))


def jobs(
    ledger: Any,
    cursor: str | None = None,
    *,
    owner: str | None = "ana",
    status: JobStatus | None = None,
    model: str | None = None,
    limit: int = 2,
) -> tuple[list[str], str | None]:
    """Read a page of jobs: their ids, and where the next page begins."""
    return ids_of(ledger.run(ledger.api.list_jobs(owner, status=status, model=model, limit=limit, cursor=cursor)))


def ids_of(page: Page[Any]) -> tuple[list[str], str | None]:
    """Take a page apart."""
    return [one.id for one in page.items], page.next_cursor


def accept_some(ledger: Any, count: int, **options: Any) -> None:
    """Have batches `b0`, `b1`… accepted, each with one job of its own."""
    for number in range(count):
        ledger.accept(f"b{number}", ["qwen"], **options)


def test_batches_are_listed_newest_first(ledger: Any) -> None:
    """Page by page, each once, without jobs, and only one's own."""
    accept_some(ledger, 5)
    ledger.accept("foreign", ["qwen"], owner="bo")
    first, cursor = batches(ledger)
    second, cursor = batches(ledger, cursor)
    third, end = batches(ledger, cursor)
    assert (first, second, third, end) == (["b4", "b3"], ["b2", "b1"], ["b0"], None)
    page = ledger.run(ledger.api.list_batches("ana", status=None, label=None, limit=1, cursor=None))
    assert page.items[0].counts["queued"] == 1
    assert page.items[0].jobs == ()
    assert batches(ledger, owner="bo") == (["foreign"], None)
    assert batches(ledger, owner="nobody") == ([], None)


def test_a_page_that_ends_with_the_list_is_the_last(ledger: Any) -> None:
    """Nobody is sent to an empty page."""
    accept_some(ledger, 4)
    assert batches(ledger, limit=4) == (["b3", "b2", "b1", "b0"], None)
    _, cursor = batches(ledger)
    assert batches(ledger, cursor) == (["b1", "b0"], None)
    ids, cursor = jobs(ledger, limit=4)
    assert (len(ids), cursor) == (4, None)


def test_new_batches_do_not_move_the_pages(ledger: Any) -> None:
    """What comes while somebody reads is for the next reading; what was there is seen once."""
    accept_some(ledger, 4)
    _, batch_cursor = batches(ledger)
    _, job_cursor = jobs(ledger)
    ledger.accept("new", ["qwen", "qwen"])
    assert batches(ledger, batch_cursor) == (["b1", "b0"], None)
    assert jobs(ledger, job_cursor) == (["b1-0", "b0-0"], None)
    assert batches(ledger)[0] == ["new", "b3"]
    assert jobs(ledger)[0] == ["new-0", "new-1"]


def test_deleting_what_was_shown_last_does_not_move_the_pages(ledger: Any) -> None:
    """A cursor is a place, which stays when the batch that stood there has gone."""
    accept_some(ledger, 5)
    for _ in range(5):
        ledger.commit(ledger.claim(["qwen"]))
    _, batch_cursor = batches(ledger)
    _, job_cursor = jobs(ledger)
    for batch_id in ("b3", "b2"):
        assert ledger.run(ledger.api.delete_batch("ana", batch_id)) == "deleted"
    assert batches(ledger, batch_cursor) == (["b1", "b0"], None)
    assert jobs(ledger, job_cursor) == (["b1-0", "b0-0"], None)


def test_a_status_is_what_it_is_when_the_page_is_read(ledger: Any) -> None:
    """Batches that move on between two pages stand on the list of their new status."""
    accept_some(ledger, 4)
    ids, cursor = batches(ledger, status=BatchStatus.QUEUED)
    assert ids == ["b3", "b2"]
    job = ledger.claim(["qwen"])
    assert job.id == "b0-0"
    assert batches(ledger, cursor, status=BatchStatus.QUEUED) == (["b1"], None)
    assert batches(ledger, status=BatchStatus.RUNNING) == (["b0"], None)
    ledger.fail(job)
    assert batches(ledger, status=BatchStatus.RUNNING) == ([], None)
    assert batches(ledger, status=BatchStatus.FINISHED) == (["b0"], None)
    ledger.run(ledger.api.reopen("ana", ["b0-0"], max_open_jobs=99))
    assert batches(ledger, status=BatchStatus.FINISHED) == ([], None)
    assert batches(ledger, status=BatchStatus.QUEUED, limit=9)[0] == ["b3", "b2", "b1", "b0"]


def test_batches_are_found_by_their_label(ledger: Any) -> None:
    """Exactly this label; behind more than fifty others too, and together with a status."""
    ledger.finish("oldest", ["qwen"], label="12 Oak St")
    accept_some(ledger, 110, label="12 Oak Street")
    ledger.accept("newest", ["qwen"], label="12 Oak St")
    assert batches(ledger, label="12 Oak St") == (["newest", "oldest"], None)
    assert batches(ledger, label="12 Oak St", limit=1)[0] == ["newest"]
    assert batches(ledger, label="12 Oak St", status=BatchStatus.FINISHED) == (["oldest"], None)
    assert batches(ledger, label="12 oak st") == ([], None)
    ids, cursor = batches(ledger, limit=100)
    assert (len(ids), batches(ledger, cursor, limit=100)[0]) == (
        100,
        [*(f"b{number}" for number in range(10, -1, -1)), "oldest"],
    )


def test_a_rare_filter_makes_short_pages(ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page looks at a bounded number of batches or jobs; where there are more, it has a cursor, even an empty one."""
    monkeypatch.setattr(reading, "MOST_LOOKS", 3)
    ledger.accept("b0", ["flux"], label="x")
    for number in range(1, 7):
        ledger.accept(f"b{number}", ["qwen"])
    batch_cursor = job_cursor = None
    for _ in range(2):
        ids, batch_cursor = batches(ledger, batch_cursor, label="x")
        assert ids == []
        ids, job_cursor = jobs(ledger, job_cursor, model="flux")
        assert ids == []
    assert batches(ledger, batch_cursor, label="x") == (["b0"], None)
    assert jobs(ledger, job_cursor, model="flux") == (["b0-0"], None)


def test_jobs_are_listed_across_batches(ledger: Any) -> None:
    """The newest batch first, its jobs in their order; a page may end inside of a batch."""
    ledger.accept("b0", ["qwen", "flux", "qwen"])
    ledger.accept("b1", ["qwen", "qwen"])
    ledger.accept("foreign", ["qwen"], owner="bo")
    first, cursor = jobs(ledger, limit=3)
    assert first == ["b1-0", "b1-1", "b0-0"]
    assert jobs(ledger, cursor, limit=3) == (["b0-1", "b0-2"], None)
    everybody, cursor = jobs(ledger, owner=None, limit=2)
    assert everybody == ["foreign-0", "b1-0"]
    assert jobs(ledger, cursor, owner=None, limit=9)[0] == ["b1-1", "b0-0", "b0-1", "b0-2"]
    page = ledger.run(ledger.api.list_jobs("ana", status=None, model=None, limit=1, cursor=None))
    assert page.items == [ledger.job("b1-0")]
    assert page.items[0].queue_position == 3


def test_jobs_are_found_by_status_and_model(ledger: Any) -> None:
    """Failed jobs are the dead letters: they are found among many others, and leave the list when they are retried."""
    ledger.accept("b0", ["flux", "qwen", "qwen"])
    ledger.accept("b1", ["qwen"])
    for _ in range(2):
        ledger.fail(ledger.claim(["qwen"]))
    ledger.fail(ledger.claim(["flux"]))
    ledger.claim(["qwen"])
    assert jobs(ledger, status=JobStatus.FAILED, limit=9) == (["b0-0", "b0-1", "b0-2"], None)
    assert jobs(ledger, status=JobStatus.FAILED, model="qwen", limit=9) == (["b0-1", "b0-2"], None)
    assert jobs(ledger, model="flux") == (["b0-0"], None)
    assert jobs(ledger, status=JobStatus.RUNNING) == (["b1-0"], None)
    ledger.run(ledger.api.reopen("ana", ["b0-1"], max_open_jobs=99))
    assert jobs(ledger, status=JobStatus.FAILED, limit=9) == (["b0-0", "b0-2"], None)
    assert jobs(ledger, status=JobStatus.QUEUED) == (["b0-1"], None)


def test_a_batch_that_goes_is_passed_over(ledger: Any) -> None:
    """When the batch in whose middle a page ended has gone, the next page begins with the batch behind it."""
    ledger.finish("b0", ["qwen"])
    ledger.finish("b1", ["qwen", "qwen"])
    ids, cursor = jobs(ledger, limit=1)
    assert ids == ["b1-0"]
    ledger.run(ledger.api.delete_batch("ana", "b1"))
    assert jobs(ledger, cursor, limit=1) == (["b0-0"], None)
    # And when nothing is behind it, the list has ended.
    ledger.run(ledger.api.delete_batch("ana", "b0"))
    assert jobs(ledger, cursor, limit=1) == ([], None)


def test_a_clock_that_was_set_back_keeps_the_order(ledger: Any) -> None:
    """A batch accepted later stands before the others, whatever the clock says."""
    ledger.accept("b4", ["qwen"])
    for scope in ("ana", "*"):
        ledger.client.zincrby(f"{ledger.prefix}:shelf:{scope}:all", 3_600_000_000, "b4")
    ledger.accept("b3", ["qwen"])
    ledger.accept("b2", ["qwen"], owner="bo")
    ledger.accept("b1", ["qwen"])
    ids, cursor = batches(ledger)
    assert ids == ["b1", "b3"]
    assert batches(ledger, cursor) == (["b4"], None)
    ids, cursor = jobs(ledger, owner=None, limit=3)
    assert ids == ["b1-0", "b2-0", "b3-0"]
    assert jobs(ledger, cursor, owner=None) == (["b4-0"], None)
