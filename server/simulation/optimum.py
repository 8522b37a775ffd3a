"""What could be done at best with two models on one device by somebody who knows all that will come: the yardstick."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from operator import itemgetter
from typing import NamedTuple

from server.simulation.trace import Submission


@dataclass(frozen=True)
class Optimum:
    """The best schedule.

    Attributes:
        in_system_seconds: over all jobs, from submission to the end: what is made least.
        num_loads: of models; the first model is there at the start.
        end_seconds: when its last job ends.
    """

    in_system_seconds: float
    num_loads: int
    end_seconds: float


class _Label(NamedTuple):
    """One way to have done so many jobs of each model: when it is done, what it cost, how many loads it took."""

    at: float
    cost: float
    num_loads: int


def find_optimum(
    submissions: Sequence[Submission],
    models: tuple[str, str],
    load_seconds: float,
    *,
    max_wait_seconds: float = inf,
    at_most_seconds: float = inf,
    loads_ahead: bool = True,
) -> Optimum | None:
    """Find the schedule with the least time from submission to end, summed over all jobs.

    Exact for one device that holds one of two models and takes one job at a time to its end, the jobs of a model in the
    order in which they came. For each number of jobs done of either model and each model in memory, all schedules are
    kept that no other beats in both time and cost.

    Args:
        submissions: by time.
        models: the two; the first is in memory at the start.
        load_seconds: of either model.
        max_wait_seconds: no job may wait longer from submission until its run begins.
        at_most_seconds: the cost of a schedule that is known; only makes the search faster.
        loads_ahead: whether a model may be loaded before a job of it has come: no one without a crystal ball would.

    Returns:
        None where no schedule keeps the bounds.
    """
    search = _Search(submissions, models, load_seconds, max_wait_seconds, at_most_seconds, loads_ahead=loads_ahead)
    layer = {(0, 0): [_Label(0.0, 0.0, 0)]}
    for num_done in range(search.num_jobs):
        found: dict[tuple[int, int], list[_Label]] = defaultdict(list)
        for (num_first, model), labels in layer.items():
            for label in labels:
                for place, longer in search.extend((num_first, num_done - num_first), model, label):
                    found[place].append(longer)
        layer = {place: _unbeaten(labels) for place, labels in found.items()}
    last = [label for labels in layer.values() for label in labels]
    if not last:
        return None
    best = min(last, key=itemgetter(1))
    return Optimum(best.cost, best.num_loads, best.at)


def _unbeaten(labels: list[_Label]) -> list[_Label]:
    labels.sort()
    kept: list[_Label] = []
    for label in labels:
        if not kept or label.cost < kept[-1].cost:
            kept.append(label)
    return kept


class _Search:
    """One search: the jobs of both models, and what is left out."""

    def __init__(
        self,
        submissions: Sequence[Submission],
        models: tuple[str, str],
        load_seconds: float,
        max_wait_seconds: float,
        at_most_seconds: float,
        *,
        loads_ahead: bool,
    ) -> None:
        jobs = [
            [(one.at_seconds, seconds) for one in submissions if one.model == model for seconds in one.job_seconds]
            for model in models
        ]
        self._at = [[at for at, _ in of_model] for of_model in jobs]
        self._seconds = [[seconds for _, seconds in of_model] for of_model in jobs]
        # The first so many submission times, summed.
        self._at_sums = [list(accumulate(times, initial=0.0)) for times in self._at]
        self._work_sums = [list(accumulate(seconds, initial=0.0)) for seconds in self._seconds]
        self._shortest = min((seconds for of_model in self._seconds for seconds in of_model), default=0.0)
        self._load_seconds = load_seconds
        self._max_wait_seconds = max_wait_seconds
        self._at_most_seconds = at_most_seconds * (1 + 1e-9)
        self._loads_ahead = loads_ahead
        self.num_jobs = sum(map(len, self._at))

    def extend(self, num_done: tuple[int, int], model: int, label: _Label) -> Iterator[tuple[tuple[int, int], _Label]]:
        """Yield the schedules with one more job, of either model."""
        if label.cost + self._least_cost(num_done, label.at) > self._at_most_seconds:
            return
        for wanted in (0, 1):
            if num_done[wanted] == len(self._at[wanted]):
                continue
            submitted, seconds = self._at[wanted][num_done[wanted]], self._seconds[wanted][num_done[wanted]]
            if wanted == model:
                start = max(label.at, submitted)
            elif self._loads_ahead:
                start = max(label.at + self._load_seconds, submitted)
            else:
                start = max(label.at, submitted) + self._load_seconds
            if start - submitted <= self._max_wait_seconds:
                end = start + seconds
                longer = _Label(end, label.cost + end - submitted, label.num_loads + (wanted != model))
                yield (num_done[0] + (wanted == 0), wanted), longer

    def _least_cost(self, num_done: tuple[int, int], at: float) -> float:
        """What the other jobs cost at least: those that wait now one after the other, those to come their run."""
        cost, num_waiting = 0.0, 0
        for model in (0, 1):
            done = num_done[model]
            came = max(done, bisect_right(self._at[model], at))
            num_waiting += came - done
            cost += (came - done) * at - (self._at_sums[model][came] - self._at_sums[model][done])
            cost += self._work_sums[model][-1] - self._work_sums[model][done]
        return cost + self._shortest * num_waiting * (num_waiting - 1) / 2
