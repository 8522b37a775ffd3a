"""When a model that could not be loaded is looked at again."""

import time

from server.worker.refusals import LONGEST_RETRY_SECONDS, STARTING, Refusals


def test_each_failure_doubles_the_wait_up_to_an_hour() -> None:
    """Thousands of failures in a row are still a number, and no longer wait than an hour."""
    refusals = Refusals(["qwen"], retry_seconds=30.0)
    waits = [refusals.add("qwen", "torn") for _ in range(5000)]
    assert waits[:9] == [30, 60, 120, 240, 480, 960, 1920, LONGEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS]
    assert waits[-1] == LONGEST_RETRY_SECONDS


def test_only_what_was_refused_becomes_due() -> None:
    """A model is due after its wait, and no more once it is let in, served, or refused again."""
    refusals = Refusals(["qwen", "flux"], retry_seconds=0.02)
    assert refusals.reasons == {"qwen": STARTING, "flux": STARTING}
    assert refusals.may_load("qwen")
    refusals.end_start()
    refusals.add("qwen", "torn")
    assert (refusals.reasons, refusals.may_load("qwen")) == ({"qwen": "torn"}, False)
    time.sleep(0.03)
    assert refusals.due() == ["qwen"]
    refusals.lift("qwen")
    assert (refusals.due(), refusals.reasons) == ([], {})


def test_only_a_load_ends_a_row_of_failures() -> None:
    """A model that looks whole and then fails its load waits longer each time; after a load the first wait is short."""
    refusals = Refusals(["qwen"], retry_seconds=30.0)
    refusals.add("qwen", "torn")
    refusals.lift("qwen")
    assert refusals.add("qwen", "torn") == 60
    refusals.lift("qwen")
    refusals.forget("qwen")
    assert refusals.add("qwen", "torn") == 30
