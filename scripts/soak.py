"""Let faults befall a whole Restage under load for as long as you like, and judge what it did by the history.

`make soak MINUTES=20` starts Valkey, a store, two API processes and two workers with the tiny twins, each behind fault
proxies; clients of several owners submit, follow, cancel and retry while processes are killed and paused, replies lost
and lines cut. When all is quiet again everything is read once more. The exit status is 0 where nothing is wrong, and 1
where a promise was broken. The report, the plot and the history lie in the folder that `--out` names.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench_options import count
from bench_report import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # for the harness, which the tests use too

from soak_plot import draw  # noqa: E402

from tests.chaos.checker import check  # noqa: E402
from tests.chaos.figures import as_markdown, summarize  # noqa: E402
from tests.chaos.history import read_history  # noqa: E402
from tests.chaos.load import Habits  # noqa: E402
from tests.chaos.mix import Plan, run_mix  # noqa: E402
from tests.chaos.stack import LEASE_SECONDS, SWEEP_SECONDS  # noqa: E402
from tests.chaos.story import tell_story  # noqa: E402

# Between two faults, on average.
_GAP_SECONDS = 4.2
# A poisoned job costs three restarts of workers.
_POISON_FROM_SECONDS, _POISON_EVERY_SECONDS = 60, 400


def main() -> int:
    """Run, judge, and write the report."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine = describe_machine()
    print("\n".join(f"{name}: {text}" for name, text in machine.items()))
    print(f"seed: {options.seed}\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    remove_earlier_run(options.out)
    started_at = time.monotonic()
    plan = make_plan(options.minutes * 60, options.seed)
    history = run_mix(plan, options.out, options.weights or make_weights(options.out))
    entries = [*read_history(history)]
    problems = check(tell_story(entries))
    summary = summarize(entries, problems)
    report = as_markdown(summary, bound_seconds=LEASE_SECONDS + SWEEP_SECONDS)
    command = shlex.join(["make", "soak", f"MINUTES={options.minutes:g}", f"SEED={options.seed}"])
    around = "; ".join(f"{name}: {one}" for name, one in machine.items())
    text = f"`{command}`, {around}\n\n{report}\n"
    (options.out / "report.md").write_text(text)
    (options.out / "report.json").write_text(json.dumps({"machine": machine, "seed": options.seed, **summary}) + "\n")
    draw(entries, options.out / "soak.png")
    print(f"{text}\ntook {time.monotonic() - started_at:.0f} s; {options.out} has history, report and plot")
    for problem in problems[:20]:
        print(f"{problem.rule} {problem.subject}: {problem.detail}")
    return int(bool(problems))


def make_plan(seconds: float, seed: int) -> Plan:
    """Describe a run of so many seconds of faults."""
    return Plan(
        seed=seed,
        seconds=seconds,
        gap_seconds=_GAP_SECONDS,
        drain_seconds=300,
        num_apis=2,
        num_workers=2,
        num_owners=4,
        num_clients=8,
        poison_seconds=tuple(range(_POISON_FROM_SECONDS, int(seconds) - _POISON_FROM_SECONDS, _POISON_EVERY_SECONDS)),
        habits=Habits(pause_seconds=1.0),
    )


def remove_earlier_run(folder: Path) -> None:
    """Remove what an earlier run has left: its jobs would be nobody's in this one."""
    for name in ("valkey", "store"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("*.log"), *folder.glob("*.jsonl"), *folder.glob("*.jsonl.lock")):
        path.unlink()


def make_weights(folder: Path) -> Path:
    """Make the weights of the tiny twins, in a process of its own that takes torch with it."""
    program = REPOSITORY / "scripts" / "make_tiny_weights.py"
    subprocess.run([sys.executable, str(program), "--out", str(folder / "weights")], check=True)  # noqa: S603 (ours)
    return folder / "weights"


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=20, help="of faults (default: 20)")
    add("--seed", type=count, default=1, help="of faults and clients (default: 1)")
    add("--out", type=Path, default=REPOSITORY / "soak-output", help="folder for everything (default: soak-output)")
    add("--weights", type=Path, help="folder with the tiny weights; made when left out")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes must be more than 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
