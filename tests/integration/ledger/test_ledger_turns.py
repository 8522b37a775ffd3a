"""Whose turn it is: priorities, owners in turn over models and workers, and what a claim costs."""

import random
import uuid
from collections import defaultdict
from typing import Any

import pytest

HOUR_MICROSECONDS = 3_600_000_000


def claim_owner(ledger: Any, models: list[str], worker_id: str = "w1") -> str:
    """Claim a job and tell whose it is."""
    return ledger.claim(models, worker_id).owner


def test_higher_priorities_go_first(ledger: Any) -> None:
    """A younger `high` job passes every `normal` one, and `low` waits for both, whatever the model."""
    ledger.accept("b1", ["qwen"], priority="low")
    ledger.accept("b2", ["qwen"], priority="normal")
    ledger.accept("b3", ["flux"], priority="high")
    claimed = [ledger.claim(["qwen", "flux"]).id for _ in range(3)]
    assert claimed == ["b3-0", "b2-0", "b1-0"]


def test_owners_take_turns_and_keep_their_own_order(ledger: Any) -> None:
    """A big batch does not hold up a small one that comes later; within an owner the oldest job goes first."""
    ledger.accept("big", ["qwen"] * 6, owner="ana")
    ledger.accept("small", ["qwen"] * 2, owner="bo")
    ledger.accept("late", ["qwen"], owner="cy")
    claimed = [ledger.claim(["qwen"]).id for _ in range(9)]
    assert claimed == ["big-0", "small-0", "late-0", "big-1", "small-1", "big-2", "big-3", "big-4", "big-5"]


def test_a_worker_of_several_models_serves_the_owners_in_turn(ledger: Any) -> None:
    """An owner with jobs for two models gets no more turns than one with jobs for one."""
    ledger.accept("b1", ["qwen", "flux"] * 3, owner="ana")
    ledger.accept("b2", ["qwen"] * 3, owner="bo")
    owners = [claim_owner(ledger, ["qwen", "flux"]) for _ in range(6)]
    assert owners == ["ana", "bo"] * 3


def test_leaving_the_line_and_coming_back_is_no_way_to_pass(ledger: Any) -> None:
    """An owner who sends jobs one by one, each after the last was taken, waits as long as everybody else."""
    ledger.accept("b1", ["qwen"] * 3, owner="ana")
    ledger.accept("b2", ["qwen"] * 3, owner="bo")
    ledger.accept("c0", ["qwen"], owner="cy")
    owners: list[str] = []
    for number in range(1, 7):
        owners.append(claim_owner(ledger, ["qwen"]))
        if owners[-1] == "cy":
            ledger.accept(f"c{number}", ["qwen"], owner="cy")
    assert owners == ["ana", "bo", "cy"] * 2


def test_a_clock_that_was_set_back_starves_nobody(ledger: Any) -> None:
    """Whoever took a place before the clock went back still gets a turn after one round of the others."""
    ledger.accept("b1", ["qwen"] * 3, owner="ana")
    # As if the clock had gone back by an hour after that.
    ledger.client.zincrby(f"{ledger.prefix}:turns:qwen:normal", HOUR_MICROSECONDS, "ana")
    ledger.accept("b2", ["flux"] * 3, owner="bo")
    owners = [claim_owner(ledger, ["qwen", "flux"]) for _ in range(6)]
    assert owners == ["bo", "ana"] * 3


@pytest.mark.parametrize("seed", range(6))
def test_nobody_is_served_twice_before_one_who_waits(ledger: Any, seed: int) -> None:
    """Among workers of the same models, with K owners waiting each gets a job after at most K - 1 claims by others.

    That is so from the moment an owner waits for one of these models, or was last served by a worker of that model,
    whatever workers of other models do in between.
    """
    draw = random.Random(seed)
    models, owners = ["flux", "kontext", "qwen"], ["ana", "bo", "cy", "di"]
    workers = {f"w{number}": draw.sample(models, draw.randint(1, 3)) for number in range(4)}
    # For each owner who waits for a model, whom each set of models has served since.
    served: dict[tuple[str, str], dict[frozenset[str], list[str]]] = {}
    waiting: dict[tuple[str, str], int] = defaultdict(int)
    num_claims = 0
    for number in range(150):
        if draw.random() < 0.35:
            owner, wanted = draw.choice(owners), draw.choices(models, k=draw.randint(1, 4))
            ledger.accept(f"b{number}", wanted, owner=owner)
            for model in wanted:
                if not waiting[owner, model]:
                    served[owner, model] = defaultdict(list)
                waiting[owner, model] += 1
            continue
        worker_id = draw.choice(sorted(workers))
        serves = workers[worker_id]
        job = ledger.worker(worker_id).claim(serves, num_held=0)
        if job is None:
            assert not any(count for (_, model), count in waiting.items() if model in serves)
            continue
        num_claims += 1
        waiting[job.owner, job.model] -= 1
        for (owner, model), count in waiting.items():
            if model in serves and owner == job.owner:
                served[owner, model] = defaultdict(list)
            elif model in serves and count:
                passed_by = served[owner, model][frozenset(serves)]
                passed_by.append(job.owner)
                assert len(set(passed_by)) == len(passed_by) < len(owners), f"{owner} waits for {model}: {passed_by}"
    assert num_claims > 50


def commands_of_a_claim(ledger: Any) -> dict[str, int]:
    """Count the commands that one claim runs inside Redis; all in one transaction, since others use this Redis too."""
    worker = ledger.worker()
    arguments = ("w1", uuid.uuid4().hex, 60_000, 0, 0, "qwen", "flux")
    with ledger.client.pipeline(transaction=True) as together:
        together.config_resetstat()
        worker._scripts["claim"](keys=worker._keys, args=arguments, client=together)
        together.info("commandstats")
        _, reply, stats = together.execute()
    assert reply[0] == "job"
    return {name: stat["calls"] for name, stat in stats.items()}


def test_a_claim_costs_the_same_whatever_waits(ledger: Any) -> None:
    """A claim runs as many commands, each at most logarithmic, with 2,000 jobs of 100 owners as with a handful."""
    for owner in ("ana", "bo"):
        ledger.accept(f"few-{owner}", ["qwen", "qwen", "flux"], owner=owner)
    ledger.claim(["qwen", "flux"])
    few = commands_of_a_claim(ledger)
    for number in range(100):
        ledger.accept(f"b{number}", ["qwen", "flux"] * 10, owner=f"owner-{number}")
    # Those of the handful who come first are served, so that again somebody's first job is next.
    assert [claim_owner(ledger, ["qwen", "flux"]) for _ in range(2)] == ["ana", "bo"]
    assert commands_of_a_claim(ledger) == few
    # None of them reads a whole line.
    assert not set(few) & {
        "cmdstat_keys",
        "cmdstat_smembers",
        "cmdstat_lrange",
        "cmdstat_zrangebyscore",
        "cmdstat_sort",
    }


def test_a_submission_is_one_round_trip(ledger: Any) -> None:
    """Fifty photos with an idempotency key are accepted by a single command."""
    batch = ledger.batch("b1", ["qwen"] * 50)
    ledger.announce_uploads(batch)
    # The script is loaded and the connections are open.
    ledger.accept("warm", ["qwen"])
    ledger.raw_client.ping()
    with ledger.client.monitor() as monitor:
        ledger.submit(batch)
        ledger.raw_client.echo("end")
        sent = []
        for seen in monitor.listen():
            if seen["command"].startswith("ECHO"):
                break
            if seen["client_type"] != "lua":
                sent.append(seen["command"].split()[0])
    assert sent == ["EVALSHA"]
