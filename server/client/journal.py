"""What is known of a request that is under way, kept so that the same command goes on after its process has died."""

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager

from server.client.journal_file import JournalFile, remove_unused, state_folder
from server.client.photos import read_photo
from server.client.record import ArrivedPhoto, Record, RecordDamaged
from server.client.request import BatchRequest

# How long a server, as it is delivered, keeps idempotency keys and uploads that no batch names; and results.
_LIFE_SECONDS, _ACCEPTED_LIFE_SECONDS = 86_400.0, 7 * 86_400.0
_CLOCK_SLACK_SECONDS = 60.0

Note = Callable[[str], None]


class Journal:
    """The record of one request, in memory and, where there is a file, on disk.

    Whoever makes a step changes `record`, and calls `save` before the server could remember the step.

    Args:
        file: None keeps the record in memory alone.
        record: what an earlier process left; None begins anew.
        note: told when the file cannot be written.
    """

    def __init__(self, file: JournalFile | None = None, record: Record | None = None, note: Note | None = None) -> None:
        self.record = record or Record()
        self._file = file
        self._note = note
        self._written = b""
        self._writing = asyncio.Lock()

    async def save(self) -> None:
        """Write the record; durable on return. Calls that wait for one another share a write."""
        async with self._writing:
            data = self.record.to_bytes()
            if self._file is None or data == self._written:
                return
            try:
                await asyncio.to_thread(self._file.write, data)
            except OSError as error:
                self._file = None
                if self._note is not None:
                    self._note(_explain_no_journal(error))
            self._written = data

    async def start_anew(
        self, *, arrived: Mapping[int, ArrivedPhoto] | None = None, superseded_batch_id: str | None = None
    ) -> None:
        """Begin again with a new idempotency key, and with those photos that are still in the store."""
        self.record = Record(
            request=self.record.request, arrived=dict(arrived or {}), superseded_batch_id=superseded_batch_id
        )
        await self.save()

    def remove(self) -> None:
        """Forget the request: the same command later makes a new one."""
        if self._file is not None:
            self._file.remove()


@contextmanager
def open_journal(request: BatchRequest, url: str, *, note: Note, anew: bool = False) -> Generator[Journal]:
    """Open the journal of a request, with what an earlier process left there; no other process has it meanwhile.

    Args:
        request: photos and settings.
        url: of the server.
        note: told in a line why there is no journal, or why one that is there is not used.
        anew: begin anew, whatever is there.

    Raises:
        AlreadyRunning: another process has it.
        BadPhotos: a photo cannot be read.
    """
    fingerprint = request.fingerprint(url)
    file = left = None
    with ExitStack() as stack:
        try:
            folder = state_folder()
            file = stack.enter_context(JournalFile(folder, fingerprint))
            remove_unused(folder)
            left = None if anew else file.read()
        except (OSError, RuntimeError) as error:
            note(_explain_no_journal(error))
        record = None if left is None else _use(left, fingerprint, request, note)
        yield Journal(file, record or Record(request=fingerprint), note)


def _use(left: bytes, fingerprint: str, request: BatchRequest, note: Note) -> Record | None:
    try:
        record = Record.from_bytes(left)
    except RecordDamaged:
        note("the journal of an earlier run is damaged or of another version, and is ignored")
        return None
    if reason := _find_reason_against(record, fingerprint, request):
        note(f"an earlier run of this command is not gone on with: {reason}")
        return None
    return record


def _find_reason_against(record: Record, fingerprint: str, request: BatchRequest) -> str | None:
    indexes = record.arrived.keys() | record.refused.keys()
    if record.request != fingerprint or not indexes <= set(range(len(request.photos))):
        return "its journal is damaged"
    age_seconds = time.time() - record.created_at
    if (
        not -_CLOCK_SLACK_SECONDS
        <= age_seconds
        < (_LIFE_SECONDS if record.batch_id is None else _ACCEPTED_LIFE_SECONDS)
    ):
        return "it is too old" if age_seconds > 0 else "it is from the future; see to this machine's clock"
    for index, photo in record.arrived.items():
        if read_photo(request.photos[index]).sha256 != photo.sha256:
            return f"{request.photos[index]} was changed since"
    return None


def _explain_no_journal(error: OSError | RuntimeError) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"no journal can be kept in {_name_folder()} ({reason}): if this run is cut off, it cannot be gone on with"


def _name_folder() -> str:
    try:
        return str(state_folder())
    except RuntimeError:
        return "~/.local/state/restage"
