"""Simulate a fleet of GPUs: how long jobs wait, how often models are loaded, how many GPUs so many photos need.

`python scripts/simulate_fleet.py` runs every part; no GPU, server or worker is needed, since time is virtual. What a
job and a load take on a GPU is an assumption that the options change. The parts:

- fleet: one fleet and trace, with placement and with any model on any worker
- sizes: how busy fleets of several sizes may be kept
- waits: what `worker.max_wait_seconds` costs on one device
- owners: how long a few photos wait beside ten thousand of another owner
- optimum: the published trace of two models on one device, against the best that could be done
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from bench_report import Figure, Target, as_markdown
from simulation_tables import WAIT_COLUMNS, row, spread, table

from server.simulation.comparing import (
    PUBLISHED_MAX_WAIT_SECONDS,
    AgainstOptimum,
    against_optimum,
    example_models,
    highest_load,
    simulate,
    traffic_at,
    waits_beside_many,
)
from server.simulation.fleet import Failures, Fleet
from server.simulation.trace import (
    PUBLISHED_LOAD,
    PUBLISHED_SEED,
    TWO_MODELS,
    FleetModel,
    Shape,
    Traffic,
    mean_job_seconds,
)

PARTS = ("fleet", "sizes", "waits", "owners", "optimum")
SIZES = (1, 2, 4, 8, 16, 32, 64)
LOADS = tuple(share / 100 for share in range(10, 100, 5))
OWNERS_SIZES = (1, 4, 16)
OTHER_SEEDS = range(PUBLISHED_SEED + 1, PUBLISHED_SEED + 21)
OPTIMUM_LOADS = (0.2, 0.4, 0.6, 0.7, 0.8)
OPTIMUM_LOADS_SECONDS = (10.0, 20.0, 30.0)
MAX_WAITS_SECONDS = (60.0, 120.0, 300.0, 600.0)
TARGET = Target("at most", 1.2)
_GIB = 2**30


def main() -> int:
    """Simulate, print, and write what was asked for."""
    options = read_options()
    start = time.monotonic()
    found: dict[str, Any] = {}
    for part in options.only:
        print(f"\n## {part}", flush=True)
        found[part] = _MEASURES[part](options)
    print(f"\ntook {time.monotonic() - start:.0f} s")
    if options.json:
        run = {name: value for name, value in vars(options).items() if name not in {"json", "plot", "model"}}
        run["models"] = [vars(model) for model in models_of(options)]
        options.json.write_text(json.dumps({"run": run, "found": found}, indent=2) + "\n")
    if options.plot:
        from simulation_plot import draw  # noqa: PLC0415 (matplotlib is only needed here)

        draw(found, options.plot)
    return 0


def simulate_one(options: argparse.Namespace) -> dict[str, Any]:
    """One fleet and trace, both ways."""
    fleet, traffic = fleet_of(options, options.workers), traffic_of(options)
    traffic = traffic_at(options.load, fleet, traffic)
    found = {}
    for name, any_model in (("placement", False), ("any model", True)):
        start = time.monotonic()
        figures = simulate(fleet, traffic, options.seed, any_model=any_model)
        found[name] = figures
        print(f"{name}: simulated in {time.monotonic() - start:.0f} s", flush=True)
    print(
        f"\n{fleet.num_workers} GPUs, {traffic.num_jobs} jobs ({traffic.shape}), "
        f"{traffic.jobs_per_second * 3600:.0f} an hour: {options.load:.0%} of what the GPUs could do without loads\n"
    )
    rows = [(name, *row(figures)) for name, figures in found.items()]
    print(table(("", "jobs an hour", "busy", "loading", "loads", "in system, mean", *WAIT_COLUMNS), rows))
    return found


def simulate_sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """How busy fleets of several sizes may be kept while nearly all jobs begin soon; and if memory held all models."""
    found: list[dict[str, Any]] = []
    for num_workers in SIZES:
        fleet = fleet_of(options, num_workers)
        traffic = Traffic(max(4000, 200 * num_workers), 1.0, shape=options.shape)
        load, load_if_all_fit = (
            highest_load(one, traffic, LOADS, p95_seconds=options.p95, seed=options.seed)
            for one in (fleet, replace(fleet, max_models=None, budget_bytes=None))
        )
        per_hour = load * num_workers * 3600 / mean_job_seconds(fleet.models)
        found.append(
            {"num_workers": num_workers, "load": load, "load_if_all_fit": load_if_all_fit, "jobs_per_hour": per_hour}
        )
        print(f"{num_workers} GPUs: {load:.0%}", flush=True)
    rows = [
        (one["num_workers"], f"{one['load']:.0%}", f"{one['load_if_all_fit']:.0%}", f"{one['jobs_per_hour']:.0f}")
        for one in found
    ]
    columns = ("GPUs", f"busy with 95 % of waits under {options.p95:g} s", "if all models fitted", "jobs an hour")
    print("\n" + table(columns, rows))
    return found


def simulate_waits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the bound on starving costs one device that is kept busy with two models."""
    traffic = Traffic(5000, PUBLISHED_LOAD / mean_job_seconds(TWO_MODELS), max_batch=1, spread=0.0)
    found = [
        {"max_wait_seconds": wait, **simulate(Fleet(1, TWO_MODELS, max_wait_seconds=wait), traffic, options.seed)}
        for wait in MAX_WAITS_SECONDS
    ]
    rows = [(f"{one['max_wait_seconds']:g} s", *row(one)) for one in found]
    columns = ("max_wait_seconds", "jobs an hour", "busy", "loading", "loads", "in system, mean", *WAIT_COLUMNS)
    print(table(columns, rows))
    return found


def simulate_owners(_options: argparse.Namespace) -> list[dict[str, Any]]:
    """How long five photos wait that come when another owner has sent ten thousand: in turns, and by age alone."""
    found = [
        {
            "num_workers": num_workers,
            "in_turns_seconds": waits_beside_many(num_workers),
            "by_age_seconds": waits_beside_many(num_workers, any_model=True),
        }
        for num_workers in OWNERS_SIZES
    ]
    rows = [
        (
            one["num_workers"],
            *(f"{one[name][place]:,.0f} s" for name in ("in_turns_seconds", "by_age_seconds") for place in (0, -1)),
        )
        for one in found
    ]
    print(table(("GPUs", "in turns: the first of five", "the last", "by age: the first", "the last"), rows))
    return found


def compare_with_optimum(options: argparse.Namespace) -> dict[str, Any]:
    """The published trace, twenty others, and other loads."""
    published = against_optimum()
    others = [against_optimum(seed) for seed in OTHER_SEEDS]
    if published is None:
        raise SystemExit("simulate_fleet: on the published trace a job waited longer than the comparison allows")
    print(as_markdown(_optimum_figures(published, [one for one in others if one])))
    tables = [
        {
            "load": load,
            "load_seconds": load_seconds,
            "found": [
                vars(one) | {"ratio": one.ratio, "ratio_without_foresight": one.ratio_without_foresight}
                for seed in range(PUBLISHED_SEED, PUBLISHED_SEED + options.seeds)
                if (one := against_optimum(seed, load=load, load_seconds=load_seconds, bound_seconds=1200.0))
            ],
        }
        for load in OPTIMUM_LOADS
        for load_seconds in OPTIMUM_LOADS_SECONDS
    ]
    rows = [
        (
            f"{one['load']:.0%}",
            f"{one['load_seconds']:g} s",
            spread([each["ratio"] for each in one["found"]]),
            spread([each["ratio_without_foresight"] for each in one["found"]]),
        )
        for one in tables
    ]
    print(
        "\n" + table(("busy", "a load", "time in system over the optimum", "over the optimum without foresight"), rows)
    )
    return {
        "published": vars(published) | {"ratio": published.ratio},
        "others": [one and vars(one) | {"ratio": one.ratio} for one in others],
        "tables": tables,
    }


def _optimum_figures(published: AgainstOptimum, others: Sequence[AgainstOptimum]) -> Iterator[Figure]:
    yield Figure(
        "swaps: 1,000 jobs of two models on one device, mean time from submission to end",
        published.ratio,
        "x the offline optimum",
        f"{published.mean_seconds:.1f} s against {published.optimum_seconds:.1f} s; loads of "
        f"{TWO_MODELS[0].load_seconds:g} s, {PUBLISHED_LOAD:.0%} busy with jobs, starving after "
        f"{PUBLISHED_MAX_WAIT_SECONDS:g} s; {published.num_loads} loads against {published.optimum_num_loads}",
        TARGET,
    )
    yield Figure(
        "the same where the optimum loads no model before a job of it has come",
        published.ratio_without_foresight,
        "x",
        f"{published.mean_seconds:.1f} s against {published.optimum_without_foresight_seconds:.1f} s",
    )
    ratios = [one.ratio for one in others]
    yield Figure(
        f"the same trace with {len(ratios)} other seeds, mean",
        sum(ratios) / len(ratios),
        "x the offline optimum",
        f"from {min(ratios):.2f} to {max(ratios):.2f}; {sum(one <= TARGET.limit for one in ratios)} within the target",
    )


def models_of(options: argparse.Namespace) -> tuple[FleetModel, ...]:
    """Return the models that were given, or the example."""
    return tuple(options.model) if options.model else example_models()


def fleet_of(options: argparse.Namespace, num_workers: int) -> Fleet:
    """Return the fleet that the options describe."""
    return Fleet(
        num_workers,
        models_of(options),
        max_models=options.max_models,
        budget_bytes=int(options.memory_gib * _GIB),
        max_wait_seconds=options.max_wait,
        failures=Failures(3600 * options.failure_hours) if options.failure_hours else None,
    )


def traffic_of(options: argparse.Namespace) -> Traffic:
    """Return the traffic that the options describe; its rate follows from the load."""
    return Traffic(
        options.jobs, 1.0, shape=options.shape, num_owners=options.owners, day_seconds=3600 * options.day_hours
    )


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=_parts, default=[*PARTS], help=f"some of {','.join(PARTS)} (default: all)")
    add("--workers", type=_count, default=100, help="GPUs of the part `fleet` (default: 100)")
    add("--jobs", type=_count, default=100_000, help="jobs of the part `fleet` (default: 100000)")
    add("--load", type=_positive, default=0.8, help="share of what the GPUs could do without loads (default: 0.8)")
    add("--shape", choices=get_args(Shape), default="poisson", help="how jobs come in (default: poisson)")
    add("--owners", type=_count, default=20, help="who send them (default: 20)")
    add("--day-hours", type=_positive, default=24.0, help="a day of `diurnal` and `shifting` (default: 24)")
    add("--max-wait", type=_positive, default=300.0, help="worker.max_wait_seconds (default: 300)")
    add("--memory-gib", type=_positive, default=80.0, help="of each GPU (default: 80)")
    add("--max-models", type=_count, default=None, help="worker.max_resident_models (default: as many as fit)")
    add("--failure-hours", type=_positive, default=None, help="each worker dies so often on average (default: never)")
    add("--p95", type=_positive, default=120.0, help="seconds, for the part `sizes` (default: 120)")
    add("--seed", type=_count, default=1, help="of traces and failures (default: 1)")
    add("--seeds", type=_count, default=5, help="traces for each line of the part `optimum` (default: 5)")
    add(
        "--model",
        type=_model,
        action="append",
        metavar="ID:SHARE:JOB_SECONDS:LOAD_SECONDS:WEIGHTS_GB",
        help="a model, to be given again for each (default: three examples)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--plot", type=Path, metavar="FILE", help="draw waits and sizes as PNG")
    options = parser.parse_args()
    models = models_of(options)
    if len({model.id for model in models}) < len(models):
        parser.error("argument --model: two models have the same id")
    longest_seconds = max(model.load_seconds + model.job_seconds for model in models)
    if options.failure_hours and 3600 * options.failure_hours < 10 * longest_seconds:
        parser.error(f"argument --failure-hours: no job would end; at least {longest_seconds / 360:.2g} is needed")
    return options


def _parts(text: str) -> list[str]:
    if unknown := [part for part in text.split(",") if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {','.join(PARTS)}")
    return text.split(",")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _model(text: str) -> FleetModel:
    parts = text.split(":")
    if len(parts) != 5 or not parts[0]:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:SHARE:JOB_SECONDS:LOAD_SECONDS:WEIGHTS_GB")
    share, job_seconds, load_seconds, weights_gb = map(_positive, parts[1:])
    return FleetModel(parts[0], share, job_seconds, load_seconds, int(weights_gb * 1e9))


_MEASURES = {
    "fleet": simulate_one,
    "sizes": simulate_sizes,
    "waits": simulate_waits,
    "owners": simulate_owners,
    "optimum": compare_with_optimum,
}

if __name__ == "__main__":
    sys.exit(main())
