"""The workers of `restage up`: a dead one is started again, and a stop lets running jobs end."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.child import Child

_POLL_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 30.0
# A worker that has run for this long had a good start: its next death counts as the first.
_SETTLED_SECONDS = 60.0
# A worker that dies twice before anything was ever served will not do better: what it says is of more use.
_MAX_DEATHS_BEFORE_SERVING = 2
# From SIGTERM to SIGKILL where no job is to be finished.
_GIVE_BACK_SECONDS = 10.0


class WorkersFailed(Exception):
    """Raised when a worker has died twice before anything was served."""


@dataclass
class _Place:
    """One worker's process and how it has fared."""

    child: Child
    num_deaths: int = 0
    started_at: float = 0.0
    restart_at: float | None = None


class WorkerCrew:
    """Worker processes, of which each that dies is started again with back-off.

    Args:
        children: not started.
        say: is given a line, or several, when a worker dies.
        job_end_seconds: how long a stop waits for running jobs.
    """

    def __init__(self, children: Sequence[Child], *, say: Callable[[str], None], job_end_seconds: float) -> None:
        self._places = [_Place(child) for child in children]
        self._say = say
        self._job_end_seconds = job_end_seconds
        self._environment: Mapping[str, str] = {}

    @property
    def is_running(self) -> bool:
        """Whether any worker runs."""
        return any(place.child.is_running for place in self._places)

    def start(self, environment: Mapping[str, str]) -> None:
        """Start every worker with this environment, which restarts get too."""
        self._environment = environment
        for place in self._places:
            self._start(place)

    def tend(self, *, has_served: bool) -> None:
        """See to each worker once; call it again and again.

        Args:
            has_served: whether a batch would have been served at any time so far.

        Raises:
            WorkersFailed: a worker died twice and `has_served` is still false.
        """
        now = time.monotonic()
        for place in self._places:
            if place.restart_at is not None:
                if now >= place.restart_at:
                    self._start(place)
            elif not place.child.is_running:
                self._note_death(place, now, has_served=has_served)

    def stop(self, count_signals: Callable[[], int], *, may_finish: bool) -> None:
        """End all workers: SIGTERM, which lets running jobs end; SIGTERM again, which gives them back; SIGKILL.

        Args:
            count_signals: how often the operator has asked so far; each further time goes on to the next step.
            may_finish: when false, running jobs are not waited for.
        """
        for patience_seconds in (self._job_end_seconds if may_finish else _POLL_SECONDS, _GIVE_BACK_SECONDS):
            if not self.is_running:
                break
            for place in self._places:
                place.child.send_signal(signal.SIGTERM)
            num_signals = count_signals()
            deadline = time.monotonic() + patience_seconds
            while self.is_running and time.monotonic() < deadline and count_signals() == num_signals:
                time.sleep(_POLL_SECONDS)
        for place in self._places:
            place.child.kill_group()

    def _start(self, place: _Place) -> None:
        place.child.start(self._environment)
        place.started_at = time.monotonic()
        place.restart_at = None

    def _note_death(self, place: _Place, now: float, *, has_served: bool) -> None:
        child = place.child
        child.kill_group()  # what it started must not outlive it
        settled = now - place.started_at > _SETTLED_SECONDS
        place.num_deaths = 1 if settled else place.num_deaths + 1
        end = f"ended with status {child.poll()}"
        if not has_served and place.num_deaths >= _MAX_DEATHS_BEFORE_SERVING:
            raise WorkersFailed(child.describe_end(f"{end} again, before anything was served"))
        delay_seconds = min(2.0 ** (place.num_deaths - 1), _MAX_BACKOFF_SECONDS)
        place.restart_at = now + delay_seconds
        self._say(child.describe_end(f"{end} and is started again in {delay_seconds:g} s"))
