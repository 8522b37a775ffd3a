"""`restage submit` against a whole Restage: what a user types, sees and finds in the folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from server.child import Child

SUBMIT = [sys.executable, "-m", "server.cli", "submit"]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two photos of the same name in different folders, and a text that claims to be one."""
    made = [tmp_path / "a" / "hall.jpg", tmp_path / "b" / "hall.jpg", tmp_path / "text.jpg"]
    for number, file in enumerate(made[:2]):
        file.parent.mkdir()
        Image.linear_gradient("L").resize((200, 150 + 10 * number)).convert("RGB").save(file)
    made[2].write_text("no photo at all")
    return made


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep journals out of the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def run(url: str, *arguments: str | Path, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RESTAGE_URL": url, "RESTAGE_API_KEY": key}
    command = [*SUBMIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=150)


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def wait_until_live(stack) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if stack.client.http.get("/health/live").is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    pytest.fail(f"the API does not answer:\n{stack.logs()}")


def test_submit_stages_photos_and_reports_each_of_them(stack, photos: list[Path], tmp_path: Path) -> None:
    """Results of the same name are kept apart, a bad photo is told without stopping the others, the status says it."""
    worker = stack.start_worker()
    stack.wait_ready()
    url = str(stack.client.http.base_url)
    out = tmp_path / "out"

    done = run(url, *photos[:2], "--out", out, "--style", "industrial", "--param", "seed=7", "--label", "12 Oak St")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in sorted(out.iterdir())] == ["001-hall.webp", "002-hall.webp"]
    assert "2 of 2 done" in done.stdout
    assert "staged 2 of 2" in done.stderr

    mixed = run(url, photos[2], photos[0], "--out", out, "--param", "seed=7", "--style", "industrial", "--json")
    assert mixed.returncode == 1
    document = json.loads(mixed.stdout)
    assert [entry["status"] for entry in document["results"]] == ["refused", "succeeded"]
    assert "unsupported_format" in document["results"][0]["error"]
    assert document["batch"]["jobs"][0]["params"]["seed"] == 7
    # The same photo with the same settings and seed is the same picture, wherever it stands in a batch.
    assert Path(document["results"][1]["file"]).name == "002-hall.webp"
    assert pixels(out / "002-hall.webp") == pixels(out / "001-hall.webp")

    # A slip in the settings is told before anything is sent.
    for slip, hint in (("--param=steps=4", "num_inference_steps"), ("--style=modrn", "modern")):
        refused = run(url, photos[0], "--out", out, slip)
        assert refused.returncode == 1
        assert "does not take these settings" in refused.stderr
        assert hint in refused.stderr
        assert "sending" not in refused.stderr
    assert worker.is_running


def test_no_wait_and_interruption_leave_the_batch_to_the_server(stack, photos: list[Path], tmp_path: Path) -> None:
    """Without a worker nothing ends: --no-wait returns at once, Ctrl-C names the batch that goes on."""
    wait_until_live(stack)
    url = str(stack.client.http.base_url)

    accepted = run(url, photos[0], "--no-wait", "--json")
    assert accepted.returncode == 0, accepted.stderr
    assert json.loads(accepted.stdout)["batch"]["counts"]["queued"] == 1

    log_file = tmp_path / "submit.log"
    waiting = Child("submit", [*SUBMIT, str(photos[1]), "--out", str(tmp_path / "out")], log_file=log_file)
    waiting.start(os.environ | {"RESTAGE_URL": url})
    deadline = time.monotonic() + 60
    while "1 queued" not in waiting.tail() and time.monotonic() < deadline:
        time.sleep(0.05)
    waiting.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while waiting.is_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert waiting.poll() == 130
    batch_id = re.search(r"batch (\w{32}) goes on without you", waiting.tail())
    assert batch_id, waiting.tail()
    assert stack.client.batch(batch_id[1])["status"] == "queued"
    assert "the same command again goes on with it" in waiting.tail()


def test_key_is_asked_for_and_taken_from_the_environment(unstarted, photos: list[Path], tmp_path: Path) -> None:
    """With auth.mode keys a call without a key says how to get one; with it the batch is accepted."""
    keys_file = str(tmp_path / "keys.jsonl")
    unstarted.start("api", RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=keys_file)
    wait_until_live(unstarted)
    url = str(unstarted.client.http.base_url)

    refused = run(url, photos[0], "--no-wait")
    assert refused.returncode == 1
    assert "401 unauthorized" in refused.stderr
    assert "RESTAGE_API_KEY" in refused.stderr

    command = [sys.executable, "-m", "server.cli", "keys", "add", "studio-a"]
    environment = os.environ | {"RESTAGE_ENV": "test", "RESTAGE__AUTH__KEYS_FILE": keys_file}
    added = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run(url, photos[0], "--no-wait", key=added.stdout.split()[0]).returncode == 0
