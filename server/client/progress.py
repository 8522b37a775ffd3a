"""What the command line shows while a batch is under way, and the table at its end."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from server.client.photos import plain
from server.client.request import PhotoResult

_FILE_WIDTH = 200
_COLOURS = {"succeeded": "green", "failed": "red", "refused": "red", "cancelled": "yellow"}


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or standard error; wide where no terminal sets a limit, so that no path is broken."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_FILE_WIDTH)


class BatchProgress:
    """Bars for sending and staging; a line for each change instead where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = not console.is_terminal
        self._sending = Progress(
            TextColumn("sending"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console
        )
        self._staging = Progress(
            TextColumn("staging"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
        )
        self._send_task: TaskID | None = None
        self._stage_task: TaskID | None = None
        self._shown: Progress | None = None
        self._to_send_bytes = 0
        self._last_line = ""
        self._last_note = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._show(None)

    def start_uploads(self, size_bytes: int) -> None:
        """Say how much there is to send."""
        if size_bytes == 0:
            return
        self._to_send_bytes = size_bytes
        if self._lines:
            self._print(f"sending {size_bytes / 1e6:.1f} MB")
            return
        if self._send_task is not None:
            self._sending.remove_task(self._send_task)
        self._send_task = self._sending.add_task("sending", total=size_bytes)
        self._show(self._sending)

    def count_uploaded(self, num_bytes: int) -> None:
        """Add bytes that were sent; negative where they have to be sent again."""
        if self._send_task is not None:
            self._sending.advance(self._send_task, num_bytes)

    def skip_upload(self, size_bytes: int) -> None:
        """Take back from what there is to send: it need not be sent, or cannot be."""
        self._to_send_bytes -= size_bytes
        if self._send_task is not None:
            self._sending.update(self._send_task, total=self._to_send_bytes)

    def show_batch(self, batch: Mapping[str, Any]) -> None:
        """Show how far a batch is."""
        counts: Mapping[str, int] = batch["counts"]
        num_final = counts["succeeded"] + counts["failed"] + counts["cancelled"]
        words = [f"{counts[status]} {status}" for status in ("running", "queued", "failed") if counts[status]]
        if self._lines:
            self._print(f"staged {counts['succeeded']} of {counts['total']}" + "".join(f", {word}" for word in words))
            return
        if self._stage_task is None:
            self._stage_task = self._staging.add_task("staging", total=counts["total"], now="")
            self._show(self._staging)
        steps = [_describe_step(job) for job in batch["jobs"] if job["status"] == "running" and job["progress"]]
        self._staging.update(self._stage_task, completed=num_final, now=", ".join(words + steps + _describe_eta(batch)))

    def note(self, text: str) -> None:
        """Show a line of its own, above the bars; the same one only once in a row."""
        if text != self._last_note:
            self._console.print(Text(text, style="yellow"))
        self._last_note = text

    def _show(self, bar: Progress | None) -> None:
        if self._shown is not None:
            self._shown.stop()
        if bar is not None:
            bar.start()
        self._shown = bar

    def _print(self, line: str) -> None:
        if line != self._last_line:
            self._console.print(line)
        self._last_line = line


def _describe_eta(batch: Mapping[str, Any]) -> list[str]:
    seconds: float | None = batch.get("eta_seconds")
    if not seconds:
        return []
    return [f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"]


def _describe_step(job: Mapping[str, Any]) -> str:
    progress = job["progress"]
    return f"{job['name'] or job['id']}: step {progress['step']} of {progress['total_steps']}"


def make_table(results: Sequence[PhotoResult]) -> Table:
    """Build the table that ends a batch: one row for each photo."""
    table = Table(header_style="bold")
    for name in ("photo", "model", "status"):
        table.add_column(name, overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("result", overflow="fold")
    with_errors = any(result.error for result in results)
    if with_errors:
        table.add_column("error", overflow="fold")
    for result in results:
        row = [
            Text(plain(result.photo.name)),
            Text(result.model or ""),
            Text(result.status, style=_COLOURS.get(result.status, "")),
            "" if result.seconds is None else f"{result.seconds:.1f}",
            Text("" if result.file is None else plain(result.file)),
        ]
        table.add_row(*row, *([Text(result.error or "")] if with_errors else []))
    return table
