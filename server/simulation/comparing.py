"""Simulations side by side: with placement, with any model on any worker, and against the offline optimum."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.jobs import Priority
from server.simulation.fleet import Fleet
from server.simulation.optimum import find_optimum
from server.simulation.simulating import Simulation
from server.simulation.trace import (
    PUBLISHED_LOAD,
    PUBLISHED_SEED,
    TWO_MODELS,
    FleetModel,
    Submission,
    Traffic,
    arrivals,
    mean_job_seconds,
    two_model_trace,
)

# Of the published trace: when a model starves, and how long no job of either schedule may wait.
PUBLISHED_MAX_WAIT_SECONDS = 300.0
PUBLISHED_BOUND_SECONDS = 600.0


def traffic_at(load: float, fleet: Fleet, traffic: Traffic) -> Traffic:
    """Let as much come in as keeps this share of all devices busy, loads not counted."""
    return replace(traffic, jobs_per_second=load * fleet.num_workers / mean_job_seconds(fleet.models))


def simulate(fleet: Fleet, traffic: Traffic, seed: int, *, any_model: bool = False) -> dict[str, Any]:
    """Return the figures of one simulation."""
    submissions = arrivals(fleet.models, traffic, seed)
    return Simulation(fleet, submissions, any_model=any_model, seed=seed).run().figures()


def waits_beside_many(
    num_workers: int, *, num_jobs: int = 10_000, num_photos: int = 5, job_seconds: float = 10.0, any_model: bool = False
) -> list[float]:
    """Return how long each photo of an owner waits who comes when another owner has sent many, in seconds.

    Args:
        num_workers: of one model, which is in memory.
        num_jobs: of the other owner, all sent at once.
        num_photos: of the one who comes a while later.
        job_seconds: of every job.
        any_model: jobs go by age alone, whoever sent them.
    """
    fleet = Fleet(num_workers, (FleetModel("a", 1.0, job_seconds, 0.0),))
    trace = [
        Submission(at_seconds, owner, "a", Priority.NORMAL, (job_seconds,) * count)
        for at_seconds, owner, count in ((0.0, "many", num_jobs), (2.5 * job_seconds, "few", num_photos))
    ]
    return sorted(Simulation(fleet, trace, any_model=any_model).run().owner_waits_seconds["few"])


@dataclass(frozen=True)
class AgainstOptimum:
    """One trace of two models on one device.

    Attributes:
        seed: of the trace.
        mean_seconds: from submission to end, on average, with placement.
        optimum_seconds: likewise, by the offline optimum.
        optimum_without_foresight_seconds: likewise, where no model is loaded before a job of it has come.
        longest_wait_seconds: of any job, with placement.
        num_loads: with placement.
        optimum_num_loads: by the offline optimum.
        end_ratio: when the last job ended, over when it does in the optimum.
    """

    seed: int
    mean_seconds: float
    optimum_seconds: float
    optimum_without_foresight_seconds: float
    longest_wait_seconds: float
    num_loads: int
    optimum_num_loads: int
    end_ratio: float

    @property
    def ratio(self) -> float:
        """How much longer jobs take than at best."""
        return self.mean_seconds / self.optimum_seconds

    @property
    def ratio_without_foresight(self) -> float:
        """How much longer than at best without loading what has not been asked for."""
        return self.mean_seconds / self.optimum_without_foresight_seconds


def against_optimum(
    seed: int = PUBLISHED_SEED,
    *,
    load: float = PUBLISHED_LOAD,
    load_seconds: float = TWO_MODELS[0].load_seconds,
    max_wait_seconds: float = PUBLISHED_MAX_WAIT_SECONDS,
    bound_seconds: float = PUBLISHED_BOUND_SECONDS,
    num_jobs: int = 1000,
) -> AgainstOptimum | None:
    """Run one trace with placement, and find out what could be done at best.

    Args:
        seed: of the trace.
        load: share of the device's time that the jobs take.
        load_seconds: of either model.
        max_wait_seconds: given to placement.
        bound_seconds: no job may wait longer in the optimum, nor with placement.
        num_jobs: of the trace.

    Returns:
        None where a job waited longer than `bound_seconds` with placement: nothing could be compared.
    """
    models = tuple(replace(one, load_seconds=load_seconds) for one in TWO_MODELS)
    trace = two_model_trace(seed, load=load, models=models, num_jobs=num_jobs)
    outcome = Simulation(Fleet(1, models, max_wait_seconds=max_wait_seconds), trace).run()
    longest_wait = max(outcome.waits_seconds[Priority.NORMAL])
    if longest_wait > bound_seconds:
        return None
    ids = (models[0].id, models[1].id)
    best, cautious = (
        find_optimum(
            trace,
            ids,
            load_seconds,
            max_wait_seconds=bound_seconds,
            at_most_seconds=outcome.in_system_seconds,
            loads_ahead=loads_ahead,
        )
        for loads_ahead in (True, False)
    )
    if best is None or cautious is None:
        return None
    return AgainstOptimum(
        seed,
        outcome.in_system_seconds / num_jobs,
        best.in_system_seconds / num_jobs,
        cautious.in_system_seconds / num_jobs,
        longest_wait,
        outcome.num_loads,
        best.num_loads,
        outcome.end_seconds / best.end_seconds,
    )


def highest_load(fleet: Fleet, traffic: Traffic, loads: Sequence[float], *, p95_seconds: float, seed: int) -> float:
    """Find how busy a fleet may be kept while 95 % of its jobs begin within `p95_seconds`; 0 where not even the least.

    Args:
        fleet: what there is.
        traffic: its rate is replaced.
        loads: to try, rising.
        p95_seconds: what the wait of 95 % of all jobs must not exceed.
        seed: of the traces.
    """
    best = 0.0
    for load in loads:
        figures = simulate(fleet, traffic_at(load, fleet, traffic), seed)
        if figures["waits"]["all"]["p95_seconds"] > p95_seconds:
            break
        best = load
    return best


def example_models() -> tuple[FleetModel, ...]:
    """Return three models as an operator may have them: sizes of published weights, times that nobody has measured."""
    gb = 10**9
    return (
        FleetModel("qwen-image-edit-2511", 0.6, 10.0, 20.0, 57_700_000_000, 6 * gb),
        FleetModel("flux-kontext-dev", 0.3, 10.0, 12.0, 33_700_000_000, 5 * gb),
        FleetModel("flux2-klein-4b", 0.1, 2.0, 6.0, 16 * gb, 4 * gb),
    )
