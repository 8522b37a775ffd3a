"""What was accepted is done, though everything dies at once."""

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from PIL import Image

from tests.conftest import untraced


def photo(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96 + index, 80), (5 * index % 256, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


class Up:
    """`restage up` in a session of its own, as an operator's shell would start it."""

    def __init__(self, data_dir: Path, log: Path, weights_dir: Path) -> None:
        self.log = log
        environment = untraced() | {"RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir), "RESTAGE_ENV": "test"}
        with log.open("ab") as output:
            self.log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "up", "--data", str(data_dir), "--port", "0"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_bytes()[self.log_start :].decode()

    def url(self) -> str:
        deadline = time.monotonic() + 120
        while not (ready := re.search(r"^ready (http://\S+)$", self.text(), re.MULTILINE)):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)
        return ready.group(1)

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def kill_tree(self) -> list[psutil.Process]:
        tree = self.tree()
        for process in tree:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        return tree


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def test_thirty_photos_survive_the_death_of_everything(tmp_path, weights_dir, make_client):
    """Thirty accepted photos are all done after kill -9 of every process of `restage up` and a new start."""
    up = Up(tmp_path / "data", tmp_path / "up.log", weights_dir)
    try:
        client = make_client(up.url())
        upload_ids = client.upload({f"{index}.png": photo(index) for index in range(30)})
        items = [
            {"upload_id": upload_id, "model": ("tiny-flux-kontext", "tiny-qwen-image-edit-2511")[index % 2]}
            for index, upload_id in enumerate(upload_ids)
        ]
        batch = client.submit({"items": items})
        deadline = time.monotonic() + 60
        while client.batch(batch["id"])["counts"]["succeeded"] < 3:
            assert time.monotonic() < deadline, up.text()
            time.sleep(0.05)
        tree = up.kill_tree()
        deadline = time.monotonic() + 10
        while not all_gone(tree):
            assert time.monotonic() < deadline, tree
            time.sleep(0.1)

        up = Up(tmp_path / "data", tmp_path / "up.log", weights_dir)
        client = make_client(up.url())
        batch = client.finished(batch["id"])

        assert batch["counts"] == {"total": 30, "queued": 0, "running": 0, "succeeded": 30, "failed": 0, "cancelled": 0}
        for job in batch["jobs"]:
            client.output(job)

        tree = up.tree()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(timeout=60) == 0, up.text()
        assert all_gone(tree), up.text()
    except httpx.HTTPError as error:
        raise AssertionError(up.text()) from error
    finally:
        if up.process.poll() is None:
            up.kill_tree()
