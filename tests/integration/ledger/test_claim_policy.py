"""The simulation's claim policy against CLAIM itself: the same calls, the same jobs."""

import random
from typing import Any

import pytest

from server.jobs import Job, Priority
from server.simulation.claim_policy import PRIORITIES, ClaimPolicy, QueuedJob

MODELS = ["flux", "kontext", "qwen"]
OWNERS = ["ana", "bo", "cy", "di"]
NUM_STEPS = 150


class BothPolicies:
    """Makes each call twice, and compares the answers."""

    def __init__(self, ledger: Any, draw: random.Random) -> None:
        self._ledger = ledger
        self._draw = draw
        self._twin = ClaimPolicy()
        self._jobs: dict[str, QueuedJob] = {}
        self._running: list[Job] = []
        self.num_claimed = 0

    def submit(self, batch_id: str) -> None:
        """Accept a batch of several models."""
        owner, priority = self._draw.choice(OWNERS), self._draw.choice(PRIORITIES)
        models = self._draw.choices(MODELS, k=self._draw.randint(1, 5))
        batch = self._ledger.accept(batch_id, models, owner=owner, priority=priority.value)
        jobs = [
            QueuedJob(job.id, owner, job.model, priority, len(self._jobs) + place)
            for place, job in enumerate(batch.jobs)
        ]
        self._jobs |= {job.id: job for job in jobs}
        self._twin.submit(jobs)

    def claim(self, worker_id: str, models: list[str], *, high_only: bool) -> None:
        """Claim for a worker of these models."""
        job = self._ledger.worker(worker_id).claim(models, num_held=0, high_only=high_only)
        twin = self._twin.claim(models, [Priority.HIGH] if high_only else PRIORITIES)
        assert (job and job.id) == (twin and twin.id)
        if job:
            self.num_claimed += 1
            self._running.append(job)

    def give_back(self) -> None:
        """Let a claimed job wait again."""
        job = self._running.pop(self._draw.randrange(len(self._running)))
        reply = self._ledger.worker().retry(
            job.id, job.fence, delay_seconds=0, counts=False, max_errors=3, code="worker_stopped", detail=""
        )
        assert reply == "ok"
        self._twin.give_back(self._jobs[job.id])

    def compare_backlogs(self) -> None:
        """Look at what waits."""
        backlogs = self._ledger.worker().backlog(MODELS).models
        assert {model: one.num_ready for model, one in backlogs.items()} == {
            model: self._twin.num_ready(model) for model in MODELS
        }

    def step(self, number: int) -> None:
        """Make one call at random."""
        chance = self._draw.random()
        if chance < 0.3:
            self.submit(f"b{number}")
        elif chance < 0.4 and self._running:
            self.give_back()
        else:
            models = self._draw.sample(MODELS, self._draw.randint(1, 3))
            self.claim(f"w{self._draw.randrange(4)}", models, high_only=self._draw.random() < 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_twin_claims_what_redis_hands_out(ledger: Any, seed: int) -> None:
    """Random batches, claims by workers of different models and jobs given back: job for job the same, to the last."""
    both = BothPolicies(ledger, random.Random(seed))
    for number in range(NUM_STEPS):
        both.step(number)
    both.compare_backlogs()
    before = -1
    while before != both.num_claimed:
        before = both.num_claimed
        both.claim("w0", MODELS, high_only=False)
    both.compare_backlogs()
    assert both.num_claimed > NUM_STEPS / 2
