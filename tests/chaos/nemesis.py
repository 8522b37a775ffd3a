"""Brings about the faults of a schedule, one after the other or several at once, and ends each in its time."""

import heapq
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import redis

from server.queue import DRAMATIQ_NAMESPACE
from tests.chaos.history import History
from tests.chaos.proxy import Proxy, Trap, script_needle
from tests.chaos.schedule import Fault
from tests.chaos.stack import ChaosStack

# How long a reply is waited for that shall be lost: RETRY, for one, is seldom called.
_TRAP_SECONDS = 10.0
_TICK_SECONDS = 0.02
_BACK_SECONDS = 60.0


class Nemesis:
    """Harms a stack by a schedule; call it from the thread that started the stack.

    Args:
        stack: what is harmed.
        history: is told when each fault begins and ends, and whether it did harm.
    """

    def __init__(self, stack: ChaosStack, history: History) -> None:
        self._stack = stack
        self._history = history
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._num_due = 0
        self._begun: dict[str, Callable[[Fault], None]] = {
            "worker.kill": self._kill,
            "api.kill": self._kill,
            "worker.pause": self._pause,
            "valkey.kill": self._kill_server,
            "store.kill": self._kill_server,
            "reply.loss": self._lose_replies,
            "answer.loss": self._lose_replies,
            "line.cut": self._cut,
            "line.hole": self._hole,
            "worker.cutoff": self._hole,
            "line.slow": self._slow,
            "memory.full": self._fill_memory,
            "bells.flush": self._flush_bells,
        }

    def run(self, schedule: Sequence[Fault], *, seconds: float) -> None:
        """Bring about all faults, then end those that last, until all is as it was."""
        started_at = time.monotonic()
        for fault in schedule:
            self._at(started_at + fault.at_seconds, lambda fault=fault: self._begin(fault))
        self._tend_until(lambda: not self._due and time.monotonic() >= started_at + seconds)
        give_up_at = time.monotonic() + _BACK_SECONDS
        self._tend_until(lambda: not self._stack.away or time.monotonic() > give_up_at)
        self._stack.heal()

    def _tend_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self._stack.tend()
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()
            time.sleep(_TICK_SECONDS)

    def _at(self, moment: float, act: Callable[[], None]) -> None:
        self._num_due += 1  # of two that are due together, the first comes first
        heapq.heappush(self._due, (moment, self._num_due, act))

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(time.monotonic() + seconds, act)

    def _begin(self, fault: Fault) -> None:
        self._history.add("fault.begun", number=fault.number, fault=fault.kind, **_told(fault))
        self._begun[fault.kind](fault)

    def _end(self, fault: Fault, *, did_harm: bool = True) -> None:
        self._history.add("fault.ended", number=fault.number, did_harm=did_harm)

    def _kill(self, fault: Fault) -> None:
        did_harm = self._stack.processes[fault.target].child.is_running
        if did_harm:
            self._stack.kill(fault.target, away_seconds=fault.lasts_seconds)
        self._after(fault.lasts_seconds, lambda: self._end(fault, did_harm=did_harm))

    def _pause(self, fault: Fault) -> None:
        child = self._stack.processes[fault.target].child
        did_harm, pid = child.is_running, child.pid
        child.send_signal(signal.SIGSTOP)

        def wake() -> None:
            if child.pid == pid:  # it may have been killed meanwhile
                child.send_signal(signal.SIGCONT)
            self._end(fault, did_harm=did_harm)

        self._after(fault.lasts_seconds, wake)

    def _kill_server(self, fault: Fault) -> None:
        if fault.target in self._stack.away:
            self._end(fault, did_harm=False)
            return
        self._stack.kill_server(fault.target)

        def start() -> None:
            self._stack.start_server(fault.target)
            self._await_server(fault)

        self._after(fault.lasts_seconds, start)

    def _await_server(self, fault: Fault) -> None:
        if fault.target in self._stack.away:
            self._after(_TICK_SECONDS, lambda: self._await_server(fault))
        else:
            self._end(fault)

    def _lose_replies(self, fault: Fault) -> None:
        line = self._line(fault)
        needle = script_needle(fault.script) if fault.script else b"POST /v1/"
        trap = line.lose_replies(needle, times=fault.times)
        self._await_trap(fault, line, trap, time.monotonic() + _TRAP_SECONDS)

    def _await_trap(self, fault: Fault, line: Proxy, trap: Trap, give_up_at: float) -> None:
        if trap.times_left and time.monotonic() < give_up_at:
            self._after(_TICK_SECONDS, lambda: self._await_trap(fault, line, trap, give_up_at))
            return
        line.withdraw(trap)
        self._end(fault, did_harm=trap.times_left < fault.times)

    def _cut(self, fault: Fault) -> None:
        num_cut = self._line(fault).cut()
        self._end(fault, did_harm=num_cut > 0)

    def _hole(self, fault: Fault) -> None:
        line = self._line(fault)
        line.black_hole()
        self._later(fault, line.pass_again)

    def _slow(self, fault: Fault) -> None:
        line = self._line(fault)
        line.slow(fault.bytes_per_second)
        self._later(fault, lambda: line.slow(None))

    def _later(self, fault: Fault, end: Callable[[], None]) -> None:
        def act() -> None:
            end()
            self._end(fault)

        self._after(fault.lasts_seconds, act)

    def _fill_memory(self, fault: Fault) -> None:
        """Let Valkey have less memory than it uses: it refuses what would need more."""
        usual = ""
        with suppress(redis.RedisError), self._stack.redis_client() as client:
            usual = str(cast("Any", client).config_get("maxmemory")["maxmemory"])
            client.config_set("maxmemory", 1_000_000)

        def end() -> None:
            with suppress(redis.RedisError), self._stack.redis_client() as client:
                if usual:  # one that was killed meanwhile has it by its command line
                    client.config_set("maxmemory", usual)
            self._end(fault, did_harm=bool(usual))

        self._after(fault.lasts_seconds, end)

    def _flush_bells(self, fault: Fault) -> None:
        """Delete all that Dramatiq knows."""
        num_deleted = 0
        with suppress(redis.RedisError), self._stack.redis_client() as client:
            names = [*client.scan_iter(f"{DRAMATIQ_NAMESPACE}:*")]
            num_deleted = len(names) and client.delete(*names)
        self._end(fault, did_harm=bool(num_deleted))

    def _line(self, fault: Fault) -> Proxy:
        return self._stack.lines[fault.target]


def _told(fault: Fault) -> dict[str, Any]:
    return {name: value for name, value in asdict(fault).items() if name not in {"number", "kind"} and value}
