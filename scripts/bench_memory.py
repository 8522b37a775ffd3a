"""Measures how much memory the API process takes while a large form with photos comes in."""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from bench_photos import CONTENT_TYPE, Photo
from bench_report import Figure, Target
from bench_servers import BenchFailed, Servers

_SAMPLE_SECONDS = 0.02
_TIMEOUT_SECONDS = 300
TARGET = Target("under", 200)


def measure_memory(servers: Servers, photos: Sequence[Photo]) -> Iterator[Figure]:
    """Send all photos in one form to a process that has answered nothing yet but the question whether it is ready."""
    with servers.api() as api:
        time.sleep(1)
        memory = ResidentMemory(api.pid)
        idle_bytes = memory.read_bytes()
        start = time.perf_counter()
        with memory.watched():
            response = _submit_form(api.url, photos)
        seconds = time.perf_counter() - start
    if response.status_code != 201 or len(response.json()["batch"]["jobs"]) != len(photos):
        raise BenchFailed(f"the API answers {response.status_code}: {response.text[:500]}")
    size_mb = sum(photo.size_bytes for photo in photos) / 1e6
    yield Figure(
        f"memory of the API above idle while {len(photos)} photos, {size_mb:.0f} MB in all, come in one form",
        (memory.highest_bytes - idle_bytes) / 1e6,
        "MB",
        f"from {idle_bytes / 1e6:.0f} to {memory.highest_bytes / 1e6:.0f} MB, accepted in {seconds:.1f} s",
        TARGET,
    )


class ResidentMemory:
    """Resident memory of a process, looked at every 20 ms while it is watched."""

    def __init__(self, pid: int) -> None:
        self._statm = Path(f"/proc/{pid}/statm")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._is_over = threading.Event()
        self.highest_bytes = 0

    def read_bytes(self) -> int:
        """Look once."""
        return int(self._statm.read_text().split()[1]) * self._page_bytes

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the highest value that is seen meanwhile."""
        watching = threading.Thread(target=self._watch)
        watching.start()
        try:
            yield
        finally:
            self._is_over.set()
            watching.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_SAMPLE_SECONDS):
            self.highest_bytes = max(self.highest_bytes, self.read_bytes())


def _submit_form(url: str, photos: Sequence[Photo]) -> httpx.Response:
    parts = [f"photo{number}" for number in range(1, len(photos) + 1)]
    batch = {"items": [{"file": part} for part in parts]}
    with ExitStack() as opened:
        files = [
            (part, (photo.path.name, opened.enter_context(photo.path.open("rb")), CONTENT_TYPE))
            for part, photo in zip(parts, photos, strict=True)
        ]
        return httpx.post(
            f"{url}/v1/batches",
            data={"batch": json.dumps(batch)},
            files=files,
            timeout=_TIMEOUT_SECONDS,
            trust_env=False,
        )
