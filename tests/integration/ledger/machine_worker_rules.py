"""What workers do at random: claims, results, failures, deaths, and late returns."""

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.integration.ledger.kit import LEASE_SECONDS
from tests.integration.ledger.machine_calls import MODELS, WORKERS
from tests.integration.ledger.machine_looks import LedgerLooks
from tests.integration.ledger.model_records import ModelBatch
from tests.integration.ledger.model_workers import MAX_ERRORS

DELAY_SECONDS = 250

speeds = st.fixed_dictionaries({"run": st.floats(0.001, 1000)}, optional={"step:19.5": st.floats(0.001, 1000)})


class WorkerRules(LedgerLooks):
    """The rules of workers."""

    @precondition(lambda self: any(job.status == "queued" for job in self.model.jobs.values()))
    @rule(
        worker=st.sampled_from(WORKERS),
        models=st.lists(st.sampled_from(MODELS), min_size=1, unique=True),
        num_held=st.sampled_from((0, 0, 1)),
        high_only=st.sampled_from((False, False, True)),
    )
    def worker_claims(self, worker: str, models: list[str], num_held: int, high_only: bool) -> None:
        """A worker asks for the best job of the models it serves, or of those the best `high` one."""
        self.claim(worker, models, num_held, self.new_id("token"), high_only=high_only)

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 4), on_device=st.booleans())
    def worker_fills_its_hands(self, worker: str, count: int, on_device: bool) -> None:
        """A worker that serves all models claims a few jobs, and puts the last on its device."""
        for num_held in range(count):
            self.claim(worker, list(MODELS), num_held, self.new_id("token"))
        if on_device and self.hands:
            self.start(self.hands[-1], on_device=True)

    @precondition(lambda self: self.last_claims)
    @rule(data=st.data())
    def claim_is_repeated(self, data: st.DataObject) -> None:
        """The reply to a worker's latest claim was lost, so it claims again with the same token."""
        worker = data.draw(st.sampled_from(sorted(self.last_claims)))
        token, models = self.last_claims[worker]
        self.claim(worker, models, 0, token)

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), other=st.sampled_from(WORKERS), taken=st.booleans())
    def claim_is_repeated_too_late(self, worker: str, other: str, taken: bool) -> None:
        """The reply to a claim was lost, and the job is queued again or another's before it is repeated."""
        token = self.new_id("token")
        self.claim(worker, list(MODELS), 0, token)
        self.retry(self.hands[-1], 0, counts=False)
        if taken and other != worker:
            self.claim(other, list(MODELS), 0, self.new_id("token"))
        self.claim(worker, list(MODELS), 0, token)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), on_device=st.booleans())
    def job_starts(self, data: st.DataObject, on_device: bool) -> None:
        """A job goes on the device, or leaves it."""
        self.start(data.draw(st.sampled_from(self.live_hands())), on_device=on_device)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data())
    def job_starts_as_another_leaves(self, data: st.DataObject) -> None:
        """A job goes on the device in the place of another, which may be nobody's any more."""
        self.start(
            data.draw(st.sampled_from(self.live_hands())),
            on_device=True,
            instead_of=data.draw(st.sampled_from(self.hands)),
        )

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), step=st.one_of(st.none(), st.integers(0, 9)))
    def leases_are_renewed(self, data: st.DataObject, step: int | None) -> None:
        """A worker renews what it believes to hold."""
        self.renew(data.draw(st.lists(st.sampled_from(self.hands), max_size=1)) + self.live_hands(), step)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), times=st.integers(1, 2), measured=st.just({}) | speeds)
    def result_is_committed(self, data: st.DataObject, times: int, measured: dict[str, float]) -> None:
        """A worker hands in its result, perhaps twice, because a reply was lost."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(times):
            self.commit(hand, measured)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), times=st.integers(1, 2))
    def job_fails(self, data: st.DataObject, times: int) -> None:
        """A worker gives a job up, perhaps twice, because a reply was lost."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(times):
            self.fail(hand)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), delay_seconds=st.sampled_from((0, DELAY_SECONDS)), counts=st.booleans())
    def job_is_given_back(self, data: st.DataObject, delay_seconds: int, counts: bool) -> None:
        """A worker wants another try, for an error of the job's or for nobody's."""
        self.retry(data.draw(st.sampled_from(self.live_hands())), delay_seconds, counts=counts)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def late_worker_comes_back(self, data: st.DataObject) -> None:
        """A worker that slept uses whatever hand it had, in whatever way."""
        hand = data.draw(st.sampled_from(self.hands))
        self.act(data.draw(st.sampled_from(("start", "renew", "commit", "fail", "retry"))), hand)

    @precondition(lambda self: self.live_hands())
    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        ends=st.sampled_from((None, "commit", "fail")),
        act=st.sampled_from(("start", "renew", "commit", "fail", "retry")),
    )
    def job_changes_hands(self, data: st.DataObject, worker: str, ends: str | None, act: str) -> None:
        """A worker sleeps so long that another gets its job and perhaps ends it; then the first wakes up."""
        late = data.draw(st.sampled_from(self.live_hands()))
        self.sweep_for_a_lease()
        if new := self.claim_again(late[0], worker):
            if ends:
                self.act(ends, new)
            self.act(act, late)

    @precondition(lambda self: self.live_hands())
    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def job_runs_out_of_tries(self, data: st.DataObject, worker: str) -> None:
        """A job spends all its errors, and its user asks for another round, which begins with none spent."""
        hand = data.draw(st.sampled_from(self.live_hands()))
        for _ in range(MAX_ERRORS):
            self.retry(hand, 0, counts=True)
            if not (again := self.claim_again(hand[0], worker)):
                break
            hand = again
        self.change(data, self.reopen, "", [hand[0]])

    @precondition(lambda self: any(job.is_ready for job in self.model.jobs.values()))
    @rule(worker=st.sampled_from(WORKERS), on_device=st.sampled_from((True, True, False)), deaths=st.integers(1, 4))
    def workers_die_of_a_job(self, worker: str, on_device: bool, deaths: int) -> None:
        """A job is claimed, and its worker dies, as often as that job is next."""
        job_id = None
        for _ in range(deaths):
            self.claim(worker, list(MODELS), 1, self.new_id("token"))
            self.claim(worker, list(MODELS), 0, self.new_id("token"))
            taken = self.live_hands()[-1:]
            if not taken or job_id not in {None, taken[0][0]}:
                return
            job_id = taken[0][0]
            self.start(taken[0], on_device=on_device)
            self.sweep_for_a_lease()

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data(), more=st.integers(0, 2), times=st.integers(1, 2), sleeps=st.booleans())
    def store_marks_a_job_as_done(self, data: st.DataObject, more: int, times: int, sleeps: bool) -> None:
        """The ledger was set back, and the store knows the end of a job under this fence or a later one."""
        job = self.model.jobs[data.draw(st.sampled_from(sorted(self.model.jobs)))]
        if sleeps:
            self.pass_time(LEASE_SECONDS)
        fence = max(1, job.fence + more)
        for _ in range(times):
            self.finish_marked(job, fence)

    @precondition(lambda self: self.open_batches())
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), measured=speeds)
    def batch_comes_to_its_end(self, data: st.DataObject, worker: str, measured: dict[str, float]) -> None:
        """Workers and users bring all jobs of a batch to an end, whichever way."""
        batch = data.draw(st.sampled_from(self.open_batches()))
        for job in batch.jobs:
            hand = (job.id, job.fence) if job.status == "running" else self.claim_again(job.id, worker)
            how = data.draw(st.sampled_from(("commit", "commit", "fail")))
            if hand is None:
                self.change(data, self.cancel, "", [job.id])
            elif how == "commit":
                self.commit(hand, measured)
            else:
                self.fail(hand)

    def open_batches(self) -> list[ModelBatch]:
        """List the batches that have not finished."""
        return [batch for batch in self.model.batches.values() if batch.status != "finished"]

    @rule(
        workers=st.permutations(WORKERS),
        models=st.permutations(MODELS),
        num_leaving=st.integers(0, 2),
        is_late=st.booleans(),
    )
    def workers_place_models(self, workers: list[str], models: list[str], num_leaving: int, is_late: bool) -> None:
        """A worker changes its models, perhaps after another did, and the call is repeated since its reply was lost."""
        load, *others = models
        version = self.look_at_backlog(workers[0])
        if is_late:
            self.place(workers[1], version, load, [], self.new_id("token"))
        token = self.new_id("token")
        for _ in range(2):
            self.place(workers[0], version, load, others[:num_leaving], token)
        self.look_at_backlog(workers[1])

    @rule(
        worker=st.sampled_from(WORKERS),
        models=st.dictionaries(st.sampled_from(MODELS), st.sampled_from((True, True, False))),
    )
    def worker_announces_itself(self, worker: str, models: dict[str, bool]) -> None:
        """A worker says what it serves."""
        self.announce_worker(worker, models)
