"""docs/adding-a-model.md is followed to the letter, in a copy of the checkout: each of its models stages a photo."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.model_entry import LoraEntry, ModelEntry

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "adding-a-model.md"
# 45 s are usual.
TIMEOUT_SECONDS = 500
COPIED = ("server", "pipelines", "scripts", "config")
# What a reader does in two terminals: `restage up` stays in the first, stopped where the page starts it again.
TERMINALS = """
up=
stop_up() { if [ -n "$up" ]; then kill -TERM "$up"; wait "$up"; fi; }
trap stop_up EXIT
restage() {
  if [ "$1" != up ]; then python -m server.cli "$@"; return; fi
  stop_up
  : > up.log
  python -m server.cli up > up.log 2>&1 &
  up=$!
  until grep --quiet "^ready" up.log; do kill -0 "$up" || return 1; sleep 0.1; done
  export RESTAGE_URL=$(sed -n "s/^ready //p" up.log)
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    kind: str
    text: str


def blocks() -> list[Block]:
    """Give the blocks in their order."""
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)]


def write_file(block: Block) -> str:
    """Give the shell command that writes a block to the file that its first line names, or adds it there."""
    first, _, text = block.text.partition("\n")
    named = re.fullmatch(r"# ([\w./-]+)(, at the end)?", first)
    assert named, f"a block does not say in which file it belongs: {first}"
    redirection = ">>" if named[2] else ">"
    return f"cat {redirection} {named[1]} <<'END-OF-BLOCK'\n{text}END-OF-BLOCK"


def script() -> tuple[str, dict[str, str]]:
    """Make one shell script of the page, and give what each of its parts must print: file → text."""
    lines: list[str] = [TERMINALS]
    expected: dict[str, str] = {}
    printed = ""
    for number, block in enumerate(blocks()):
        if block.kind == "bash":
            printed = f"printed-{number}.txt"
            lines.append(f"{{\n{block.text}}} > {printed}")
        elif block.kind == "text":
            expected[printed] = block.text
        else:
            lines.append(write_file(block))
    return "\n".join(lines), expected


def matches(pattern: str, text: str) -> bool:
    """Compare what was printed with the page, where `…` stands for what differs from run to run."""
    # Tables are drawn as wide as what stands in them.
    words, printed = (" ".join(re.sub(r"[\u2500-\u257f]+", " ", one).split()) for one in (pattern, text))
    return re.fullmatch(".*?".join(re.escape(part) for part in words.split("…")), printed) is not None


def follow(checkout: Path, folder: Path) -> dict[str, str]:
    """Do what the page says; returns what it should have printed: file → text."""
    text, expected = script()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RESTAGE", "COVERAGE"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "XDG_STATE_HOME": str(folder / "state"),
        "COLUMNS": "120",
    }
    log = folder / "script.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-eux", "-o", "pipefail", "-c", text],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
    logs = [log, checkout / "up.log", checkout / ".data" / "logs" / "worker-1.log"]
    assert status == 0, "\n\n".join(file.read_text()[-3000:] for file in logs if file.exists())
    return expected


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, weights_dir: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give the folder in which the page was followed, and what it should have printed."""
    folder = tmp_path_factory.mktemp("adding")
    checkout = folder / "restage"
    for name in COPIED:
        shutil.copytree(REPOSITORY / name, checkout / name)
    shutil.copytree(weights_dir, checkout / "weights")
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(checkout / "hall.jpg")
    yield checkout, follow(checkout, folder)
    shutil.rmtree(folder)


def staged(checkout: Path, name: str) -> np.ndarray:
    """Read a result: height x width x 3, integers from 0 to 255."""
    with Image.open(checkout / "staged" / name / "001-hall.webp") as image:
        assert (image.format, image.size) == ("WEBP", (144, 112))
        return np.asarray(image.convert("RGB")).astype(int)


def test_every_model_of_the_page_stages_a_photo(followed: tuple[Path, dict[str, str]]) -> None:
    """Entry, LoRA, generic entry and new family each end in a picture; LoRA and family change what the entry makes."""
    checkout, _ = followed
    pictures = {name: staged(checkout, name) for name in ("plain", "lora", "pix2pix", "negative")}
    assert all(picture.std() > 10 for picture in pictures.values())
    for name in ("lora", "negative"):
        assert np.abs(pictures[name] - pictures["plain"]).mean() > 1, name


def test_page_shows_what_is_printed(followed: tuple[Path, dict[str, str]]) -> None:
    """What the page says that commands print, they print."""
    checkout, expected = followed
    assert expected
    for file, text in expected.items():
        printed = (checkout / file).read_text()
        assert matches(text, printed), printed


def fields_of_tables() -> list[set[str]]:
    """Give the names in the first column of each table."""
    tables = re.findall(r"^\| field \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    return [set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()))) for table in tables]


@pytest.mark.parametrize(("number", "entry"), [(0, ModelEntry), (1, LoraEntry)])
def test_page_explains_every_field(number: int, entry: Any) -> None:
    """The tables name all fields that an entry may have, and no others."""
    assert fields_of_tables()[number] == entry.model_fields.keys()


@pytest.mark.parametrize("text", ["a 1 b", "a  \n 22 b"])
def test_ellipsis_stands_for_anything_else(text: str) -> None:
    """Only what `…` stands for may differ between the page and what is printed."""
    assert matches("a … b", text)
    assert not matches("a … c", text)
    assert not matches("a …", f"x {text}")
