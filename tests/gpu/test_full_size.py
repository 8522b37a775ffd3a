"""A model at full size with random weights, as `scripts/gpu_check.py` measures it, within generous bounds."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from server.gpu_check.command import Check, find_device, parse
from server.gpu_check.task import PLAIN
from server.plan_command import every_entry
from server.settings import Settings

# The smallest of those that name a source; on the CPU only the code of these tests can be tried.
MODELS = {"cuda": "flux2-klein-4b", "cpu": "tiny-flux2-klein"}
# As a lane may add, beside what the timing itself is off by.
MOST_ADDED_PERCENT = 5.0
MOST_CANCEL_STEPS = 2.0


@pytest.fixture(scope="module")
def figures(device: str, weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, float | bool]:
    """Measure once for all tests of this file."""
    from server.settings import load_settings

    env = {"RESTAGE_ENV": "test", "RESTAGE__MODELS__WEIGHTS_DIR": str(weights_dir)}
    env |= {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}
    settings: Settings = load_settings(env=env)
    folder = tmp_path_factory.mktemp("gpu-check")
    # Generous: pytest-timeout counts this into the first test.
    options = parse(["--device", device, "--limit-seconds", "600", "--no-variants", "--steps", "8"])
    check = Check(settings, options, find_device(device, folder), folder)
    check.measure(every_entry(settings).get(MODELS[device.partition(":")[0]]))
    (result,) = check.results
    assert result.variant == PLAIN
    if result.outcome == "skipped":
        pytest.skip(result.reason)
    assert result.outcome == "measured", result.reason
    (plan,) = check.plans.values()
    return {**result.figures, "planned_bytes": plan.weights_bytes + plan.activation_bytes}


pytestmark = pytest.mark.timeout(900)


def test_the_lane_adds_little(cuda: str, figures: Mapping[str, float | bool]) -> None:
    """An edit that stops after each step takes hardly longer than a plain call of the pipeline."""
    assert figures["lane_adds_percent"] < MOST_ADDED_PERCENT


def test_pictures_are_the_same_bare_in_steps_and_resumed(figures: Mapping[str, float | bool]) -> None:
    """To the bit, on the same device."""
    assert figures["same_picture"] is True
    assert figures["resumed_same_picture"] is True


def test_a_cancel_frees_the_device_within_two_steps(cuda: str, figures: Mapping[str, float | bool]) -> None:
    """Longest of several, from the flag until nothing runs any more."""
    assert figures["cancel_max_steps"] < MOST_CANCEL_STEPS
    assert figures["preemption_max_steps"] < MOST_CANCEL_STEPS


def test_the_peak_is_within_the_plan(cuda: str, figures: Mapping[str, float | bool]) -> None:
    """The largest job takes no more than the memory plan says, its reserve not touched."""
    assert figures["peak_bytes"] <= figures["planned_bytes"]
