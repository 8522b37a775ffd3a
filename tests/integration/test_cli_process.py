"""The command line as a process: what it loads, and how it ends when something is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from server.ports import free_ports

REPOSITORY = Path(__file__).parent.parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `restage` with these arguments and, of the variables for Restage, only these."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RESTAGE_")} | environment
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    """A command imports what it needs only when it runs."""
    script = "import sys, server.cli; print([m for m in ('torch', 'litestar', 'httpx', 'redis') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_configuration_as_it_is_shipped_is_usable() -> None:
    """The check passes on the files of the repository and names the models."""
    checked = run("config", "check", "--up", RESTAGE_ENV="local")
    assert checked.returncode == 0, checked.stderr
    assert "tiny-flux-kontext" in checked.stdout


def test_every_mistake_in_the_configuration_is_a_line() -> None:
    """Status 1, no traceback, both mistakes at once."""
    checked = run("config", "check", RESTAGE__SERVER__PORT="x", RESTAGE__REDIS__URL="http://127.0.0.1")
    assert checked.returncode == 1
    assert "Traceback" not in checked.stderr
    assert "RESTAGE__SERVER__PORT" in checked.stderr
    assert "RESTAGE__REDIS__URL" in checked.stderr
    assert "RESTAGE__STORE__SECRET_KEY" in checked.stderr


def test_mistakes_in_registry_and_prompts_come_together(tmp_path: Path) -> None:
    """One run of the check tells all, with file and line."""
    folder = tmp_path / "config"
    shutil.copytree(REPOSITORY / "config", folder)
    for name, right, wrong in (
        ("models", "family: flux_kontext", "kin: flux_kontext"),
        ("prompts", "rooms:", "romms:"),
    ):
        file = folder / f"{name}.yaml"
        file.write_text(file.read_text().replace(right, wrong, 1))
    checked = run("config", "check", "--up", RESTAGE_CONFIG_DIR=str(folder))
    assert checked.returncode == 1
    assert "models.yaml:" in checked.stderr
    assert "prompts.yaml:" in checked.stderr


def test_server_that_is_not_there_ends_a_command(tmp_path: Path) -> None:
    """Status 1 and what to do about it."""
    photo = tmp_path / "hall.jpg"
    photo.write_bytes(b"\xff\xd8\xff")
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    for arguments in (["submit", str(photo), "--out", str(tmp_path)], ["models"]):
        ended = run(*arguments, RESTAGE_URL=url, XDG_STATE_HOME=str(tmp_path))
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert "restage up" in ended.stderr


def test_data_folder_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    """`restage up` says which folder, and starts nothing."""
    (tmp_path / "file").touch()
    ended = run("up", "--data", str(tmp_path / "file" / "data"))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "give another folder" in ended.stderr


def test_keys_are_made_listed_and_withdrawn(tmp_path: Path) -> None:
    """The key is shown once, alone, and its webhooks' secret on standard error; a withdrawn key is gone."""
    environment = {"RESTAGE_ENV": "local", "RESTAGE__AUTH__KEYS_FILE": str(tmp_path / "keys.jsonl")}
    added = run("keys", "add", "studio-a", **environment)
    assert added.returncode == 0, added.stderr
    [key] = added.stdout.splitlines()
    assert key.startswith("rsk_")
    secret = added.stderr.split()[-1]
    assert secret.startswith("whsec_")
    listed = run("keys", "list", **environment).stdout
    key_id = key.split("_")[1]
    assert "studio-a" in listed
    assert key_id in listed
    assert key not in listed
    assert secret not in listed
    assert run("keys", "revoke", key_id, **environment).returncode == 0
    assert key_id not in run("keys", "list", **environment).stdout


def test_webhook_secrets_are_rotated_by_two_calls(tmp_path: Path) -> None:
    """The first call prints the new secret alone, for scripts; the second says that the old one is gone."""
    environment = {"RESTAGE_ENV": "local", "RESTAGE__AUTH__KEYS_FILE": str(tmp_path / "keys.jsonl")}
    added = run("keys", "add", "studio-a", **environment)
    first = added.stderr.split()[-1]
    key_id = added.stdout.split("_")[1]

    rotated = run("keys", "rotate-webhook", key_id, **environment)
    assert rotated.returncode == 0, rotated.stderr
    (second,) = rotated.stdout.splitlines()
    assert "webhook secrets: 2" in run("keys", "list", **environment).stdout
    assert second.startswith("whsec_")
    assert second != first
    assert key_id in rotated.stderr
    dropped = run("keys", "rotate-webhook", key_id, **environment)
    assert (dropped.returncode, dropped.stdout) == (0, "")
    assert f"key {key_id}: the older secret signs no more" in dropped.stderr
    unknown = run("keys", "rotate-webhook", "zzz", **environment)
    assert unknown.returncode == 1
    assert "there is no key 'zzz'" in unknown.stderr
    assert "Traceback" not in unknown.stderr
