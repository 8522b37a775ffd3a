"""Which worker holds which model, and that no two of them jump at the same need."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from server.ledger.status import WorkerModel, WorkerStatus


def announce(worker: Any, *resident: str, loading: str | None = None, leaving: tuple[str, ...] = ()) -> None:
    """Let a worker say which of three models it has in memory."""
    models = {model: WorkerModel(ready=True, resident=model in resident) for model in ("flux", "kontext", "qwen")}
    worker.announce(WorkerStatus(worker.worker_id, "cpu", 1, models, loading=loading, leaving=leaving))


def holders(ledger: Any, model: str) -> int:
    """Count the workers that hold a model, as somebody sees it who is none of them."""
    return ledger.worker("nobody").backlog([model]).models[model].num_others


def test_of_many_workers_that_see_the_same_need_one_moves(ledger: Any) -> None:
    """However many place a model at the same time after the same look, exactly one may; the next look shows it."""
    num_workers = 8
    workers = [ledger.worker(f"w{number}") for number in range(num_workers)]
    ready = Barrier(num_workers)
    ledger.accept("b1", ["qwen"])

    def look_and_place(worker: Any) -> bool:
        version = worker.backlog(["qwen"]).version
        ready.wait(30)
        return worker.place(version, "qwen")

    with ThreadPoolExecutor(num_workers) as pool:
        for num_placed in (1, 2, 3):
            assert sum(pool.map(look_and_place, workers)) == 1
            assert 1 <= holders(ledger, "qwen") <= num_placed


def test_a_worker_that_was_too_late_looks_again(ledger: Any) -> None:
    """A version is good for one change, whoever makes it, and a stale one changes nothing."""
    first, second = ledger.worker("w1"), ledger.worker("w2")
    version = second.backlog(["qwen"]).version
    assert first.place(version, "flux")
    assert not second.place(version, "qwen")
    assert holders(ledger, "qwen") == 0
    assert second.place(second.backlog(["qwen"]).version, "qwen")
    assert (holders(ledger, "qwen"), holders(ledger, "flux")) == (1, 1)


def test_holders_are_those_who_have_a_model_or_load_it(ledger: Any) -> None:
    """What a worker announces replaces what was known of it: what it loads counts, what leaves does not."""
    worker, other = ledger.worker("w1"), ledger.worker("w2")
    announce(worker, "qwen", "kontext")
    announce(other, "qwen")
    assert [holders(ledger, model) for model in ("flux", "kontext", "qwen")] == [0, 1, 2]
    assert worker.backlog(["qwen"]).models["qwen"].num_others == 1, "a worker is no other to itself"

    assert worker.place(worker.backlog([]).version, "flux", ["kontext", "qwen"])
    assert [holders(ledger, model) for model in ("flux", "kontext", "qwen")] == [1, 0, 1]
    announce(worker, "qwen", "kontext", loading="flux", leaving=("kontext", "qwen"))
    assert [holders(ledger, model) for model in ("flux", "kontext", "qwen")] == [1, 0, 1]
    announce(worker, "kontext", "qwen")  # the swap was withdrawn
    assert [holders(ledger, model) for model in ("flux", "kontext", "qwen")] == [0, 1, 2]


def test_a_worker_that_is_gone_holds_nothing(ledger: Any) -> None:
    """One that leaves is taken out at once, one that died when its announcements have run out."""
    left, died, lives = (ledger.worker(f"w{number}") for number in range(3))
    for worker in (left, died):
        announce(worker, "qwen")
    left.leave()
    assert holders(ledger, "qwen") == 1
    ledger.pass_time(20)
    announce(lives, "qwen")
    ledger.pass_time(20)
    assert holders(ledger, "qwen") == 1
    announce(lives)
    ledger.pass_time(20)
    assert holders(ledger, "qwen") == 0
    assert not ledger.client.keys(f"{ledger.prefix}:holders:*")


def test_the_backlog_tells_how_long_runs_take(ledger: Any) -> None:
    """Seconds of a run come from the last commits; without any they are not known."""
    ledger.accept("b1", ["qwen", "flux"])
    assert ledger.worker().backlog(["qwen"]).models["qwen"].job_seconds is None
    ledger.commit(ledger.claim(["qwen"]), speeds={"run": 12.5})
    models = ledger.worker().backlog(["qwen", "flux"]).models
    assert (models["qwen"].job_seconds, models["flux"].job_seconds) == (12.5, None)
    assert (models["qwen"].num_ready, models["flux"].num_ready) == (0, 1)


def test_an_announcement_costs_the_same_in_a_large_fleet(ledger: Any) -> None:
    """Each call looks at a few others only, and those that died are forgotten all the same."""
    workers = f"{ledger.prefix}:workers"
    ledger.client.sadd(workers, *(f"dead-{number}" for number in range(40)))
    before = ledger.client.info("commandstats").get("cmdstat_exists", {"calls": 0})["calls"]
    announce(ledger.worker("w1"), "qwen")
    looks = ledger.client.info("commandstats")["cmdstat_exists"]["calls"] - before
    assert 0 < looks <= 8
    assert 32 < ledger.client.scard(workers) < 41
    for _ in range(300):
        announce(ledger.worker("w1"), "qwen")
    assert ledger.client.smembers(workers) == {"w1"}
