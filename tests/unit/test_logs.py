"""One format for all that a process logs, ours and that of libraries."""

import json
import logging
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys, warnings
import structlog
from server.logs import configure_logging
from server.settings import LogSettings
configure_logging(LogSettings(level="info", format=sys.argv[1]))
log = structlog.stdlib.get_logger()
log.debug("job.hidden")
with structlog.contextvars.bound_contextvars(request_id="r-1"):
    log.info("job.finished", job_id="ü-1")
log.info("request.answered", path="/a\\x1b[2J\\u202e\\n2026-01-01T00:00:00Z [info] feigned")
logging.getLogger("library").warning("words of a %s", "library")
logging.getLogger("uvicorn.error").info("hidden words")
logging.getLogger("urllib3.connectionpool").warning("hidden tries")
warnings.warn("take care", stacklevel=1)
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("job.failed", exc_info=error)
"""


def log_of(log_format):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, log_format], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert "hidden" not in done.stderr
    return done.stderr


def test_json_is_one_object_a_line():
    """Every event is a line of JSON with level, time and context; tracebacks are inside."""
    entries = [json.loads(line) for line in log_of("json").splitlines()]
    assert [entry["event"] for entry in entries[:3]] == ["job.finished", "request.answered", "words of a library"]
    assert all(entry["timestamp"].endswith("Z") and entry["level"] for entry in entries)
    assert (entries[0]["job_id"], entries[0]["request_id"]) == ("ü-1", "r-1")
    assert "take care" in entries[3]["event"]
    assert (entries[4]["event"], entries[4]["level"]) == ("job.failed", "error")
    assert "ZeroDivisionError" in entries[4]["exception"]


@pytest.mark.parametrize("text", ["job.finished", "job_id=ü-1", "words of a library", "take care", "ZeroDivisionError"])
def test_lines_for_people_hold_the_same(text):
    """The console format shows events, fields, libraries' words and tracebacks, without colours in a file."""
    log = log_of("console")
    assert text in log
    assert "\x1b[" not in log


def test_what_strangers_write_stays_on_its_line():
    """A path with control characters cannot move a terminal's cursor, turn its text around, or feign a line."""
    [line] = [line for line in log_of("console").splitlines() if "feigned" in line]
    assert "request.answered" in line
    assert line.isprintable()


def test_configuring_again_does_not_double_lines():
    """A process that configures twice still writes each event once."""
    twice = SCRIPT.replace("log = ", "configure_logging(LogSettings(level='info', format='json'))\nlog = ")
    done = subprocess.run([sys.executable, "-c", twice, "json"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.count("job.finished") == 1
    assert logging.getLogger("library").handlers == []
