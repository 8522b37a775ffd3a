"""The user of Redis that docs/security.md gives to operators may do what the scripts do."""

import importlib.resources
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
# Never given: what empties, stops or sets the server up, or reads what others do.
FORBIDDEN = {"flushall", "flushdb", "shutdown", "debug", "config|set", "acl", "monitor", "eval", "script|flush"}


def allowed_commands() -> set[str]:
    """Read the rules as an operator would paste them."""
    text = (REPOSITORY / "docs" / "security.md").read_text()
    [rules] = re.findall(r"^ACL SETUSER restage ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    return set(re.findall(r"(?<= \+)[\w|]+", rules))


def test_the_documented_user_may_run_every_script() -> None:
    """Each command of our scripts and of Dramatiq's is in the rules, so that no upgrade is a surprise."""
    scripts = [file.read_text() for file in REPOSITORY.glob("server/ledger/lua/*.lua")]
    scripts.append((importlib.resources.files("dramatiq") / "brokers" / "redis" / "dispatch.lua").read_text())
    used = {command.lower() for text in scripts for command in re.findall(r'redis\.p?call\("(\w+)"', text)}
    assert len(used) > 40, "the search has lost its way"
    allowed = allowed_commands()
    assert not used - {command.partition("|")[0] for command in allowed}
    assert not allowed & FORBIDDEN
