"""The folder of `restage up` is held by one process and keeps what the next start needs."""

import os
import stat

import pytest

from server.data_folder import DataFolder, DataFolderInUse
from server.webhook_secret import webhook_secret_bytes


@pytest.fixture
def folder(tmp_path):
    """Give a data folder that is not there yet."""
    made = DataFolder(tmp_path / "deep" / "data")
    with made.locked():
        pass
    return made


def test_folder_is_made_for_its_owner_alone(tmp_path):
    """A folder that is missing is made, closed to other users: it will hold photos."""
    folder = DataFolder(tmp_path / "deep" / "data")
    with folder.locked():
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_folder_is_held_by_one_at_a_time(folder):
    """A second holder is refused with the process id of the first and what to do; afterwards it is free again."""
    with (
        folder.locked(),
        pytest.raises(DataFolderInUse, match=rf"process id {os.getpid()}; .*--data"),
        DataFolder(folder.path).locked(),
    ):
        pass
    with DataFolder(folder.path).locked():
        pass


def test_store_keys_are_drawn_once_and_secret(folder):
    """The store's keys stay the same over starts, differ between folders and are for the owner's eyes only."""
    keys = folder.store_keys()
    assert DataFolder(folder.path).store_keys() == keys
    assert stat.S_IMODE((folder.path / "store-keys.json").stat().st_mode) == 0o600
    with DataFolder(folder.path / "other").locked():
        assert DataFolder(folder.path / "other").store_keys() != keys
    assert len(keys.secret_key) >= 40


def test_store_keys_outlive_a_crash_while_they_were_written(folder):
    """A half-written file of a start that crashed is not in the way."""
    (folder.path / "store-keys.new").write_text('{"acc')
    keys = folder.store_keys()
    assert DataFolder(folder.path).store_keys() == keys


def test_webhook_secret_is_drawn_once_and_secret(folder):
    """The secret that signs webhooks stays the same over starts, and is in a file for the owner's eyes only."""
    (folder.path / "webhook-secret.new").write_text("half")
    file = folder.webhook_secret_file()
    secret = file.read_text()
    assert len(webhook_secret_bytes(secret.strip())) == 32
    assert DataFolder(folder.path).webhook_secret_file() == file
    assert file.read_text() == secret
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_ports_are_remembered(folder):
    """Ports are kept for the next start; without a file, or with a broken one, others are chosen."""
    assert folder.read_ports() == {}
    folder.write_ports({"api": [8000]})
    assert DataFolder(folder.path).read_ports() == {"api": [8000]}
    (folder.path / "ports.json").write_text("{")
    assert folder.read_ports() == {}


def test_long_logs_are_put_aside(folder):
    """A log goes on over starts until it is long; then the next start begins a new one and keeps the old."""
    log = folder.log_file("api")
    log.parent.mkdir()
    log.write_text("short")
    assert folder.log_file("api").read_text() == "short"
    with log.open("wb") as file:
        file.truncate(11_000_000)
    assert not folder.log_file("api").exists()
    assert log.with_suffix(".log.1").stat().st_size == 11_000_000
