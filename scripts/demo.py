"""Shows the whole way of a batch on this machine: eight drawn rooms in, eight pictures and a contact sheet out."""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draw_rooms import draw_rooms
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines.twin_stamp import is_current
from server.child import Child
from server.client.batch import BatchRequest, BatchRun, PhotoResult
from server.client.errors import ClientError
from server.client.http import RestageClient
from server.client.progress import BatchProgress, make_table, open_console

REPOSITORY = Path(__file__).resolve().parent.parent
QWEN, KONTEXT = "tiny-qwen-image-edit-2511", "tiny-flux-kontext"
NUM_ROOMS = 8
DEFAULTS: dict[str, Any] = {"model": QWEN, "room_type": "living_room", "style": "modern", "params": {"seed": 7}}
# What single photos ask for over the defaults, by index.
OVERRIDES: dict[int, dict[str, Any]] = {
    1: {"room_type": "bedroom", "style": "scandinavian"},
    2: {"model": KONTEXT, "room_type": "dining_room"},
    3: {"params": {"num_inference_steps": 4, "true_cfg_scale": 2.0}},
    4: {"model": KONTEXT, "style": "industrial", "params": {"guidance_scale": 4.0}},
    5: {"prompt": "Add a piano and two chairs; keep everything else.", "params": {"seed": 11}},
    6: {"model": KONTEXT, "params": {"aspect_ratio": "1:1"}},
    7: {"room_type": "office", "style": "contemporary", "output": {"format": "png"}},
}
_READY_SECONDS = 300
_STOP_SECONDS = 60
_NOTICE = """\
The two models of this demo are tiny twins: the real pipelines at toy size, with random weights.
What they paint looks like noise, on purpose: it shows that every part works, not what staging looks like.
On a machine with an NVIDIA GPU, put real weights where weights/README.md says; README.md says how to start."""
_CELL, _MARGIN, _CAPTION = 320, 16, 40


class DemoFailed(Exception):
    """Raised when a part of the demo did not work; the message has what its processes said last."""


class DemoServer:
    """`restage up` on a folder of its own, with everything that it says in a log file."""

    def __init__(self, data_dir: Path, log_file: Path) -> None:
        self._data_dir = data_dir
        self._child = Child(
            "restage up",
            [sys.executable, "-m", "server.cli", "up", "--data", str(data_dir)],
            log_file=log_file,
            cwd=REPOSITORY,
        )

    def start(self) -> None:
        """Start it with the configuration of the repository, whatever the environment says; returns at once."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RESTAGE_")}
        self._child.start(environment | {"RESTAGE_ENV": "local"})

    def wait_ready(self) -> str:
        """Wait until it would serve a batch.

        Returns:
            Its URL.

        Raises:
            DemoFailed: it ended, or is not ready in time.
        """
        give_up_at = time.monotonic() + _READY_SECONDS
        while time.monotonic() < give_up_at:
            for line in self._child.tail().splitlines():
                if line.startswith("ready http"):
                    return line.split()[1]
            if not self._child.is_running:
                raise DemoFailed(f"`restage up` ended with status {self._child.poll()}")
            time.sleep(0.2)
        raise DemoFailed(f"`restage up` was not ready after {_READY_SECONDS} s")

    def stop(self) -> None:
        """Stop it and all that it started."""
        self._child.stop(_STOP_SECONDS)

    def last_words(self) -> str:
        """What it and its processes said last."""
        logs = {"restage up": self._child.tail()}
        for file in sorted((self._data_dir / "logs").glob("*.log")):
            logs[file.name] = "\n".join(file.read_text(errors="replace").splitlines()[-20:])
        return "\n".join(f"--- {name}\n{text}" for name, text in logs.items() if text)


@contextmanager
def running_server(log_file: Path) -> Iterator[DemoServer]:
    """Start a server on an empty folder; stop it and remove the folder at the end, whatever happens between.

    Raises:
        DemoFailed: what went wrong inside the context, with what the server said last.
    """
    with tempfile.TemporaryDirectory(prefix="restage-demo-") as folder:
        server = DemoServer(Path(folder), log_file)
        try:
            server.start()
            yield server
        except (DemoFailed, ClientError) as error:
            raise DemoFailed(f"{error}\n{server.last_words()}") from error
        finally:
            server.stop()


def make_twins() -> None:
    """Make the tiny models if they are not there, or were made by another version.

    Raises:
        DemoFailed: they cannot be made.
    """
    if all(is_current(REPOSITORY / "weights" / twin) for twin in (QWEN, KONTEXT)):
        return
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "make_tiny_weights.py"),
        "--out",
        str(REPOSITORY / "weights"),
    ]
    # A process of its own, so that this one never loads torch.
    made = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own script)
    if made.returncode != 0:
        raise DemoFailed(f"the tiny models cannot be made:\n{made.stdout}{made.stderr}")


async def stage_rooms(url: str, rooms: Sequence[Path], out_dir: Path) -> list[PhotoResult]:
    """Submit all rooms as one batch, wait for it and fetch the pictures.

    Raises:
        ClientError: the server refuses the batch or is gone.
    """
    request = BatchRequest(photos=rooms, defaults=DEFAULTS, overrides=OVERRIDES, label="demo")
    with BatchProgress(open_console()) as progress:
        async with RestageClient(url, on_wait=progress.note) as client:
            run = BatchRun(client, request, progress)
            await run.submit()
            await run.finish(out_dir)
    return run.results


def make_contact_sheet(results: Sequence[PhotoResult], file: Path) -> None:
    """Write one picture with each room before and after, side by side."""
    num_columns = 2
    num_rows = -(-len(results) // num_columns)
    width, height = 2 * _CELL + _MARGIN, _CELL + _CAPTION
    sheet = Image.new(
        "RGB",
        (num_columns * (width + _MARGIN) + _MARGIN, num_rows * (height + _MARGIN) + _MARGIN),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for number, result in enumerate(results):
        left = _MARGIN + number % num_columns * (width + _MARGIN)
        top = _MARGIN + number // num_columns * (height + _MARGIN)
        for picture_file, x in ((result.photo, left), (result.file, left + _CELL + _MARGIN)):
            if picture_file is not None:
                with Image.open(picture_file) as picture:
                    sheet.paste(ImageOps.pad(picture.convert("RGB"), (_CELL, _CELL), color="#eeeeee"), (x, top))
        pen.text((left, top + _CELL + 8), f"{result.photo.name} > {result.model}", fill="black", font=font)
    sheet.save(file, quality=90)


def run_demo(out_dir: Path) -> Path:
    """Run the demo from twins to contact sheet.

    Returns:
        The contact sheet.

    Raises:
        DemoFailed: a part did not work.
    """
    console = open_console()
    out_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"{_NOTICE}\n")
    console.print("making the tiny models, if they are not there")
    make_twins()
    log_file = out_dir / "restage-up.log"
    log_file.unlink(missing_ok=True)
    with running_server(log_file) as server:
        console.print(f"starting `restage up`, and drawing {NUM_ROOMS} rooms while it starts")
        rooms = draw_rooms(out_dir / "rooms", NUM_ROOMS)
        url = server.wait_ready()
        console.print(f"the server is ready at {url}; submitting the rooms as one batch")
        staged_dir = out_dir / "staged"
        shutil.rmtree(staged_dir, ignore_errors=True)
        staged_dir.mkdir()
        results = asyncio.run(stage_rooms(url, rooms, staged_dir))
        console.print(make_table(results))
        if not all(result.is_done for result in results):
            raise DemoFailed("not every room was staged")
        console.print("stopping the server")
    sheet = out_dir / "contact-sheet.jpg"
    make_contact_sheet(results, sheet)
    return sheet


def main() -> None:
    """Run the demo; status 0 only if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo-output", help="folder (default: demo-output)")
    out_dir: Path = parser.parse_args().out
    started_at = time.monotonic()
    try:
        sheet = run_demo(out_dir.absolute())
    except DemoFailed as error:
        sys.exit(f"the demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\nbefore and after: {sheet}\ndone in {time.monotonic() - started_at:.0f} s; everything is stopped")


if __name__ == "__main__":
    main()
