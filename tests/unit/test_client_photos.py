"""What the client says of files before anything is sent, and where it puts results."""

import hashlib
from pathlib import Path

import pytest

from server.client.archive import archive_file
from server.client.errors import BadPhotos
from server.client.photos import MAX_PHOTOS, check_photos, is_there, prepare_folder, read_photo, result_file
from server.client.sending import MAX_PARALLEL_TRANSFERS, count_parallel

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


def test_long_and_odd_names_become_names_of_files(tmp_path: Path) -> None:
    """A name that fills all 255 bytes still has room for number and suffix; bytes that are no text are left out."""
    photo = Path("ä" * 125 + ".jpg")
    file = result_file(tmp_path, 0, photo, {"content_type": "image/webp"})
    file.with_name(f".{file.name}.01234567.part").touch()
    assert file.name.startswith("001-ää")
    odd = Path("h\udce9ll.jpg")
    assert result_file(tmp_path, 0, odd, {"content_type": "image/webp"}).name == "001-hll.webp"


def test_name_that_is_no_text_is_announced_as_text(tmp_path: Path) -> None:
    """What an old camera wrote in another encoding can be sent as JSON."""
    file = tmp_path / "h\udce9ll.jpg"
    file.write_bytes(JPEG)
    assert read_photo(file).announcement["filename"] == "h\N{REPLACEMENT CHARACTER}ll.jpg"


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("12 Oak St", "12 Oak St.zip"),
        (None, "b1.zip"),
        ("", "b1.zip"),
        (" .. ", "b1.zip"),
        ("../../etc/cron", "_.._etc_cron.zip"),
        ("a\0b\nc:d", "a_b_c_d.zip"),
        ("Ü" * 255, "Ü" * 100 + ".zip"),
    ],
)
def test_archive_is_named_after_the_label(tmp_path: Path, label: str | None, name: str) -> None:
    """Whatever a label says, the archive lies in the folder and has a name that the file system takes."""
    file = archive_file(tmp_path, label, "b1")
    assert file.name == name
    file.touch()
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("sizes_bytes", "at_once"),
    [
        ([0], 16),
        ([1_000_000] * 50, 16),
        ([1_000_000] * 49 + [50_000_000], 16),
        ([8_000_000] * 5, 8),
        ([50_000_000] * 50, 2),
        ([10**12], 2),
    ],
)
def test_large_photos_are_sent_few_at_once(sizes_bytes: list[int], at_once: int) -> None:
    """They fill a line by themselves, and must arrive before their forms expire; one among many small slows none."""
    assert count_parallel(sizes_bytes) == at_once <= MAX_PARALLEL_TRANSFERS


def test_result_is_there_only_with_its_bytes(tmp_path: Path) -> None:
    """A missing, a folder's, a cut and a whole file."""
    digest = hashlib.sha256(b"picture").hexdigest()
    file = tmp_path / "a.webp"
    assert not is_there(file, digest)
    assert not is_there(tmp_path, digest)
    file.write_bytes(b"pict")
    assert not is_there(file, digest)
    file.write_bytes(b"picture")
    assert is_there(file, digest)
