"""Children end when and how they are told to, and the crew brings dead workers back."""

import os
import signal
import socket
import sys
import time

import pytest

from server.child import Child
from server.crew import WorkerCrew, WorkersFailed
from server.ports import PortClaim, free_ports, is_free

# Ends by itself on the second SIGTERM, or when the job that it has in hand is done.
WORKER_WITH_A_JOB = """
import signal, sys, time
terms = []
def on_term(*_):
    terms.append(1)
    print("terms", len(terms), flush=True)
signal.signal(signal.SIGTERM, on_term)
print("working", flush=True)
until = None
while len(terms) < 2:
    time.sleep(0.02)
    if terms and until is None:
        until = time.monotonic() + float(sys.argv[1])
    if until is not None and time.monotonic() > until:
        print("finished", flush=True)
        sys.exit(0)
print("gave back", flush=True)
"""


@pytest.fixture
def make_child(tmp_path):
    """Give a function that makes a child of a shell script or of Python code; all are killed after the test."""
    children = []

    def make(script=None, *, code=None, arguments=(), name="worker-1"):
        command = ["/bin/sh", "-c", script] if code is None else [sys.executable, "-c", code, *arguments]
        children.append(Child(name, command, log_file=tmp_path / "logs" / f"{name}.log"))
        return children[-1]

    yield make
    for child in children:
        child.kill_group()


@pytest.fixture
def said():
    """Give the list of what a crew says."""
    return []


def test_child_is_alone_in_its_session(make_child):
    """Ctrl-C in the parent's terminal does not reach a child: it has a session and a group of its own."""
    child = make_child("sleep 60")
    child.start()
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid != os.getsid(0)


def test_child_gets_the_environment_it_is_given(make_child, wait_until):
    """A child has the variables that it is started with and none of its parent's."""
    child = make_child("env")
    child.start({"RESTAGE_ENV": "test"})
    wait_until(lambda: not child.is_running)
    assert "RESTAGE_ENV=test" in child.tail()
    assert "HF_HUB_OFFLINE" not in child.tail()


def test_tail_is_of_the_last_start_only(make_child, wait_until):
    """What an earlier start wrote stays in the log but is not shown as the last output."""
    child = make_child("echo process $$; seq 30")
    tails = []
    for _ in range(2):
        child.start()
        wait_until(lambda: not child.is_running)
        tails.append(child.tail(40))
    assert tails[0] != tails[1]
    assert all(len(tail.splitlines()) == 31 for tail in tails)
    assert child.tail(2) == "29\n30"
    assert child.log_file.read_text() == f"{tails[0]}\n{tails[1]}\n"


def test_program_that_is_missing_says_so(tmp_path, wait_until):
    """A command that cannot be started ends as a child does, with the reason in its output."""
    child = Child("worker-1", ["/no/such/program"], log_file=tmp_path / "log")
    child.start()
    wait_until(lambda: not child.is_running)
    assert child.poll() == 1
    assert "/no/such/program cannot be started" in child.tail()


def test_stop_leaves_nothing_of_a_child(make_child, wait_until, is_gone):
    """A child that ignores SIGTERM is killed, and so is what it has started."""
    child = make_child("trap '' TERM; sleep 60 & echo $!; wait; sleep 60")
    child.start()
    wait_until(child.tail)
    grandchild = int(child.tail())
    assert child.stop(timeout_seconds=0.2) == -signal.SIGKILL
    wait_until(lambda: is_gone(grandchild))


def test_dead_worker_is_started_again_later_each_time(make_child, said, wait_until, is_gone):
    """A worker that dies comes back after 1 s, then 2 s; its death is told with its last words."""
    worker = make_child("sleep 60 & echo it was the cat $!; exit 3")
    crew = WorkerCrew([worker], say=said.append, job_end_seconds=1)
    crew.start(os.environ)
    started_at = [time.monotonic()]
    pids = {worker.pid}
    while len(started_at) < 3:
        crew.tend(has_served=True)
        if worker.pid not in pids:
            pids.add(worker.pid)
            started_at.append(time.monotonic())
        time.sleep(0.01)
    assert started_at[1] - started_at[0] >= 1
    assert started_at[2] - started_at[1] >= 2
    assert "worker-1 ended with status 3 and is started again in 1 s" in said[0]
    assert "again in 2 s" in said[1]
    assert "it was the cat" in said[0]
    wait_until(lambda: is_gone(int(said[0].split()[-1])))


def test_death_of_one_worker_leaves_the_others_alone(make_child, said, wait_until):
    """A worker that is killed is replaced; its neighbour keeps its process."""
    workers = [make_child("sleep 60", name=f"worker-{number}") for number in (1, 2)]
    crew = WorkerCrew(workers, say=said.append, job_end_seconds=1)
    crew.start(os.environ)
    before = [worker.pid for worker in workers]
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: crew.tend(has_served=True) or workers[0].pid != before[0])
    assert workers[1].pid == before[1]
    assert len(said) == 1
    assert "status -9" in said[0]


def test_workers_that_cannot_start_are_given_up(make_child, said):
    """Where nothing was ever served, the second death ends it, with the worker's last words."""
    worker = make_child("echo no weights; exit 1")
    crew = WorkerCrew([worker], say=said.append, job_end_seconds=1)
    crew.start(os.environ)

    def tend():
        while True:
            crew.tend(has_served=False)
            time.sleep(0.02)

    with pytest.raises(WorkersFailed, match=r"(?s)worker-1 ended with status 1 again, before anything.*no weights"):
        tend()
    assert len(said) == 1


def start_one(make_child, said, wait_until, job_seconds):
    worker = make_child(code=WORKER_WITH_A_JOB, arguments=[str(job_seconds)])
    crew = WorkerCrew([worker], say=said.append, job_end_seconds=30)
    crew.start(os.environ)
    wait_until(lambda: "working" in worker.tail())
    return crew, worker


def test_stop_waits_for_the_running_job(make_child, said, wait_until):
    """One signal lets the job in hand end."""
    crew, worker = start_one(make_child, said, wait_until, job_seconds=0.5)
    crew.stop(lambda: 1, may_finish=True)
    assert worker.tail().splitlines() == ["working", "terms 1", "finished"]
    assert worker.poll() == 0


def test_second_signal_gives_jobs_back(make_child, said, wait_until):
    """A second signal during the wait is passed on, which gives the job in hand back at once."""
    crew, worker = start_one(make_child, said, wait_until, job_seconds=60)
    looks = iter(range(10_000))
    started = time.monotonic()
    # Never the second at the first look, which is where the wait for the first begins.
    crew.stop(lambda: 2 if next(looks) and "terms 1" in worker.tail() else 1, may_finish=True)
    assert worker.tail().splitlines() == ["working", "terms 1", "terms 2", "gave back"]
    assert time.monotonic() - started < 10


def test_third_signal_kills(make_child, said, wait_until):
    """A worker that two signals do not end is killed on the third, at once."""
    worker = make_child("trap '' TERM; echo working; while :; do sleep 0.1; done")
    crew = WorkerCrew([worker], say=said.append, job_end_seconds=30)
    crew.start(os.environ)
    wait_until(lambda: "working" in worker.tail())
    counts = iter(range(100))
    started = time.monotonic()
    crew.stop(lambda: next(counts), may_finish=True)
    assert worker.poll() == -signal.SIGKILL
    assert time.monotonic() - started < 5


def test_stop_after_a_failure_does_not_wait_for_jobs(make_child, said, wait_until):
    """Where jobs cannot end, they are given back at once, without a second signal."""
    crew, worker = start_one(make_child, said, wait_until, job_seconds=60)
    started = time.monotonic()
    crew.stop(lambda: 0, may_finish=False)
    assert worker.tail().splitlines()[-1] == "gave back"
    assert time.monotonic() - started < 10


def test_free_ports_are_free_and_distinct():
    """Ports for one instance differ from each other, and nothing listens on them."""
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(is_free(port) for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not is_free(ports[0])


def test_claimed_port_is_no_one_elses():
    """A claim holds before anything listens, for as long as it is kept; a port that is listened on is no claim's."""
    port, taken = free_ports(2)
    with socket.create_server(("127.0.0.1", taken)):
        first = PortClaim.take([taken, port])
        assert first is not None
        assert first.port == port
        assert is_free(port)
        assert PortClaim.take([taken, port]) is None
        first.release()
        second = PortClaim.take([port])
        assert second is not None
        second.release()
