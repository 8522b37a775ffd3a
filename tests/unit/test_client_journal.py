"""What a run leaves behind for the next one, and when the next one does not trust it."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.client.errors import AlreadyRunning
from server.client.journal import Journal, open_journal
from server.client.journal_file import state_folder
from server.client.photos import read_photo
from server.client.record import ArrivedPhoto, Record
from server.client.request import BatchRequest

URL = "http://127.0.0.1:8000"
DAY = 86_400.0

Open = Callable[..., AbstractContextManager[Journal]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of the journals, which nobody has made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "restage"


@pytest.fixture
def request_of_two(tmp_path: Path) -> BatchRequest:
    photos = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for photo in photos:
        photo.write_bytes(b"\xff\xd8\xff" + photo.name.encode())
    return BatchRequest(photos, {"style": "modern"}, label="12 Oak St")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def reopen(request_of_two: BatchRequest, notes: list[str]) -> Open:
    """Give a function that opens the journal of the request."""

    def reopen(request: BatchRequest = request_of_two, **options: Any) -> AbstractContextManager[Journal]:
        return open_journal(request, options.pop("url", URL), note=notes.append, **options)

    return reopen


def save(journal: Journal, **changes: Any) -> None:
    """Change the record and write it, as one step of a run."""
    for name, value in changes.items():
        setattr(journal.record, name, value)
    asyncio.run(journal.save())


def arrived(request: BatchRequest, *indexes: int) -> dict[int, ArrivedPhoto]:
    return {
        index: ArrivedPhoto(upload_id=f"u{index}", sha256=read_photo(request.photos[index]).sha256) for index in indexes
    }


@pytest.fixture
def left(reopen: Open, request_of_two: BatchRequest, folder: Path) -> Path:
    """Leave the journal of a batch that was accepted."""
    with reopen() as journal:
        save(journal, arrived=arrived(request_of_two, 0, 1), submitted=[0, 1], batch_id="b" * 32)
    (file,) = folder.glob("*.json")
    return file


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_was_saved_is_found_by_the_next_run(reopen: Open, left: Path, notes: list[str]) -> None:
    """Key, uploads and batch are those of the earlier run, and nothing is said."""
    with reopen() as journal:
        assert journal.record.batch_id == "b" * 32
        assert journal.record.idempotency_key == json.loads(left.read_text())["idempotency_key"]
        assert journal.record.arrived[1].upload_id == "u1"
    assert notes == []


def test_only_its_owner_may_read_it(left: Path, folder: Path) -> None:
    """Labels and paths are nobody else's business; no lock and no half of a file stays behind."""
    assert left.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == [left]


def test_nothing_is_written_before_the_first_step(reopen: Open, folder: Path) -> None:
    """A run that ends before the server learns of it leaves nothing."""
    with reopen():
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {"label": "14 Oak St"},
        {"label": None},
        {"defaults": {"style": "industrial"}},
        {"overrides": {1: {"style": "industrial"}}},
        {"url": "http://127.0.0.1:8001"},
    ],
)
def test_another_request_has_another_journal(
    reopen: Open, left: Path, request_of_two: BatchRequest, other: dict[str, Any]
) -> None:
    """Whoever changes anything that matters gets a batch of his own."""
    url = other.pop("url", URL)
    with reopen(replace(request_of_two, **other), url=url) as journal:
        assert journal.record.batch_id is None


def test_order_of_photos_matters(reopen: Open, left: Path, request_of_two: BatchRequest) -> None:
    """The results carry the number of the photo."""
    with reopen(replace(request_of_two, photos=request_of_two.photos[::-1])) as journal:
        assert journal.record.batch_id is None


def test_same_request_from_another_folder_is_the_same(
    reopen: Open, left: Path, request_of_two: BatchRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos are known by where they lie, not by how they were typed; a slash after the URL says nothing."""
    monkeypatch.chdir(request_of_two.photos[0].parent)
    with reopen(replace(request_of_two, photos=[Path("a.jpg"), Path("b.jpg")]), url=f"{URL}/") as journal:
        assert journal.record.batch_id == "b" * 32


def test_photo_that_was_changed_since_is_another(
    reopen: Open, left: Path, request_of_two: BatchRequest, notes: list[str]
) -> None:
    """Same name and same size, other bytes: its old result would be the wrong one."""
    request_of_two.photos[1].write_bytes(b"\xff\xd8\xffB.jpg")
    with reopen() as journal:
        assert journal.record.batch_id is None
    assert len(notes) == 1
    assert "b.jpg was changed since" in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "[" * 900_000,
        '{"version": 1}',
        Record().to_bytes().decode() * 2,
        Record().to_bytes().decode()[:-1],
        "\0" * 2_000_000,
    ],
)
def test_damaged_journal_is_ignored(reopen: Open, left: Path, notes: list[str], text: str) -> None:
    """Whatever is in the file, the run begins anew and says why."""
    left.write_text(text)
    with reopen() as journal:
        assert journal.record.batch_id is None
        save(journal)
    assert len(notes) == 1
    assert "is damaged or of another version" in notes[0]
    assert json.loads(left.read_text())["version"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"secret": "x"},
        {"batch_id": "../../v1/keys"},
        {"batch_id": "b\n"},
        {"batch_id": 7},
        {"batch_id": ""},
        {"idempotency_key": None},
        {"created_at": "today"},
        {"created_at": None},
        {"created_at": 10**400},
        {"arrived": []},
        {"arrived": {"x": {"upload_id": "u", "sha256": "0" * 64}}},
        {"arrived": {"0": {"upload_id": "u", "sha256": "0" * 63}}},
        {"arrived": {"0": {"upload_id": "u"}}},
        {"arrived": {"0": None}},
        {"submitted": ["0"]},
        {"submitted": 0},
        {"submitted": [0, 1, 2]},
        {"refused": {"0": None}},
        {"refused": "why"},
    ],
)
def test_journal_with_a_wrong_value_is_ignored(
    reopen: Open, left: Path, notes: list[str], changes: dict[str, Any]
) -> None:
    """No value of another kind than was written gets as far as a call, least of all into a URL."""
    change(left, **changes)
    with reopen() as journal:
        assert journal.record.submitted is None
    assert notes == ["the journal of an earlier run is damaged or of another version, and is ignored"]


@pytest.mark.parametrize("changes", [{"request": "0" * 64}, {"refused": {"2": "why"}}, {"refused": {"-1": "why"}}])
def test_journal_that_contradicts_the_request_is_ignored(
    reopen: Open, left: Path, notes: list[str], changes: dict[str, Any]
) -> None:
    """A copied file, or photos that are not there, are no state to go on from."""
    change(left, **changes)
    with reopen() as journal:
        assert journal.record.batch_id is None
    assert notes == ["an earlier run of this command is not gone on with: its journal is damaged"]


@pytest.mark.parametrize(
    ("batch_id", "age_seconds", "is_used"),
    [
        (None, DAY - 60, True),
        (None, DAY + 60, False),
        ("b", DAY + 60, True),
        ("b", 7 * DAY + 60, False),
        ("b", -30, True),
        ("b", -3600, False),
    ],
)
def test_age_decides_whether_it_is_used(
    reopen: Open, left: Path, notes: list[str], batch_id: str | None, age_seconds: float, is_used: bool
) -> None:
    """A key is good for a day, an accepted batch as long as its results; a clock may be set back a little."""
    change(left, batch_id=batch_id, created_at=time.time() - age_seconds)
    with reopen() as journal:
        assert (journal.record.submitted == [0, 1]) is is_used
    assert len(notes) == (0 if is_used else 1)


def test_anew_ignores_it_and_replaces_it(reopen: Open, left: Path) -> None:
    """Who asks for a new batch gets a new key, and the next run goes on with that one."""
    with reopen(anew=True) as journal:
        assert journal.record.batch_id is None
        save(journal)
        key = journal.record.idempotency_key
    with reopen() as journal:
        assert journal.record.idempotency_key == key


def test_same_command_in_another_process_is_told_who_runs(reopen: Open, left: Path) -> None:
    """The second is refused and the first goes on undisturbed; after its end the next has the journal."""
    with reopen() as first:
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"), reopen():
            pass
        save(first, batch_id="c")
    with reopen() as journal:
        assert journal.record.batch_id == "c"


def test_other_requests_run_at_the_same_time(reopen: Open, request_of_two: BatchRequest) -> None:
    """Only the same request excludes itself."""
    with reopen(), reopen(replace(request_of_two, label=None)):
        pass


def test_removed_journal_is_gone(reopen: Open, left: Path, folder: Path) -> None:
    """After a run that came to its end the same command begins anew."""
    with reopen() as journal:
        journal.remove()
    assert list(folder.iterdir()) == []


def test_beginning_anew_keeps_what_is_still_there(reopen: Open, left: Path, request_of_two: BatchRequest) -> None:
    """After uploads have expired there is a new key, and the rest need not be sent again."""
    with reopen() as journal:
        key = journal.record.idempotency_key
        asyncio.run(journal.start_anew(arrived=arrived(request_of_two, 1), superseded_batch_id="b"))
    with reopen() as journal:
        assert journal.record.idempotency_key != key
        assert list(journal.record.arrived) == [1]
        assert (journal.record.submitted, journal.record.batch_id) == (None, None)
        assert journal.record.superseded_batch_id == "b"


def test_folder_that_cannot_be_used_costs_only_the_journal(
    reopen: Open, folder: Path, tmp_path: Path, notes: list[str]
) -> None:
    """Photos are staged all the same, and the user knows what is missing."""
    (tmp_path / "state").write_text("in the way")
    with reopen() as journal:
        save(journal, batch_id="b")
    assert len(notes) == 1
    assert str(folder) in notes[0]
    assert "cannot be gone on with" in notes[0]


def test_write_that_fails_costs_only_the_journal(reopen: Open, folder: Path, notes: list[str]) -> None:
    """A disk that fills up in the middle of a run does not end it."""
    with reopen() as journal:
        folder.rename(folder.with_name("gone"))
        save(journal, batch_id="b")
        save(journal, batch_id="c")
    assert len(notes) == 1
    assert "cannot be gone on with" in notes[0]


def test_journals_that_nobody_went_on_with_are_removed(reopen: Open, left: Path, folder: Path) -> None:
    """What crashed runs left behind goes after eight days; what is younger stays."""
    old = folder / f"{'0' * 64}.lock"
    old.touch()
    long_ago = time.time() - 9 * DAY
    os.utime(old, times=(long_ago, long_ago))
    with reopen():
        assert not old.exists()
        assert left.exists()


@pytest.mark.parametrize("given", ["", "relative/state"])
def test_folder_lies_in_the_users_home(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Without the variable, or with one that means nothing, it is where XDG says."""
    monkeypatch.setenv("XDG_STATE_HOME", given)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert state_folder() == Path("/home/somebody/.local/state/restage")
