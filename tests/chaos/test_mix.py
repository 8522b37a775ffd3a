"""Everything at once: load, faults of every kind, then quiet; and nothing is lost, done twice or miscounted."""

import pytest

from tests.chaos.checker import check
from tests.chaos.figures import as_markdown, summarize
from tests.chaos.history import read_history
from tests.chaos.mix import Plan, run_mix
from tests.chaos.stack import LEASE_SECONDS, SWEEP_SECONDS
from tests.chaos.story import tell_story
from tests.conftest import need

SEED = 126


@pytest.mark.timeout(400)
def test_nothing_is_lost_or_done_twice_whatever_happens(weights_dir, tmp_path):
    """Faults of a minute from a fixed seed break no promise, and all that was accepted ends soon after the last."""
    from server.embedded import valkey_binary, weed_binary

    need(valkey_binary)
    need(weed_binary)
    plan = Plan(seed=SEED, seconds=55, gap_seconds=1.7, drain_seconds=120)
    history = run_mix(plan, tmp_path, weights_dir)
    entries = [*read_history(history)]
    story = tell_story(entries)
    problems = check(story)
    summary = summarize(entries, problems)
    print(f"seed {SEED}\n{as_markdown(summary, bound_seconds=LEASE_SECONDS + SWEEP_SECONDS)}")  # noqa: T201
    assert problems == []
    assert summary["faults"] >= 15
    assert summary["accepted_jobs"] >= 50
    assert summary["ends"]["succeeded"] >= 30
