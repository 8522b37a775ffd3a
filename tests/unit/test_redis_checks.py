"""What is said of a Redis by how it is set; real ones are asked in tests/integration/ledger/test_redis_checks.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from server.ledger.redis_checks import RedisConfig, judge

SAFE = RedisConfig(True, "always", False, 2**30, "noeviction")
COMPOSE = Path(__file__).parent.parent.parent / "compose.yaml"


def test_a_safe_redis_is_not_mentioned() -> None:
    """Where nothing can be lost there is nothing to say."""
    assert (judge(SAFE).problems, judge(SAFE).warnings) == ([], [])


def test_the_valkey_of_compose_is_safe() -> None:
    """What compose.yaml starts is what API and worker ask for."""
    words = yaml.safe_load(COMPOSE.read_text())["services"]["valkey"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    found = judge(
        RedisConfig(
            appendonly=options["--appendonly"] == "yes",
            appendfsync=options["--appendfsync"],
            pauses_fsync=options.get("--no-appendfsync-on-rewrite") == "yes",
            maxmemory_bytes=int(options["--maxmemory"].removesuffix("gb")) * 10**9,
            maxmemory_policy=options["--maxmemory-policy"],
        )
    )
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"appendonly": False}, "set appendonly yes"),
        ({"appendfsync": "no"}, "set appendfsync always"),
        ({"maxmemory_bytes": 0}, "set maxmemory, to"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru"),
        ({"maxmemory_policy": "volatile-ttl"}, "set maxmemory-policy noeviction"),
    ],
)
def test_each_mistake_says_what_to_set(change: dict[str, object], says: str) -> None:
    """One mistake is one line, which names the setting, and warns of nothing else."""
    found = judge(replace(SAFE, **change))
    assert len(found.problems) == 1
    assert says in found.problems[0]
    assert found.warnings == []


def test_all_mistakes_are_told_at_once() -> None:
    """Nobody has to start again for the next line."""
    found = judge(RedisConfig(True, "no", True, 0, "allkeys-lfu"))
    assert [line.split()[0] for line in found.problems] == ["appendfsync", "maxmemory", "maxmemory-policy"]
    assert [line.split()[0] for line in found.warnings] == ["no-appendfsync-on-rewrite"]
    # Without a file it does not matter when it is written.
    found = judge(RedisConfig(False, "everysec", True, 2**30, "noeviction"))
    assert ([line.split()[0] for line in found.problems], found.warnings) == (["appendonly"], [])


def test_a_compromise_is_only_warned_of() -> None:
    """Whoever syncs once a second is told what that may cost."""
    found = judge(replace(SAFE, appendfsync="everysec"))
    assert found.problems == []
    assert "the last two seconds" in found.warnings[0]


def test_what_is_not_told_is_doubted() -> None:
    """A Redis that says nothing of itself is not refused, and the warning names what is unknown."""
    found = judge(RedisConfig())
    assert found.problems == []
    assert "it does not tell appendonly, appendfsync, maxmemory, maxmemory-policy" in found.warnings[0]
    assert judge(replace(SAFE, appendfsync=None)).warnings[0].startswith("it does not tell appendfsync,")
