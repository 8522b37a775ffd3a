"""An API and one worker as processes, and what benchmarks of the lane ask of them: uploads, batches, logs, times."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from bench_photos import CONTENT_TYPE, Photo
from bench_servers import REPOSITORY, RESTAGE, BenchFailed, Servers, wait_until

from server.child import Child

_PATIENCE_SECONDS = 120.0
_TIMER_SERVER = (str(REPOSITORY / "scripts" / "bench_timer_server.py"),)
TIMER_MODEL = "bench-timer"
KONTEXT_MODEL = "tiny-flux-kontext"
KONTEXT_WEIGHTS = "tiny-flux-kontext"
# One request may then hold all the jobs of a measurement.
_ENVIRONMENT = {"RESTAGE__LIMITS__MAX_BATCH_ITEMS": "1000", "RESTAGE__WORKER__TORCH_THREADS": "1"}


class Log:
    """The events that a process writes as JSON, read as they come."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0
        self._times: dict[str, dict[str, float]] = {}
        self._fields: dict[str, dict[str, Any]] = {}

    def times(self, event: str) -> Mapping[str, float]:
        """Return when an event was written, in seconds since 1970, by job."""
        self._read()
        return self._times.get(event, {})

    def fields(self, event: str) -> Mapping[str, dict[str, Any]]:
        """Return what the last event of its kind says, by job."""
        self._read()
        return {job: one for job, one in self._fields.items() if one["event"] == event}

    def _read(self) -> None:
        with self._file.open() as log:
            log.seek(self._position)
            while (line := log.readline()).endswith("\n"):
                self._position = log.tell()
                if line.startswith("{") and "job" in (found := json.loads(line)):
                    at = datetime.fromisoformat(found["timestamp"]).timestamp()
                    self._times.setdefault(found["event"], {})[found["job"]] = at
                    self._fields[found["job"]] = found


class Stack:
    """A running API and worker.

    Attributes:
        worker: the process of the worker.
        log: what it writes.
        timeline: a file that runs of the timer write a line to.
    """

    def __init__(self, http: httpx.Client, worker: Child, timeline: Path) -> None:
        self._http = http
        self.worker = worker
        self.log = Log(worker.log_file)
        self.timeline = timeline

    def upload(self, photos: Sequence[Photo]) -> list[str]:
        """Send photos to the store; returns the ids of the uploads."""
        files = [
            {"filename": one.path.name, "content_type": CONTENT_TYPE, "size_bytes": one.size_bytes} for one in photos
        ]
        uploads: list[dict[str, Any]] = []
        for first in range(0, len(files), 50):
            uploads += self.call("/v1/uploads", {"files": files[first : first + 50]})["uploads"]
        for photo, form in zip(photos, uploads, strict=True):
            response = self._http.post(form["url"], data=form["fields"], files={"file": photo.path.read_bytes()})
            if not response.is_success:
                raise BenchFailed(f"the store answers {response.status_code}: {response.text[:500]}")
        return [form["upload_id"] for form in uploads]

    def submit(self, items: Sequence[Mapping[str, Any]], **envelope: Any) -> dict[str, Any]:
        """Submit one batch; returns it as it was accepted."""
        return self.call("/v1/batches", {"items": [*items], **envelope})["batch"]

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a request that must succeed in full.

        Raises:
            BenchFailed: it did not.
        """
        response = self._http.post(path, json=body or {})
        if response.status_code not in {200, 201}:
            raise BenchFailed(f"{path} answers {response.status_code}: {response.text[:500]}")
        return response.json()

    def read(self, path: str) -> dict[str, Any]:
        """Send a GET that must succeed.

        Raises:
            BenchFailed: it did not.
        """
        response = self._http.get(path)
        if response.status_code != 200:
            raise BenchFailed(f"{path} answers {response.status_code}: {response.text[:500]}")
        return response.json()

    def cancel_job(self, job: str) -> None:
        """Cancel a job, unless it has ended already.

        Raises:
            BenchFailed: the API answers anything else.
        """
        response = self._http.post(f"/v1/jobs/{job}/cancel")
        if response.status_code not in {200, 409}:
            raise BenchFailed(f"a cancel is answered {response.status_code}: {response.text[:500]}")

    def wait_succeeded(self, jobs: Sequence[str], *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until the worker has said of all jobs that they are committed.

        Raises:
            BenchFailed: one ended otherwise, or it took too long.
        """
        self.wait_for(lambda: _all_succeeded(self.log, jobs), patience_seconds)

    def wait_for(self, check: Callable[[], bool], patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait for what the worker brings about, looking every 10 ms.

        Raises:
            BenchFailed: the worker ended, or it took too long.
        """
        give_up_at = time.monotonic() + patience_seconds
        while not check():
            if not self.worker.is_running:
                raise BenchFailed(self.worker.describe_end(f"ended with status {self.worker.poll()}"))
            if time.monotonic() > give_up_at:
                raise BenchFailed(self.worker.describe_end(f"was not done after {patience_seconds:g} s"))
            time.sleep(0.01)

    def staged_at(self) -> dict[str, float]:
        """Return when the photos of the jobs that were committed had been decoded, by the monotonic clock, by job."""
        offset = time.time() - time.monotonic()
        claimed = self.log.times("job.claimed")
        ends = self.log.fields("job.succeeded")
        return {job: claimed[job] - offset + end["fetch_seconds"] for job, end in ends.items()}

    def runs(self) -> dict[int, dict[str, float]]:
        """Return what runs of the timer have written, by seed."""
        if not self.timeline.exists():
            return {}
        lines = self.timeline.read_text().split("\n")[:-1]
        return {line["seed"]: line for line in map(json.loads, lines)}


@contextmanager
def open_stack(
    servers: Servers, model: str, program: Sequence[str] = RESTAGE, worker: Sequence[str] = (), **environment: str
) -> Iterator[Stack]:
    """Start an API and a worker that serves one model; both stop at the end.

    Args:
        servers: on which they work.
        model: in the worker's memory before this returns.
        program: what is called with `api` and `worker`.
        worker: what is called with `worker`, where that is another program.
        **environment: settings of both.
    """
    weights = _weights_dir(servers)
    timeline = servers.folder / "timeline.jsonl"
    settings = _ENVIRONMENT | {
        "RESTAGE__MODELS__ENABLED": json.dumps([model]),
        "RESTAGE__MODELS__DEFAULT": model,
        "RESTAGE__MODELS__WEIGHTS_DIR": str(weights),
        "BENCH_TIMELINE": str(timeline),
    }
    settings |= environment
    with (
        servers.api(program, **settings) as api,
        servers.worker(worker or program, **settings) as child,
        httpx.Client(base_url=api.url, trust_env=False, timeout=60) as http,
    ):
        wait_until(lambda: http.get("/health/ready").json()["models"].get(model, 0) > 0, child)
        yield Stack(http, child, timeline)


def open_timer_stack(servers: Servers, **environment: str) -> Any:
    """Start an API and a worker whose one model waits on a timer."""
    registry = str(REPOSITORY / "scripts" / "bench_models.yaml")
    return open_stack(servers, TIMER_MODEL, _TIMER_SERVER, RESTAGE__MODELS__FILE=registry, **environment)


def _all_succeeded(log: Log, jobs: Sequence[str]) -> bool:
    for event in ("job.failed", "job.cancelled", "job.lost"):
        if wrong := log.times(event).keys() & {*jobs}:
            raise BenchFailed(f"{event}: {log.fields(event)[wrong.pop()]}")
    return {*jobs} <= log.times("job.succeeded").keys()


def _weights_dir(servers: Servers) -> Path:
    folder = servers.folder / "weights"
    if not folder.exists():
        making = Child(
            "make_tiny_weights",
            [sys.executable, str(REPOSITORY / "scripts" / "make_tiny_weights.py"), "--out", str(folder)],
            log_file=servers.folder / "weights.log",
        )
        making.start()
        while making.is_running:
            time.sleep(0.05)
        if making.poll() != 0:
            raise BenchFailed(making.describe_end(f"ended with status {making.poll()}"))
    return folder
