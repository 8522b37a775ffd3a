"""The parts of `make demo` that can be looked at alone; the demo as a whole is run by `make demo`."""

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.client.batch import PhotoResult

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that imports a script as Python does when it is run."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_a_seed_draws_the_same_room_and_another_seed_another(scripts: Any) -> None:
    """Demo and tests can rely on their photos; eight rooms are eight different ones."""
    rooms = scripts("draw_rooms")
    first, again, other = (
        np.asarray(rooms.draw_room(rooms.make_room(seed), 96, 128)).astype(int) for seed in (3, 3, 4)
    )
    assert first.shape == (96, 128, 3)
    assert (first == again).all()
    assert np.abs(first - other).mean() > 2


def test_rooms_are_photos_of_about_a_megapixel(scripts: Any, tmp_path: Path) -> None:
    """They are JPEG files of the announced size, in order."""
    rooms = scripts("draw_rooms")
    (file,) = rooms.draw_rooms(tmp_path, 1)
    with Image.open(file) as photo:
        assert (photo.format, photo.size) == ("JPEG", (1024, 768))


def test_contact_sheet_shows_before_beside_after(scripts: Any, tmp_path: Path) -> None:
    """Each photo stands left of its result."""
    before, after, sheet_file = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "sheet.png"
    Image.new("RGB", (60, 40), "red").save(before)
    Image.new("RGB", (40, 40), "blue").save(after)
    scripts("demo").make_contact_sheet([PhotoResult(0, before, "succeeded", "m", 1.0, after)] * 3, sheet_file)
    with Image.open(sheet_file) as sheet:
        assert sheet.getpixel((16 + 160, 16 + 160)) == (255, 0, 0)
        assert sheet.getpixel((16 + 320 + 16 + 160, 16 + 160)) == (0, 0, 255)
        assert sheet.height > 2 * 320


def test_server_that_cannot_start_fails_the_demo_with_what_it_said(scripts: Any, tmp_path: Path) -> None:
    """Nobody waits for a server that has ended, and its last words are shown."""
    demo = scripts("demo")
    (tmp_path / "data").touch()  # a file where the folder should be
    server = demo.DemoServer(tmp_path / "data", tmp_path / "up.log")
    started_at = time.monotonic()
    server.start()
    with pytest.raises(demo.DemoFailed, match="ended with status"):
        server.wait_ready()
    assert time.monotonic() - started_at < 60
    assert "data" in server.last_words()
