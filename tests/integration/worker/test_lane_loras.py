"""LoRAs in the lane: chosen job by job, never two choices on one model at once, and no trace from one to the next."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from server.jobs import Priority

STYLE, LIGHTNING = {"id": "style", "scale": 1.0}, {"id": "lightning-4steps", "scale": 0.5}


@pytest.fixture
def job(workers):
    """Give a function that makes a job of Qwen's twin with some LoRAs."""
    photo = workers.upload(workers.picture())

    def make(*loras, priority=Priority.NORMAL, model=workers.QWEN, **params):
        made = workers.job(photo, model, params={"num_inference_steps": 4, **params}, priority=priority)
        return replace(made, loras=tuple(loras))

    return make


def pixels(image):
    return np.asarray(image).astype(int)


def test_a_job_with_other_loras_waits_for_the_run_under_way(workers, job):
    """However urgent, it does not begin on a model that a run has changed otherwise: that run is finished first."""
    from server.worker.hand import JobInHand
    from server.worker.lane_job import LaneJob
    from server.worker.policy import choose

    def lane_job(order, wanted, *, has_run=False):
        run: Any = object() if has_run else None
        return LaneJob(JobInHand(wanted, order), run)

    def pick(*jobs):
        return choose(jobs, max_wait_seconds=60)

    styled = lane_job(1, job(STYLE), has_run=True)
    plain = lane_job(2, job(priority=Priority.HIGH))
    weaker = lane_job(3, job(STYLE | {"scale": 0.5}, priority=Priority.HIGH))
    same = lane_job(4, job(STYLE, priority=Priority.HIGH))
    elsewhere = lane_job(5, job(priority=Priority.HIGH, model=workers.FLUX))

    assert pick(styled, plain, weaker) is styled
    assert pick(styled, weaker, same) is styled
    assert pick(styled, same, elsewhere) is same
    assert pick(plain, weaker) is plain


def test_jobs_with_different_loras_leave_no_trace(workers, running_lane, job):
    """Jobs in any order, with LoRAs and without, high and normal, some cancelled, make the pictures they make alone."""
    wanted = {
        "plain": job(),
        "styled": job(STYLE),
        "weak": job(STYLE | {"scale": 0.25}),
        "fast": job(LIGHTNING, true_cfg_scale=1.0),
        "both": job(LIGHTNING, STYLE, true_cfg_scale=1.0),
        "off": job(STYLE | {"scale": 0.0}),
    }
    alone = {}
    for name, one in wanted.items():
        with running_lane(max_resident_models=1) as kit:
            (in_hand,) = kit.claim(one)
            kit.lane.submit(in_hand)
            alone[name] = pixels(kit.next_end()[1])
    assert np.array_equal(alone["off"], alone["plain"])
    assert all(
        not np.array_equal(alone[one], alone[other])
        for one in ("plain", "styled", "weak", "fast", "both")
        for other in ("plain", "styled", "weak", "fast", "both")
        if one != other
    )

    chance = random.Random(1)
    names = [*wanted, *wanted]
    chance.shuffle(names)
    jobs = [
        replace(workers.job(wanted[name].inputs[0], workers.QWEN), loras=wanted[name].loras, params=wanted[name].params)
        for name in names
    ]
    urgent = [replace(one, priority=Priority.HIGH if chance.random() < 0.4 else Priority.NORMAL) for one in jobs]
    with running_lane(max_resident_models=1) as kit:
        in_hands = [kit.claim(one)[0] for one in urgent]
        doomed = chance.sample(in_hands, 3)
        for in_hand in in_hands:
            kit.lane.submit(in_hand)
        for in_hand in doomed:
            in_hand.cancelled = True
        ends = {id(in_hand): end for in_hand, end in (kit.next_end() for _ in in_hands)}
        for name, in_hand in zip(names, in_hands, strict=True):
            end = ends[id(in_hand)]
            if isinstance(end, Exception):
                assert in_hand in doomed
            else:
                assert np.array_equal(pixels(end), alone[name]), name
        assert sum(not isinstance(end, Exception) for end in ends.values()) >= len(names) - len(doomed)
        assert kit.residency.loaded == [workers.QWEN]
