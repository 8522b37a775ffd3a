"""API keys: what is kept of them, who they let in, and that no change to the file is lost."""

import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from server.errors import ConfigError, InvalidRequest, NotFound, Unauthorized
from server.keys import LOCAL_PRINCIPAL, KeyStore, KeysUnavailable, Principal
from server.webhook_secret import webhook_secret_bytes


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    """Give a store whose file, and the folder around it, do not exist yet."""
    return KeyStore(tmp_path / "secrets" / "keys.jsonl")


def id_of(key: str) -> str:
    return key.split("_")[1]


def test_a_key_lets_its_owner_in(keys: KeyStore) -> None:
    """A key must be of the announced form and give its owner, role and highest priority."""
    key = keys.add("agency", "user", max_priority="normal")

    assert re.fullmatch(r"rsk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key)
    assert keys.authenticate(f"Bearer {key}") == Principal("agency", "user", id_of(key), "normal")
    assert keys.authenticate(f"bearer   {key} ").owner == "agency"


def test_without_keys_the_caller_is_local() -> None:
    """With auth.mode none there is one caller, who may do everything."""
    assert Principal("local", "admin", "none") == LOCAL_PRINCIPAL
    assert LOCAL_PRINCIPAL.max_priority == "high"


def test_the_secret_is_not_kept(keys: KeyStore) -> None:
    """Neither the file nor what is listed may hold a key's secret, and the file is its owner's alone."""
    key = keys.add("agency", "admin")
    secret = key.split("_", 2)[2]

    content = keys.path.read_text()
    assert secret not in content
    assert json.loads(content)["owner"] == "agency"
    assert secret not in repr(keys.list())
    assert keys.list()[0].sha256 not in repr(keys.list())
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer x{key}",
        "Bearer {key} {key}",
        "Bearer rsk_00000000_" + "A" * 43,
        "Bearer rsk_{id}_" + "A" * 43,
        "Bearer rsk_{id}_",
        "Bearer rsk_{id}",
        "Bearer rsk_{id}_\u00e9" + "A" * 42,
        "Bearer {upper}",
        "Bearer \ud800",
    ],
)
def test_anything_else_is_refused(keys: KeyStore, header: str | None) -> None:
    """A missing, malformed, unknown or altered key must be refused, without telling which of these it is."""
    key = keys.add("agency", "admin")
    if header is not None:
        header = header.format(key=key, id=id_of(key), upper=key.upper())

    with pytest.raises(Unauthorized) as caught:
        keys.authenticate(header)
    assert caught.value.http_status == 401
    if header is not None:
        assert caught.value.detail == "this key is not valid; the header Authorization holds: Bearer <key>"


@given(st.text(max_size=80))
def test_no_header_breaks_the_check(header: str) -> None:
    """Whatever a header holds, the answer must be that it is no key."""
    with pytest.raises(Unauthorized):
        KeyStore(Path("/nowhere/keys")).authenticate(header)


def test_changes_count_at_once(keys: KeyStore) -> None:
    """A running server must see keys that another process adds and revokes, without being told."""
    server = KeyStore(keys.path)
    with pytest.raises(Unauthorized):
        server.authenticate("Bearer x")

    first = keys.add("a", "user")
    assert server.authenticate(f"Bearer {first}").owner == "a"
    second = keys.add("b", "admin")
    assert server.authenticate(f"Bearer {second}").owner == "b"
    keys.revoke(id_of(first))
    with pytest.raises(Unauthorized):
        server.authenticate(f"Bearer {first}")
    assert server.authenticate(f"Bearer {second}").owner == "b"
    keys.path.unlink()
    with pytest.raises(Unauthorized):
        server.authenticate(f"Bearer {second}")


def test_an_unchanged_file_is_read_once(keys: KeyStore) -> None:
    """As long as the file is the same, a check must not read it again."""
    key = keys.add("a", "user")
    status = keys.path.stat()
    keys.authenticate(f"Bearer {key}")

    # The same size, time and inode, and yet other content: only a second reading would notice.
    content = keys.path.read_text()
    keys.path.write_text(content.replace('"a"', '"b"'))
    os.utime(keys.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert keys.authenticate(f"Bearer {key}").owner == "a"


def test_keys_are_listed_oldest_first(keys: KeyStore) -> None:
    """The list must hold each key that is not revoked, in the order they were made."""
    made = [keys.add(owner, "user") for owner in ("a", "b", "c")]
    keys.revoke(id_of(made[1]))

    assert [(record.id, record.owner) for record in keys.list()] == [(id_of(made[0]), "a"), (id_of(made[2]), "c")]
    assert KeyStore(keys.path.with_name("none")).list() == []


def test_revoking_an_unknown_key_is_refused(keys: KeyStore) -> None:
    """Revoking what is not there must be told, with what is."""
    key = keys.add("a", "user")

    with pytest.raises(NotFound, match=f"there is no key 'zzz'; there are {id_of(key)}"):
        keys.revoke("zzz")
    assert len(keys.list()) == 1


@pytest.mark.parametrize("owner", ["", "a b", "ä", "a/b", "a\n", "-a", "x" * 65, "a:b"])
def test_owners_have_plain_names(keys: KeyStore, owner: str) -> None:
    """An owner's name ends up in keys of the ledger and in logs, so it must be plain."""
    with pytest.raises(InvalidRequest, match="not allowed: owner"):
        keys.add(owner, "user")
    assert keys.list() == []


def test_keys_made_at_the_same_time_are_all_kept(keys: KeyStore) -> None:
    """Two commands at once must not lose each other's key."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: KeyStore(keys.path).add(f"owner{number}", "user"), range(24)))

    assert {record.id for record in keys.list()} == {id_of(key) for key in made}
    assert [path.name for path in keys.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_line_shuts_out_only_itself(keys: KeyStore) -> None:
    """A line that is no key must be logged and ignored by servers, and stop every change until it is mended."""
    key = keys.add("a", "user")
    with keys.path.open("a") as file:
        file.write('\n{"id": "0"}\nnot json\n' + keys.path.read_text().splitlines()[0] + "\n")

    with capture_logs() as logs:
        assert keys.authenticate(f"Bearer {key}").owner == "a"
        keys.authenticate(f"Bearer {key}")
    assert [log["event"] for log in logs] == ["keys.line_ignored"] * 3
    expected = [
        f"{keys.path}:3: is no key as `restage keys add` writes it",
        f"{keys.path}:4: is no key as `restage keys add` writes it",
        f"{keys.path}:5: the id {id_of(key)} is given twice",
    ]
    assert [log["problem"] for log in logs] == expected
    for change in (lambda: keys.add("b", "user"), lambda: keys.revoke(id_of(key)), keys.list):
        with pytest.raises(ConfigError) as caught:
            change()
        assert caught.value.problems == expected


def test_a_file_that_cannot_be_read_is_told(keys: KeyStore) -> None:
    """An unreadable file must not look like a wrong key: the server says 503, a command names the file."""
    keys.path.mkdir(parents=True)

    with pytest.raises(KeysUnavailable, match="Is a directory") as caught:
        keys.authenticate("Bearer x")
    assert caught.value.http_status == 503
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        keys.list()


def test_a_key_has_a_secret_for_its_webhooks(keys: KeyStore) -> None:
    """Each key must have a secret of its own, which is gone with the key and is never shown by accident."""
    first, second = id_of(keys.add("a", "user")), id_of(keys.add("b", "user"))
    server = KeyStore(keys.path)

    (secret,) = server.webhook_secrets(first)
    assert len(webhook_secret_bytes(secret)) == 32
    assert server.webhook_secrets(second) not in {(), (secret,)}
    assert secret not in repr(keys.list())
    assert server.webhook_secrets("none") == ()
    keys.revoke(first)
    assert server.webhook_secrets(first) == ()


def test_a_webhook_secret_is_rotated_in_two_steps(keys: KeyStore) -> None:
    """First both secrets must sign, the newer one first; then the newer one alone. Nothing else may change."""
    key = keys.add("a", "user", max_priority="low")
    other = id_of(keys.add("b", "user"))
    key_id, others = id_of(key), keys.webhook_secrets(other)
    (old,) = keys.webhook_secrets(key_id)

    new = keys.rotate_webhook(key_id)
    assert new is not None
    assert new != old
    assert KeyStore(keys.path).webhook_secrets(key_id) == (new, old)
    assert keys.rotate_webhook(key_id) is None
    assert KeyStore(keys.path).webhook_secrets(key_id) == (new,)

    assert keys.authenticate(f"Bearer {key}") == Principal("a", "user", key_id, "low")
    assert keys.webhook_secrets(other) == others
    with pytest.raises(NotFound, match="there is no key 'zzz'"):
        keys.rotate_webhook("zzz")


def test_a_key_of_before_webhooks_gets_its_secret_by_rotation(keys: KeyStore) -> None:
    """A line without a secret must let its owner in, sign nothing, and get a secret only when somebody is told it."""
    key = keys.add("a", "user")
    line = json.loads(keys.path.read_text())
    del line["webhook_secrets"]
    keys.path.write_text(json.dumps(line) + "\n")

    assert keys.authenticate(f"Bearer {key}").owner == "a"
    keys.add("b", "user")
    assert keys.webhook_secrets(id_of(key)) == ()
    new = keys.rotate_webhook(id_of(key))
    assert keys.webhook_secrets(id_of(key)) == (new,)


@pytest.mark.parametrize("secrets", [["whsec_short"], ["x"] * 3, "whsec_", None, [1]])
def test_a_line_with_other_secrets_is_damaged(keys: KeyStore, secrets: object) -> None:
    """A secret that cannot sign must be told like any damage to the file, not met when a webhook is due."""
    keys.add("a", "user")
    keys.path.write_text(json.dumps(json.loads(keys.path.read_text()) | {"webhook_secrets": secrets}) + "\n")

    with pytest.raises(ConfigError, match=":1: is no key"):
        keys.list()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file that cannot be written must be told by its path."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be written: File exists"):
        KeyStore(tmp_path / "file" / "keys.jsonl").add("a", "user")


def test_a_linked_file_stays_linked(keys: KeyStore, tmp_path: Path) -> None:
    """A keys file that is a link must be replaced where it points to."""
    keys.path.parent.mkdir()
    keys.path.symlink_to(tmp_path / "real.jsonl")

    keys.add("a", "user")

    assert keys.path.is_symlink()
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 1


def test_a_file_keeps_its_rights(keys: KeyStore) -> None:
    """Whoever may read the file may read what replaces it: an API of another user goes on when root adds a key."""
    keys.add("agency", "user")
    keys.path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(keys.path, 12_345, 12_346)
    before = keys.path.stat()
    keys.add("second", "user")
    after = keys.path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert after.st_ino != before.st_ino


def test_a_key_has_the_limits_that_it_was_given(keys: KeyStore) -> None:
    """Limits must be told of whoever calls, as they are now; what is not named must not limit, and stay as it is."""
    key = keys.add("a", "user", requests_per_minute=60, max_bytes_per_day=10**15)
    server = KeyStore(keys.path)
    expected = Principal("a", "user", id_of(key), "high", requests_per_minute=60, max_bytes_per_day=10**15)
    assert server.authenticate(f"Bearer {key}") == expected

    before = keys.list()[0]
    changed = keys.limit(id_of(key), requests_per_minute=None, max_open_jobs=1, max_priority="low")
    assert keys.list() == [changed]
    assert changed == before.model_copy(update={"requests_per_minute": None, "max_open_jobs": 1, "max_priority": "low"})
    expected = Principal("a", "user", id_of(key), "low", max_open_jobs=1, max_bytes_per_day=10**15)
    assert server.authenticate(f"Bearer {key}") == expected
    with pytest.raises(NotFound, match="there is no key 'zzz'"):
        keys.limit("zzz", max_open_jobs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requests_per_minute", 0),
        ("requests_per_minute", 10**6 + 1),
        ("max_open_jobs", -1),
        ("max_bytes_per_day", 10**15 + 1),
        ("max_bytes_per_day", 1.5),
        ("max_open_jobs", "many"),
        ("max_priority", "highest"),
        ("max_priority", None),
    ],
)
def test_other_limits_are_refused(keys: KeyStore, name: str, value: object) -> None:
    """A limit that makes no sense must be told with what is allowed, and change nothing."""
    key = keys.add("a", "user", max_open_jobs=5)
    limits: Any = {name: value}

    for change in (lambda: keys.add("b", "user", **limits), lambda: keys.limit(id_of(key), **limits)):
        with pytest.raises(InvalidRequest, match=f"not allowed: {name}; .*a whole number from 1 to 1000000, "):
            change()
    (record,) = keys.list()
    assert (record.max_open_jobs, record.max_priority) == (5, "high")


def test_a_key_of_before_limits_goes_on_working(keys: KeyStore) -> None:
    """Lines of before there were limits have none, and lines without limits are written as they were then."""
    key = keys.add("a", "user")
    fields = json.loads(keys.path.read_text())
    assert fields.keys() == {"id", "owner", "role", "max_priority", "created_at", "sha256", "webhook_secrets"}

    assert keys.authenticate(f"Bearer {key}") == Principal("a", "user", id_of(key))
    keys.limit(id_of(key), max_open_jobs=3)
    keys.limit(id_of(key), max_open_jobs=None)
    assert json.loads(keys.path.read_text()) == fields
