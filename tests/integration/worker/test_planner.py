"""Planners on one real ledger: one of them loads what all see waiting, and gives it up when nothing waits any more."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from server.errors import LedgerUnavailable
from server.ledger.status import WorkerStatus
from server.ledger.worker_side import WorkerLedger, connect
from tests.integration.worker.lane_kit import LaneKit

QWEN, FLUX, KLEIN = "tiny-qwen-image-edit-2511", "tiny-flux-kontext", "tiny-flux2-klein"


class PlannerKit:
    """A planner with a real ledger and a real, small memory; what it asks of the lane is only noted."""

    def __init__(self, workers, worker_id, **settings):
        from server.worker.planner import Planner

        self.lane_kit = LaneKit(workers, **{"max_resident_models": 1, "poll_seconds": 0.001} | settings)
        self.residency, self.hand = self.lane_kit.residency, self.lane_kit.hand
        self.ledger = WorkerLedger(
            connect(workers.settings.redis), worker_id=worker_id, key_prefix=workers.prefix, lease_seconds=60
        )
        self.swaps, self.checks = [], []
        self.planner = Planner(
            self.ledger,
            self.hand,
            self.residency,
            settings=self.lane_kit.settings,
            request_swap=self.swaps.append,
            request_check=self.checks.append,
            on_change=self.announce,
        )
        self.residency.check_all()
        self.residency.preload()
        self.announce()

    def announce(self):
        """Say what is in memory, and what comes and leaves."""
        status = {"models": self.residency.statuses(), "loading": self.loading, "leaving": self.leaving}
        self.ledger.announce(WorkerStatus(self.ledger.worker_id, "cpu", 1, **status))

    @property
    def loading(self):
        """Tell which model comes."""
        return self.planner.decided and self.planner.decided.load

    @property
    def leaving(self):
        """Tell which models go."""
        return self.planner.decided.evict if self.planner.decided else ()

    def num_others(self, model):
        """Count the other workers that hold a model."""
        return self.ledger.backlog([model]).models[model].num_others


@pytest.fixture
def workers(new_workers, valkey):
    """Give a ledger and a registry of three models."""
    return new_workers(valkey.url, RESTAGE__MODELS__ENABLED=json.dumps([QWEN, FLUX, KLEIN]))


def test_of_planners_that_race_one_loads_what_waits(workers):
    """One short job waits, and two idle workers see it at the same moment: one changes its model, the other stays."""
    kits = [PlannerKit(workers, worker_id) for worker_id in ("w1", "w2")]
    photo = workers.upload(workers.picture())
    for model in (FLUX, KLEIN, FLUX, KLEIN):
        workers._client.hset(f"{workers.prefix}:speed:{model}", "run", "0.001")
        _, job_id = workers.submit(workers.job(photo, model))
        together = Barrier(2)

        def plan(kit, together=together):
            together.wait(30)
            kit.planner.plan()

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(plan, kits))
        ((winner, swap),) = [(kit, swap) for kit in kits for swap in kit.swaps]
        assert (swap.load, swap.evict, winner.loading) == (model, (QWEN,), model)
        assert [kit.num_others(model) for kit in kits] == [0 if kit is winner else 1 for kit in kits]

        workers.wait(workers.api.cancel("ana", [job_id]))
        winner.swaps.clear()
        winner.residency.swapped = swap  # as if the lane had been there, and given it up
        workers.until("the end of the swap", lambda kit=winner: kit.planner.plan() or not kit.loading)
        assert [kit.num_others(model) for kit in kits] == [0, 0]


def test_a_swap_waits_for_the_hand_and_is_withdrawn_when_nothing_waits(workers):
    """While a job in hand needs the model that leaves, nothing is asked of the lane; a cancel ends the need."""
    kit, other = PlannerKit(workers, "w1"), PlannerKit(workers, "w2", max_wait_seconds=0.01)
    photo = workers.upload(workers.picture())
    (in_hand,) = kit.lane_kit.claim(workers.job(photo, QWEN))
    _, waiting = workers.submit(workers.job(photo, FLUX))
    kit.planner.plan()
    assert (kit.loading, kit.leaving, kit.swaps) == (FLUX, (QWEN,), [])
    assert (other.num_others(FLUX), other.num_others(QWEN)) == (1, 0)

    workers.wait(workers.api.cancel("ana", [waiting]))
    workers.until("a change of mind", lambda: kit.planner.plan() or kit.loading is None)
    assert (kit.leaving, kit.swaps) == ((), [])
    assert (other.num_others(FLUX), other.num_others(QWEN)) == (0, 1)

    workers.submit(workers.job(photo, KLEIN))
    workers.until("another plan", lambda: kit.planner.plan() or kit.loading == KLEIN)
    kit.hand.release(in_hand)
    kit.planner.plan()
    assert [(one.load, one.evict) for one in kit.swaps] == [(KLEIN, (QWEN,))]


def test_a_refused_model_is_looked_at_again_where_its_jobs_wait_or_nothing_else_does(workers):
    """A busy worker has no time for it before somebody asks for it; an idle one looks when it is due."""
    kit = PlannerKit(workers, "w1", model_retry_seconds=0.01)
    kit.residency._refusals.add(FLUX, "torn")
    photo = workers.upload(workers.picture())
    workers.until("an idle look", lambda: kit.planner.plan() or kit.checks)
    assert set(kit.checks) == {FLUX}

    (in_hand,) = kit.lane_kit.claim(workers.job(photo, QWEN))
    kit.checks.clear()
    for _ in range(20):
        kit.planner.plan()
    assert kit.checks == []
    workers.submit(workers.job(photo, FLUX))
    workers.until("a look for a job", lambda: kit.planner.plan() or kit.checks)
    kit.hand.release(in_hand)


def test_an_announcement_that_overtakes_the_placement_does_not_undo_it(workers):
    """What is decided is announced before the ledger agrees, and taken back where it does not, or is away."""
    kit, other = PlannerKit(workers, "w1"), PlannerKit(workers, "w2")
    workers.submit(workers.job(workers.upload(workers.picture()), FLUX))
    place = kit.ledger.place

    def plan(place_instead):
        kit.ledger.place = place_instead
        kit.planner._next_look_at = 0.0
        kit.planner.plan()

    def place_late(version, load, evict=()):
        assert (kit.loading, kit.leaving) == (load, evict) == (FLUX, (QWEN,))
        return place(f"not {version}", load, evict)

    def place_and_fail(version, load, evict=()):
        place(version, load, evict)
        raise LedgerUnavailable("gone")

    def place_and_announce(version, load, evict=()):
        is_placed = place(version, load, evict)
        kit.announce()  # another thread's, with what it knows now
        assert (other.num_others(FLUX), other.num_others(QWEN)) == (1, 0)
        return is_placed

    plan(place_late)
    assert (kit.planner.decided, other.num_others(FLUX), other.num_others(QWEN)) == (None, 0, 1)
    with pytest.raises(LedgerUnavailable):
        plan(place_and_fail)
    assert (kit.planner.decided, other.num_others(FLUX), other.num_others(QWEN)) == (None, 0, 1)
    plan(place_and_announce)
    assert (kit.loading, len(kit.swaps)) == (FLUX, 1)


def test_ready_jobs_wake_the_claimer_only_where_it_could_do_something(workers):
    """A model in memory or one that could be loaded now wakes it; one it does not serve, or has just looked at, not."""
    from server.worker.claimer import Claimer
    from server.worker.patience import Outage

    kit = PlannerKit(workers, "w1", poll_seconds=600.0, max_held_jobs=1)
    kit.residency._refusals.add(KLEIN, "torn")
    awake = threading.Event()
    settings, outage = kit.lane_kit.settings, Outage("redis")
    parts = (kit.ledger, outage, kit.hand, kit.residency)
    claimer = Claimer(*parts, settings=settings, awake=awake, take=print, planner=kit.planner)

    def wakes(*models, has_high=False):
        awake.clear()
        claimer.note_ready(models, has_high)
        return awake.is_set()

    assert (wakes(QWEN), wakes(FLUX), wakes(FLUX, KLEIN)) == (True, True, True)
    assert (wakes(KLEIN), wakes("unknown"), wakes("")) == (False, False, False)
    kit.planner.plan()  # the next look is in ten minutes
    assert (wakes(QWEN), wakes(FLUX), wakes(QWEN, FLUX)) == (True, False, True)
    kit.lane_kit.claim(workers.job(workers.upload(workers.picture()), QWEN))
    assert (wakes(QWEN), wakes(QWEN, has_high=True), wakes(KLEIN, has_high=True)) == (False, True, False)
    kit.residency.is_preloading = True
    assert not wakes(QWEN, has_high=True), "it is woken after the load"
