"""The model's answers to workers: claims, what happens to a held job, and what a worker announces."""

import math

from tests.integration.ledger.kit import LEASE_SECONDS, ORPHANS_SECONDS
from tests.integration.ledger.model_moves import PRIORITIES, ModelMoves
from tests.integration.ledger.model_records import Announced, ModelJob

CLAIM_SECONDS = 60
ANNOUNCED_SECONDS = 30
JANITOR_SECONDS = 60
ANSWER_SECONDS = 60
SPEED_SECONDS = 30 * 24 * 3600
MAX_ERRORS = 2

Hand = tuple[str, int]


class ModelWorkers(ModelMoves):
    """The calls of workers."""

    def claim(
        self, worker: str, token: str, models: list[str], num_held: int, *, high_only: bool = False
    ) -> ModelJob | str | None:
        """Expect the job that a claim must hand out, "alone", or None."""
        self.call += 1
        if worker in self.claims and self.claims[worker][0] == token:
            again = self.jobs.get(self.claims[worker][1])
            return again if again and again.status == "running" and again.worker == worker else None
        for priority in PRIORITIES[: 1 if high_only else None]:
            waiting = [
                (place, self.ready(owner, model, priority)[0])
                for model in models
                for owner, place in self.lines.get((model, priority), {}).items()
            ]
            if waiting:
                job = min(waiting, key=lambda one: (one[0], one[1].age))[1]
                if job.suspect and num_held:
                    return "alone"
                self._hand_out(job, worker, models)
                self.claims[worker] = (token, job.id, self.now + CLAIM_SECONDS)
                return job
        return None

    def _hand_out(self, job: ModelJob, worker: str, models: list[str]) -> None:
        self.move(job, "running")
        job.attempts += 1
        job.fence += 1
        job.worker, job.error, job.step = worker, None, None
        job.lease_until = self.now + LEASE_SECONDS
        self.line_up(job)
        for model in models:
            line = self.lines.get((model, job.batch.priority), {})
            if job.batch.owner in line:
                line[job.batch.owner] = (self.call, 0)
        job.batch.status, job.batch.is_started = "running", True
        self.tell_job(job, "started")

    def start(self, job_id: str, fence: int, *, on_device: bool, instead_of: Hand | None = None) -> str:
        """Expect the answer to START."""
        self.call += 1
        if instead_of and (leaving := self.held(*instead_of)):
            leaving.on_device = False
        if not (job := self.held(job_id, fence)):
            return "lost"
        job.on_device = on_device
        return "cancelled" if job.cancel else "ok"

    def renew(self, held: list[tuple[str, int, int | None]]) -> list[str]:
        """Expect the answers to RENEW of (job, fence, step)."""
        self.call += 1
        replies: list[str] = []
        for job_id, fence, step in held:
            if not (job := self.held(job_id, fence)):
                replies.append("lost")
                continue
            job.lease_until, job.changed = self.now + LEASE_SECONDS, self.call
            if step is not None and step != job.step:
                job.step = step
                self.announce_change(job.batch.id)
            replies.append("cancelled" if job.cancel else "ok")
        return replies

    def commit(self, job_id: str, fence: int, speeds: dict[str, float]) -> str:
        """Expect the answer to COMMIT."""
        self.call += 1
        job = self.jobs.get(job_id)
        if job and job.status == "succeeded" and job.fence == fence:
            return "ok"
        if not (job := self.held(job_id, fence)):
            return "lost"
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        job.output, job.params, job.has_timings = f"{job.try_name.partition('/')[2]}output.webp", {"seed": 7}, True
        for name in (job.try_name, f"outputs/{job.output}"):
            self.trash.pop(name, None)
        self.end(job, "succeeded")
        self._measure(job.model, speeds)
        return "ok"

    def finish_marked(self, job_id: str, fence: int, attempts: int, worker: str) -> str:
        """Expect the answer to FINISH_MARKED."""
        self.call += 1
        if not (job := self.jobs.get(job_id)):
            return "unknown"
        if not job.is_open:
            return "done" if job.status == "succeeded" else "settled"
        if job.fence > fence:
            return "newer"
        if job.cancel:
            return "cancelling"
        if self._may_be_written_or_deleted(job, fence, worker):
            return "held"
        if job.status == "running" and job.fence < fence:
            self.trash[job.try_name] = self.now + ORPHANS_SECONDS
        # As if it were claimed and committed just now, but nobody hears of a start.
        job.status, job.fence, job.attempts, job.worker = "running", fence, max(job.attempts, attempts), worker
        job.output, job.params, job.has_timings = f"{job.try_name.partition('/')[2]}output.webp", {"seed": 7}, True
        for name in (job.try_name, f"outputs/{job.output}", job.marker_name):
            self.trash.pop(name, None)
        job.batch.status, job.batch.is_started = "running", True
        self.end(job, "succeeded")
        return "finished"

    def _may_be_written_or_deleted(self, job: ModelJob, fence: int, worker: str) -> bool:
        is_leased = (job.lease_until or 0) > self.now
        if job.status == "running" and job.fence == fence and (job.worker != worker or is_leased):
            return True
        names = (f"outputs/{job.id}/{fence}/", f"outputs/{job.id}/{fence}/output.webp")
        return any(self.trash.get(name, math.inf) <= self.now + JANITOR_SECONDS for name in names)

    def _measure(self, model: str, speeds: dict[str, float]) -> None:
        if not speeds:
            return
        measured = dict(self.speeds[model][0]) if model in self.speeds else {}
        for name, seconds in speeds.items():
            new = 0.8 * float(measured[name]) + 0.2 * seconds if name in measured else seconds
            measured[name] = f"{new:.6g}"
        self.speeds[model] = measured, self.now + SPEED_SECONDS

    def fail(self, job_id: str, fence: int, error: tuple[str, str]) -> str:
        """Expect the answer to FAIL."""
        self.call += 1
        job = self.jobs.get(job_id)
        if job and job.fence == fence and job.status in {"failed", "cancelled"}:
            return "ok" if job.status == "failed" else "cancelled"
        if not (job := self.held(job_id, fence)):
            return "lost"
        job.has_timings = True
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        self.end(job, "failed", error)
        return "ok"

    def retry(self, job_id: str, fence: int, delay_seconds: float, error: tuple[str, str], *, counts: bool) -> str:
        """Expect the answer to RETRY."""
        self.call += 1
        if not (job := self.held(job_id, fence)):
            return "lost"
        if job.cancel:
            self.end(job, "cancelled")
            return "cancelled"
        if counts:
            job.errors += 1
            if job.errors == MAX_ERRORS:
                self.end(job, "failed", error)
                return "failed"
            job.error = error
        self.queue_again(job, delay_seconds)
        return "ok"

    def announce(self, worker: str, models: dict[str, bool]) -> None:
        """Hear what a worker serves; here it has all that in memory, and nothing else."""
        self.call += 1
        self.workers[worker] = Announced(models, self.now + ANNOUNCED_SECONDS)
        self.served_at |= {model: self.now for model, is_ready in models.items() if is_ready}
        for model, is_ready in models.items():
            alive = {one: until for one, until in self.holders.get(model, {}).items() if until > self.now}
            self.holders[model] = alive
            self._hold(worker, model, holds=is_ready)

    def _hold(self, worker: str, model: str, *, holds: bool) -> None:
        holders = self.holders.setdefault(model, {})
        holders.pop(worker, None)
        if holds:
            holders[worker] = self.now + ANNOUNCED_SECONDS
        if not holders:
            del self.holders[model]

    def backlog(self, worker: str, models: list[str]) -> list[tuple[int, int, float | None]]:
        """Expect of each model how many jobs are ready, how many others hold it, and the seconds of a run."""
        self.call += 1
        found: list[tuple[int, int, float | None]] = []
        for model in models:
            num_ready = sum(job.is_ready and job.model == model for job in self.jobs.values())
            others = [one for one, until in self.holders.get(model, {}).items() if until > self.now and one != worker]
            seconds = self.speeds[model][0].get("run") if model in self.speeds else None
            found.append((num_ready, len(others), None if seconds is None else float(seconds)))
        return found

    def place(self, token: str, worker: str, version: str, load: str, evict: list[str]) -> bool:
        """Expect whether a worker may change its models."""
        self.call += 1
        if token in self.replies:
            return self.replies[token][0] == "placed"
        if version != str(self.num_placed):
            return False
        self.num_placed += 1
        self.placed_until = self.now + SPEED_SECONDS
        self._hold(worker, load, holds=True)
        for model in evict:
            self._hold(worker, model, holds=False)
        self.replies[token] = "placed", self.now + ANSWER_SECONDS
        return True
