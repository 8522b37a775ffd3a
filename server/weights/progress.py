"""What `restage weights` shows while it reads or fetches gigabytes."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from server.client.progress import open_console


class WeightsProgress:
    """A bar in bytes; where standard error is no terminal, a line for each file that has arrived."""

    def __init__(self, name: str) -> None:
        self._console = open_console(stderr=True)
        self._name = name
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=0)
        self._expected_bytes = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, size_bytes: int) -> None:
        """Add bytes that are going to be read, or to arrive."""
        self._expected_bytes += size_bytes
        self._bar.update(self._task, total=self._expected_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count bytes that were read, or arrived; negative where they have to arrive again."""
        self._bar.advance(self._task, num_bytes)

    def finish_file(self, path: str, size_bytes: int) -> None:
        """Say that a file has arrived, where no bar says it."""
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: {path}, {describe_size(size_bytes)}", markup=False)


def describe_size(size_bytes: int) -> str:
    """Write a size for people: 57.7 GB, 12.0 MB, 0.6 kB."""
    for unit, num_bytes in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= num_bytes:
            return f"{size_bytes / num_bytes:.1f} {unit}"
    return f"{size_bytes / 1e3:.1f} kB"
