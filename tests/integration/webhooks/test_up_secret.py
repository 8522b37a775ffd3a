"""`restage up` signs webhooks out of the box, and leaves a secret of the operator's alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.data_folder import DataFolder
from server.settings import WebhooksSettings, load_settings
from server.supervisor import _Supervisor
from server.webhook_secret import new_webhook_secret


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """Give a folder that is held, as `restage up` does; nothing is started on it."""
    folder = DataFolder(tmp_path / "data")
    with folder.locked():
        yield folder.path


def settings_of_children(data_dir: Path) -> WebhooksSettings:
    """Load what API and workers would."""
    supervisor = _Supervisor(DataFolder(data_dir), 0, 1, lambda _line: None)
    supervisor._claim.release()
    return load_settings(env=supervisor._environment()).webhooks


def test_a_secret_is_brought(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is set, the API must get the one of the folder, the same at each start."""
    monkeypatch.setenv("RESTAGE_ENV", "test")

    first = settings_of_children(data_dir).secret
    assert first is not None
    assert first.get_secret_value() == (data_dir / "webhook-secret").read_text().strip()
    assert settings_of_children(data_dir).secret == first


def test_a_secret_that_is_set_is_kept(data_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A secret of the operator's, in the environment or in a file, must be the one that signs."""
    monkeypatch.setenv("RESTAGE_ENV", "test")
    in_environment, in_file = new_webhook_secret(), new_webhook_secret()

    monkeypatch.setenv("RESTAGE__WEBHOOKS__SECRET", in_environment)
    given = settings_of_children(data_dir).secret
    assert given is not None
    assert given.get_secret_value() == in_environment
    monkeypatch.delenv("RESTAGE__WEBHOOKS__SECRET")

    (tmp_path / "secret").write_text(in_file)
    monkeypatch.setenv("RESTAGE__WEBHOOKS__SECRET_FILE", str(tmp_path / "secret"))
    given = settings_of_children(data_dir).secret
    assert given is not None
    assert given.get_secret_value() == in_file
    assert not (data_dir / "webhook-secret").exists()
