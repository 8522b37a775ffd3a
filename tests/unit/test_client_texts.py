"""What the client says: errors of the server in words, progress without a terminal, the table at the end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from server.client.errors import ApiError, TransferFailed, WrongBytes, read_item_problems
from server.client.progress import BatchProgress, make_table
from server.client.request import PhotoResult


def test_error_names_code_detail_and_each_location() -> None:
    """All that the server said of a mistake reaches the user."""
    problem = {
        "code": "invalid_request",
        "detail": "2 values are not allowed",
        "errors": [{"location": "/items/0/style", "code": "x", "detail": "needs modern or industrial"}],
    }
    assert str(ApiError(422, problem)).splitlines() == [
        "the server refused the call (422 invalid_request): 2 values are not allowed",
        "  /items/0/style: needs modern or industrial",
    ]


def test_mistake_is_told_once() -> None:
    """Where the detail names the place already it does not follow again."""
    problem = {"code": "c", "detail": "/label: too long", "errors": [{"location": "/label", "detail": "too long"}]}
    assert str(ApiError(422, problem)) == "the server refused the call (422 c): /label: too long"


def test_missing_key_says_where_it_is_set() -> None:
    """Who has no key learns how one is made and given."""
    text = str(ApiError(401, {"code": "unauthorized", "detail": "no key"}))
    assert "RESTAGE_API_KEY" in text
    assert "restage keys add" in text


def test_failure_of_the_server_names_the_request() -> None:
    """A 500 gives what an operator needs to find it in the log."""
    assert "request id abc" in str(ApiError(500, {"code": "internal_error", "request_id": "abc"}))


def test_answer_without_a_problem_is_still_a_message() -> None:
    """A body that is no problem document does not break the client."""
    assert str(ApiError(418, {})) == "the server refused the call (418 unknown): no reason was given"


def test_refused_items_are_told_from_bad_fields() -> None:
    """Only errors with an index are about items."""
    body = {"errors": [{"index": 2, "code": "c", "detail": "d"}, {"location": "/defaults", "detail": "e"}]}
    assert [(one.index, one.code, one.detail) for one in read_item_problems(body)] == [(2, "c", "d")]


@pytest.mark.parametrize(
    ("http_status", "again"),
    [(None, True), (500, True), (503, True), (429, True), (408, True), (403, False), (400, False)],
)
def test_only_what_may_pass_is_tried_again(http_status: int | None, again: bool) -> None:
    """A lost connection and a failing store may pass; a refusal does not."""
    assert TransferFailed("x", http_status).is_worth_another_try is again
    assert not WrongBytes("x", http_status).is_worth_another_try


def make_batch(succeeded: int, running: int, failed: int = 0) -> dict[str, object]:
    counts = {"total": 4, "succeeded": succeeded, "running": running, "failed": failed, "cancelled": 0}
    jobs = [{"id": "j", "name": "hall.jpg", "status": "running", "progress": {"step": 2, "total_steps": 8}}] * running
    return {"counts": counts | {"queued": 4 - succeeded - running - failed}, "jobs": jobs, "eta_seconds": 170.0}


def test_progress_without_a_terminal_prints_each_change_once() -> None:
    """A log gets a line for each change and none for the same state again."""
    output = io.StringIO()
    with BatchProgress(Console(file=output)) as progress:
        progress.start_uploads(2_500_000)
        progress.count_uploaded(100)
        progress.show_batch(make_batch(0, 1))
        progress.show_batch(make_batch(0, 1))
        progress.note("waiting for the server")
        progress.note("waiting for the server")
        progress.show_batch(make_batch(3, 0, failed=1))
    assert output.getvalue().splitlines() == [
        "sending 2.5 MB",
        "staged 0 of 4, 1 running, 3 queued",
        "waiting for the server",
        "staged 3 of 4, 1 failed",
    ]


def test_progress_on_a_terminal_shows_bars_and_the_running_step() -> None:
    """Somebody who waits sees how many are done and which step a photo is at."""
    output = io.StringIO()
    with BatchProgress(Console(file=output, force_terminal=True, width=120)) as progress:
        progress.start_uploads(1000)
        progress.count_uploaded(1000)
        progress.show_batch(make_batch(1, 1))
        progress.note("the server is away")
    assert "1/4" in output.getvalue()
    assert "hall.jpg: step 2 of 8" in output.getvalue()
    assert "the server is away" in output.getvalue()
    assert "about 3 min left" in output.getvalue()


def test_bar_reaches_its_end_without_what_need_not_be_sent() -> None:
    """Photos that the server has already are no part of what there is to send."""
    output = io.StringIO()
    with BatchProgress(Console(file=output, force_terminal=True, width=120)) as progress:
        progress.start_uploads(3000)
        progress.count_uploaded(1000)
        progress.skip_upload(2000)
    assert "1.0/1.0 kB" in output.getvalue()


def test_table_has_an_error_column_only_for_errors() -> None:
    """A row says what became of a photo; names are shown as they are, even with brackets in them."""
    done = PhotoResult(0, Path("[red]a.jpg"), "succeeded", "tiny", 1.25, Path("out/001-a.webp"))
    refused = PhotoResult(1, Path("b.jpg"), "refused", error="unsupported_format: text")
    console = Console(file=io.StringIO(), width=120)
    console.print(make_table([done]))
    console.print(make_table([done, refused]))
    alone, both = console.file.getvalue().split("photo")[1:]  # pyright: ignore[reportAttributeAccessIssue]
    assert "error" not in alone
    assert "[red]a.jpg" in alone
    assert "1.2" in alone
    assert "unsupported_format: text" in both
    assert done.is_done
    assert not refused.is_done
