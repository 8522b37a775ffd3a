"""Calls the API and the store for one owner, and insists: servers that are in trouble come back."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import httpx

from tests.chaos.history import History

# What clients may be answered while a server is in trouble: try again.
_AGAIN: Final = frozenset({408, 429, 503})
_FINE: Final = frozenset({200, 201, 204, 207, 307, 404, 409})
_LONGEST_WAIT_SECONDS: Final = 1.0
# A stream says something at least every 15 s.
_SILENCE_SECONDS: Final = 20.0


class GaveUp(Exception):
    """Raised when a client has had no answer, or has seen no end, for longer than the run may last."""


class Caller:
    """Makes an owner's calls, for one thread.

    Args:
        name: in the history.
        owner: whose key it has.
        key: for the API.
        urls: of the APIs; it goes to another where one does not answer.

    Attributes:
        give_up_at: when it insists no longer, by the monotonic clock.
    """

    def __init__(self, name: str, owner: str, key: str, urls: Sequence[str], *, history: History) -> None:
        self.name = name
        self.owner = owner
        self.give_up_at = float("inf")
        self._urls = [*urls]
        self._history = history
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(headers=headers, trust_env=False, timeout=10)
        self._store = httpx.Client(trust_env=False, timeout=10)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._store.close()

    def read(self, batch_id: str) -> dict[str, Any]:
        """Return a batch as it is now.

        Raises:
            GaveUp: it is not known any more.
        """
        answer = self.call("GET", f"/v1/batches/{batch_id}")
        if answer.status_code != 200:
            raise GaveUp(f"batch {batch_id} is answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()

    def look_at_lists(self) -> tuple[list[str], list[str]]:
        """Read all of the owner's lists, and note what they show: ids of batches, and of jobs."""
        batch_ids = [one["id"] for one in self._pages("/v1/batches")]
        jobs = [*self._pages("/v1/jobs")]
        self._history.add("listed", owner=self.owner, batch_ids=batch_ids, job_ids=[one["id"] for one in jobs])
        return batch_ids, [one["id"] for one in jobs]

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request until there is an answer that is final.

        Raises:
            GaveUp: there is none when the run is over.
        """
        while time.monotonic() < self.give_up_at:
            try:
                answer = self._http.request(method, self._urls[0] + path, **options)
            except httpx.TransportError:
                self._wait(0.2)
                continue
            if answer.status_code not in _AGAIN:
                if answer.status_code not in _FINE:
                    self._note_odd(path, answer)
                return answer
            if "retry-after" not in answer.headers:
                self._note_odd(path, answer)
            self._wait(min(float(answer.headers.get("retry-after", 1)), _LONGEST_WAIT_SECONDS))
        raise GaveUp(f"no answer to {method} {path}")

    def events(self, batch_id: str, last_event_id: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield `(id, type, data)` of a stream until it ends or the run is over; the id is "" where an event has none.

        An answer that there is nothing more is the event `nothing.more`.

        Raises:
            httpx.TransportError: it broke.
        """
        headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        url = f"{self._urls[0]}/v1/batches/{batch_id}/events"
        with self._http.stream("GET", url, headers=headers, timeout=_SILENCE_SECONDS) as response:
            if response.status_code == 204:
                yield last_event_id or "", "nothing.more", {}
            if response.status_code != 200:
                return
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if time.monotonic() > self.give_up_at:  # comments alone would come for ever
                    return
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                if not line:
                    if "data" in fields:
                        yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
                    fields = {}

    def all_events(self, batch_id: str) -> list[tuple[str, str, dict[str, Any]]]:
        """Return all events that the ledger has told of a batch that is over, from its beginning.

        Raises:
            GaveUp: the API does not tell them when the run is over.
        """
        while time.monotonic() < self.give_up_at:
            try:
                told = [event for event in self.events(batch_id, "0-0") if event[0]]
            except httpx.TransportError:
                continue
            if told:
                return told
            self._wait(0.2)
        raise GaveUp(f"the events of batch {batch_id} are not told")

    @staticmethod
    def digest(data: bytes) -> str:
        """Return the digest by which results are known."""
        return hashlib.sha256(data).hexdigest()

    def fetch(self, url: str) -> bytes | None:
        """Download an object, or return None where the store has none.

        Raises:
            GaveUp: the store does not answer.
        """
        while time.monotonic() < self.give_up_at:
            try:
                answer = self._store.get(url)
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if answer.status_code in {200, 404}:
                return answer.content if answer.is_success else None
            time.sleep(0.2)
        raise GaveUp("the store does not answer")

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)
        self._urls.append(self._urls.pop(0))

    def _note_odd(self, path: str, answer: httpx.Response) -> None:
        self._history.add("answer.odd", client=self.name, path=path, status=answer.status_code, text=answer.text[:1000])

    def _pages(self, path: str) -> Iterator[dict[str, Any]]:
        cursor = ""
        while cursor is not None:
            page = self.call("GET", f"{path}?limit=100" + (f"&cursor={cursor}" if cursor else "")).json()
            yield from page["data"]
            cursor = page["next_cursor"]
