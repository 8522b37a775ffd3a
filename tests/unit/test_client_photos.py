"""What the client says of files before anything is sent, and where it puts results."""

import hashlib
from pathlib import Path

import pytest

from server.client.errors import BadPhotos
from server.client.photos import MAX_PHOTOS, check_photos, prepare_folder, read_photo, result_file

JPEG, PNG, WEBP = b"\xff\xd8\xff\xe0rest", b"\x89PNG\r\n\x1a\nrest", b"RIFF\x08\0\0\0WEBPrest"


@pytest.mark.parametrize(
    ("name", "data", "content_type"),
    [
        ("a.txt", JPEG, "image/jpeg"),
        ("a.jpg", PNG, "image/png"),
        ("a", WEBP, "image/webp"),
        ("a.jpg", b"RIFF\x08\0\0\0WAVErest", "image/jpeg"),
        ("a.tiff", b"II*\0", "image/tiff"),
        ("a.nonsense", b"x", "application/octet-stream"),
    ],
)
def test_content_type_follows_the_bytes(tmp_path: Path, name: str, data: bytes, content_type: str) -> None:
    """The first bytes decide; only where they say nothing is the name asked."""
    file = tmp_path / name
    file.write_bytes(data)
    assert read_photo(file).content_type == content_type


def test_announcement_has_size_and_digest_of_the_whole_file(tmp_path: Path) -> None:
    """What the store will check is that of the file as a whole, not of its start."""
    file = tmp_path / "hall.jpg"
    data = JPEG + bytes(100_000)
    file.write_bytes(data)
    assert read_photo(file).announcement == {
        "filename": "hall.jpg",
        "content_type": "image/jpeg",
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_file_that_went_away_is_reported_as_such(tmp_path: Path) -> None:
    """Between the check and the reading a file may go: that is a message, not a traceback."""
    with pytest.raises(BadPhotos, match=r"gone\.jpg: cannot be read"):
        read_photo(tmp_path / "gone.jpg")


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    """One run is enough to learn of all mistakes, and good files are not among them."""
    good, empty = tmp_path / "good.jpg", tmp_path / "empty.jpg"
    good.write_bytes(JPEG)
    empty.touch()
    with pytest.raises(BadPhotos) as caught:
        check_photos([good, empty, tmp_path, tmp_path / "missing.jpg"])
    assert [problem.split(": ")[1][:12] for problem in caught.value.problems] == [
        "is empty",
        "is a folder;",
        "there is no ",
    ]
    check_photos([good])


def test_more_photos_than_a_batch_takes_are_refused(tmp_path: Path) -> None:
    """The limit is told before anything is sent; at the limit nothing is said."""
    photo = tmp_path / "a.jpg"
    photo.write_bytes(JPEG)
    check_photos([photo] * MAX_PHOTOS)
    with pytest.raises(BadPhotos, match="51 photos are too many for one batch: at most 50"):
        check_photos([photo] * (MAX_PHOTOS + 1))


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file in the way of the folder is noticed before photos are sent."""
    (tmp_path / "file").touch()
    with pytest.raises(BadPhotos, match="results cannot be written there"):
        prepare_folder(tmp_path / "file")


def test_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    """Looking whether files can be made leaves none behind."""
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_results_of_photos_with_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    """The number before the name differs even where name and type do not."""
    output = {"content_type": "image/webp"}
    files = [result_file(tmp_path, index, Path(f"{index}/hall.v2.jpg"), output) for index in (0, 11)]
    assert [file.name for file in files] == ["001-hall.v2.webp", "012-hall.v2.webp"]


@pytest.mark.parametrize(("content_type", "suffix"), [("image/png", ".png"), ("image/jpeg", ".jpg")])
def test_results_end_as_what_they_are(content_type: str, suffix: str) -> None:
    """The suffix is that of the result, not of the photo."""
    assert result_file(Path(), 0, Path("a.webp"), {"content_type": content_type}).suffix == suffix
