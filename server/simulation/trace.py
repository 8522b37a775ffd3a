"""What a simulated fleet is asked for: seeded arrivals of batches, from a steady trickle to a day with its rush."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from server.jobs import Priority

Shape = Literal["poisson", "diurnal", "bursts", "shifting"]
# How much of the traffic has which priority where nothing else is said.
PRIORITY_SHARES = {Priority.HIGH: 0.05, Priority.NORMAL: 0.8, Priority.LOW: 0.15}
# At the top of a day's rush so many times the average comes in, at night as much less.
RUSH = 1.8
BURST_JOBS = 50


@dataclass(frozen=True)
class FleetModel:
    """One model of a simulated fleet.

    Attributes:
        id: its name.
        share: of all jobs; shares are relative to each other.
        job_seconds: a job takes so long on average.
        load_seconds: loading it takes so long.
        weights_bytes: of its weights; 0 where only the number of models bounds what fits.
        activation_bytes: of a run.
    """

    id: str
    share: float
    job_seconds: float
    load_seconds: float
    weights_bytes: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True)
class Submission:
    """A batch: when it comes, whose it is, and for how long each of its jobs will be on a device."""

    at_seconds: float
    owner: str
    model: str
    priority: Priority
    job_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Traffic:
    """How jobs come in.

    Attributes:
        num_jobs: all in all.
        jobs_per_second: on average.
        shape: `poisson`: batches of a few, at random; `diurnal`: the same with a rush each day; `bursts`: batches of
            `BURST_JOBS` among single jobs, half of all jobs each; `shifting`: the models' shares go round among them,
            four times a day.
        num_owners: who send them; the first send most.
        max_batch: jobs of a batch outside bursts, at most.
        spread: of the time that a job takes, around the average of its model; 0: all alike.
        day_seconds: how long a day is.
    """

    num_jobs: int
    jobs_per_second: float
    shape: Shape = "poisson"
    num_owners: int = 20
    max_batch: int = 8
    spread: float = 0.2
    day_seconds: float = 86_400.0


def arrivals(models: Sequence[FleetModel], traffic: Traffic, seed: int) -> Iterator[Submission]:
    """Yield batches by time; the same seed gives the same."""
    draw = random.Random(seed)  # noqa: S311 (a simulation)
    shares = [model.share for model in models]
    owners = [f"owner-{number}" for number in range(traffic.num_owners)]
    owner_shares = [1 / (number + 1) for number in range(traffic.num_owners)]
    at_seconds, num_left = 0.0, traffic.num_jobs
    while num_left > 0:
        num_jobs = min(num_left, _batch_size(draw, traffic))
        at_seconds += _gap_seconds(draw, traffic, at_seconds)
        turn = int(4 * at_seconds / traffic.day_seconds) if traffic.shape == "shifting" else 0
        model = draw.choices(models, _turned(shares, turn))[0]
        low, high = model.job_seconds * (1 - traffic.spread), model.job_seconds * (1 + traffic.spread)
        yield Submission(
            at_seconds,
            draw.choices(owners, owner_shares)[0],
            model.id,
            draw.choices(tuple(PRIORITY_SHARES), tuple(PRIORITY_SHARES.values()))[0],
            tuple(draw.uniform(low, high) for _ in range(num_jobs)),
        )
        num_left -= num_jobs


def mean_job_seconds(models: Sequence[FleetModel]) -> float:
    """Return what an average job takes."""
    return sum(one.share * one.job_seconds for one in models) / sum(one.share for one in models)


def _turned(shares: Sequence[float], turn: int) -> Sequence[float]:
    turn %= len(shares)
    return [*shares[turn:], *shares[:turn]]


def _batch_size(draw: random.Random, traffic: Traffic) -> int:
    if traffic.shape != "bursts":
        return draw.randint(1, traffic.max_batch)
    # As many jobs come in bursts as one by one.
    return BURST_JOBS if draw.random() < 1 / (1 + BURST_JOBS) else 1


def _gap_seconds(draw: random.Random, traffic: Traffic, at_seconds: float) -> float:
    mean_jobs = (1 + traffic.max_batch) / 2 if traffic.shape != "bursts" else 2 * BURST_JOBS / (1 + BURST_JOBS)
    rate = traffic.jobs_per_second / mean_jobs
    if traffic.shape == "diurnal":
        rate *= 1 + (RUSH - 1) * math.sin(2 * math.pi * at_seconds / traffic.day_seconds)
    return draw.expovariate(rate)


# The published trace of two models on one device. Its jobs come one by one and are all alike, so that the offline
# optimum, which knows nothing of owners and priorities, may choose as freely as the device.
TWO_MODELS = (
    FleetModel("a", share=0.6, job_seconds=10.0, load_seconds=20.0),
    FleetModel("b", share=0.4, job_seconds=10.0, load_seconds=20.0),
)
PUBLISHED_LOAD = 0.8
PUBLISHED_SEED = 1


def two_model_trace(
    seed: int = PUBLISHED_SEED,
    *,
    load: float = PUBLISHED_LOAD,
    models: Sequence[FleetModel] = TWO_MODELS,
    num_jobs: int = 1000,
) -> list[Submission]:
    """Return jobs one by one, at a share of what one device could do if it never had to load.

    Args:
        seed: of the times and models.
        load: that share.
        models: two, the first of which is in memory at the start.
        num_jobs: how many.
    """
    traffic = Traffic(num_jobs, load / mean_job_seconds(models), num_owners=1, max_batch=1, spread=0.0)
    return [replace(one, priority=Priority.NORMAL) for one in arrivals(models, traffic, seed)]
