"""The command line's own part: arguments, exit statuses and messages."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from server.cli import _parse_lora, restage


def run(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; returns its exit status and all that it printed."""
    result = CliRunner().invoke(restage, arguments)
    return result.exit_code, result.output


@pytest.fixture
def photo(tmp_path: Path) -> str:
    file = tmp_path / "hall.jpg"
    file.write_bytes(b"\xff\xd8\xff")
    return str(file)


def test_all_commands_are_listed() -> None:
    """The help names every command that operators are told of."""
    status, output = run("--help")
    assert status == 0
    for command in ("up", "api", "worker", "submit", "models", "config", "keys"):
        assert f"\n  {command} " in output


def test_missing_photo_is_a_mistake_in_the_command(tmp_path: Path) -> None:
    """Status 2, and the file is named."""
    status, output = run("submit", str(tmp_path / "missing.jpg"))
    assert status == 2
    assert "missing.jpg: there is no such file" in output


def test_folder_that_cannot_be_written_is_a_mistake_in_the_command(photo: str) -> None:
    """Status 2 before anything is sent."""
    status, output = run("submit", photo, "--out", photo)
    assert status == 2
    assert "choose another with --out" in output


@pytest.mark.parametrize("lora", ["oak=much", "oak="])
def test_malformed_loras_are_mistakes_in_the_command(photo: str, lora: str) -> None:
    """Status 2, with what was given and what is meant."""
    status, output = run("submit", photo, "--lora", lora)
    assert status == 2
    assert f"'{lora}' is not ID=SCALE" in output


def test_loras_are_read_with_and_without_a_scale() -> None:
    """Where no scale is given, the server's own counts."""
    assert _parse_lora("oak=0.5") == {"id": "oak", "scale": 0.5}
    assert _parse_lora("oak") == {"id": "oak"}


@pytest.mark.parametrize("params", [["seed"], ["=7"], ["seed=7", "seed=8"]])
def test_bad_parameters_are_a_mistake_in_the_command(photo: str, tmp_path: Path, params: list[str]) -> None:
    """Status 2, with what is allowed."""
    arguments = [part for param in params for part in ("--param", param)]
    status, output = run("submit", photo, "--out", str(tmp_path), *arguments)
    assert status == 2
    assert "--param" in output


def test_no_photo_is_a_mistake_in_the_command() -> None:
    """Status 2 and the usage."""
    status, output = run("submit")
    assert status == 2
    assert "Usage: " in output


@pytest.fixture
def key_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a key with limits; gives its id."""
    monkeypatch.setenv("RESTAGE_ENV", "local")
    monkeypatch.setenv("RESTAGE__AUTH__KEYS_FILE", str(tmp_path / "keys.jsonl"))
    limits = ("--requests-per-minute", "60", "--max-open-jobs", "none", "--max-bytes-per-day", "1000")
    status, output = run("keys", "add", "studio-a", *limits)
    assert status == 0, output
    return output.split("_")[1]


def test_limits_of_a_key_are_shown_and_changed(key_id: str) -> None:
    """The list shows what limits a key, and the change of some leaves the others."""
    assert run("keys", "list")[1].endswith("  studio-a  60 requests a minute  1000 bytes a day\n")
    changes = ("--max-open-jobs", "9", "--requests-per-minute", "none", "--max-priority", "low")
    status, output = run("keys", "limit", key_id, *changes)
    assert (status, output) == (0, run("keys", "list")[1])
    assert "  up to low     " in output
    assert output.endswith("  studio-a  9 open jobs  1000 bytes a day\n")
    assert run("keys", "limit", key_id)[1] == output


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "", "many", "9" * 30, "\u0661"])
def test_a_limit_is_a_whole_number(key_id: str, number: str) -> None:
    """Anything else is a mistake in the command, which says what is allowed and changes nothing."""
    before = run("keys", "list")[1]
    status, output = run("keys", "limit", key_id, f"--max-open-jobs={number}")
    assert status == 2
    assert "is neither a whole number from 1 nor none" in output
    assert run("keys", "list")[1] == before
