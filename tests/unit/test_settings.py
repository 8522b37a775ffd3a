"""Settings: layers, secrets, old names, and that every mistake is told at once, in its place, without a secret."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from server.config.names import settings_of, variable_name
from server.errors import ConfigError
from server.settings import Settings, is_loopback, load_settings

CONFIG_DIR = Path(__file__).parents[2] / "config"
SECRETS = {"RESTAGE__STORE__ACCESS_KEY": "access", "RESTAGE__STORE__SECRET_KEY": "secret"}
# Never part of a message by chance.
SECRET = "hunter2-qx7"  # noqa: S105 - no password of anything

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Give a function that writes layers into an empty folder: `write(base="…", local="…")`."""

    def write_layers(**layers: str) -> Path:
        for name, text in {"base": "", "local": "", **layers}.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    return write_layers


def problems_of(config_dir: Path, env: Mapping[str, str] = SECRETS, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(config_dir, env, **options)
    return [problem.replace(f"{config_dir}/", "") for problem in caught.value.problems]


def settings_or_problems(config_dir: Path) -> Settings | list[str]:
    try:
        return load_settings(config_dir, SECRETS)
    except ConfigError as error:
        return error.problems


@pytest.mark.parametrize("env_name", ["local", "test", "prod"])
def test_shipped_layers_load(env_name: str) -> None:
    """Each layer that is shipped must load with nothing but the store's keys in the environment."""
    settings = load_settings(CONFIG_DIR, {"RESTAGE_ENV": env_name, **SECRETS})

    assert settings.env_name == env_name
    assert settings.config_dir == CONFIG_DIR
    assert (settings.auth.mode == "none") == (env_name != "prod")
    assert settings.models.file == CONFIG_DIR / "models.yaml"
    assert settings.models.weights_dir == CONFIG_DIR.parent / "weights"


def test_base_lists_every_setting_with_its_default() -> None:
    """base.yaml must list every setting that is no secret, with the value that counts where it is left out."""
    content = yaml.safe_load((CONFIG_DIR / "base.yaml").read_text())

    listed = {section: set(values) for section, values in content.items()}
    known = {
        section: {name for name, setting in names.items() if not setting.is_secret}
        for section, names in settings_of(Settings).items()
    }
    assert listed == known
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text("")
        (Path(folder) / "local.yaml").write_text("")
        defaults = load_settings(Path(folder), SECRETS)
        (Path(folder) / "base.yaml").write_text((CONFIG_DIR / "base.yaml").read_text())
        assert load_settings(Path(folder), SECRETS) == defaults


def test_later_layers_win(write: Write) -> None:
    """The environment must win over the named layer, and that over base.yaml, one setting at a time."""
    folder = write(
        base="server: {port: 1, public_url: 'https://base.example'}\nworker: {max_errors: 4}",
        prod="server: {port: 2}\nworker:\n  # only a comment\n",
    )

    settings = load_settings(folder, {"RESTAGE_ENV": "prod", "RESTAGE__SERVER__HOST": "::1", **SECRETS})
    assert (settings.server.port, settings.server.host, settings.worker.max_errors) == (2, "::1", 4)
    settings = load_settings(folder, {"RESTAGE_ENV": "prod", "RESTAGE__SERVER__PORT": "3", **SECRETS})
    assert (settings.server.port, settings.server.public_url) == (3, "https://base.example")


def test_default_layer_is_local(write: Write) -> None:
    """Without RESTAGE_ENV, or with an empty one, local.yaml must be the layer."""
    folder = write(local="server: {port: 7}", prod="server: {port: 8}")

    assert load_settings(folder, SECRETS).server.port == 7
    assert load_settings(folder, {"RESTAGE_ENV": "", **SECRETS}).server.port == 7


def test_folder_comes_from_the_environment(write: Write) -> None:
    """RESTAGE_CONFIG_DIR must choose the folder, and one that does not exist must be named."""
    folder = write(local="server: {port: 7}")

    settings = load_settings(env={"RESTAGE_CONFIG_DIR": str(folder), **SECRETS})
    assert (settings.server.port, settings.config_dir) == (7, folder)
    with pytest.raises(ConfigError, match=r"/nowhere: there is no such folder; RESTAGE_CONFIG_DIR"):
        load_settings(env={"RESTAGE_CONFIG_DIR": str(folder / "nowhere")})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("SERVER__PORT", "9000", 9000),
        ("LIMITS__MAX_OPEN_JOBS", " 1_000 ", 1000),
        ("WORKER__LEASE_SECONDS", "12.5", 12.5),
        ("WORKER__LEASE_SECONDS", "13", 13.0),
        ("WORKER__TORCH_THREADS", "", None),
        ("WORKER__TORCH_THREADS", "null", None),
        ("STORE__SECURE", "true", True),
        ("STORE__PUBLIC_SECURE", "", None),
        ("STORE__REGION", "123", "123"),
        ("STORE__REGION", "true", "true"),
        ("SERVER__PUBLIC_URL", "https://a.example/", "https://a.example"),
        ("SERVER__PUBLIC_URL", "null", None),
        ("MODELS__ENABLED", '["a", "b"]', ["a", "b"]),
        ("MODELS__ENABLED", "[a, 'no']", ["a", "no"]),
        ("MODELS__ENABLED", "[a, off]", ["a", "off"]),
        ("LOG__LEVEL", "debug", "debug"),
        ("AUTH__KEYS_FILE", "/etc/restage/keys", Path("/etc/restage/keys")),
        ("AUTH__KEYS_FILE", "keys", Path.cwd() / "keys"),
    ],
)
def test_variables_are_read_as_their_setting_wants(write: Write, variable: str, text: str, value: object) -> None:
    """A variable must give text to a setting of text, and numbers, lists, booleans and null to the others."""
    section, name = variable.lower().split("__")

    settings = load_settings(write(), {f"RESTAGE__{variable}": text, **SECRETS})

    assert getattr(getattr(settings, section), name) == value


def test_plain_values_mean_what_they_say(write: Write) -> None:
    """YAML 1.1's traps must be no traps: `off` is text, 010 is not eight, 1:30 is not ninety."""
    folder = write(local="auth: {mode: off}\nserver: {port: 010}\nworker: {max_errors: 1:30}\nmodels: {default: no}")

    assert problems_of(folder) == [
        "local.yaml:1: auth.mode = 'off': needs none or keys",
        "local.yaml:2: server.port = 10.0: needs a whole number from 0 to 65535",
        "local.yaml:3: worker.max_errors = '1:30': needs a whole number from 1 to 100",
    ]


def test_paths_are_relative_to_where_they_are_written(write: Write) -> None:
    """A relative path in YAML must start from the folder of the configuration, whatever the current folder is."""
    folder = write(local="models: {weights_dir: ../w, file: my.yaml}\nauth: {keys_file: /etc/keys}")

    settings = load_settings(folder, SECRETS)

    assert settings.models.weights_dir == folder.parent / "w"
    assert settings.models.file == folder / "my.yaml"
    assert settings.auth.keys_file == Path("/etc/keys")


def test_secrets_come_from_files_and_the_environment(write: Write) -> None:
    """A secret must come from the file that *_file names, without its line end, or from the environment over it."""
    folder = write(local="store: {secret_key_file: secret.txt, access_key_file: nowhere.txt}")
    (folder / "secret.txt").write_text(f" {SECRET} \r\n")

    settings = load_settings(folder, {"RESTAGE__STORE__ACCESS_KEY": "from-env", "RESTAGE__REDIS__PASSWORD": ""})

    assert settings.store.access_key.get_secret_value() == "from-env"
    assert settings.store.secret_key.get_secret_value() == f" {SECRET} "
    assert settings.redis.password is None
    assert SECRET not in repr(settings)


def test_secrets_that_cannot_be_had_are_told(write: Write) -> None:
    """A secret in YAML, a missing one, an unreadable file and two sources at once must each be told, never shown."""
    folder = write(
        local=f"store:\n  secret_key: {SECRET}\n  access_key_file: nowhere.txt\nredis:\n  password: {SECRET}\n"
    )
    (folder / "empty.txt").write_text("\n")

    assert problems_of(folder, {}) == [
        (
            "local.yaml:2: store.secret_key: is a secret and may not stand in YAML; "
            "set RESTAGE__STORE__SECRET_KEY or store.secret_key_file"
        ),
        "local.yaml:3: store.access_key_file = 'nowhere.txt': cannot be read: No such file or directory",
        (
            "local.yaml:5: redis.password: is a secret and may not stand in YAML; "
            "set RESTAGE__REDIS__PASSWORD or redis.password_file"
        ),
        "environment: store.secret_key: is missing; set RESTAGE__STORE__SECRET_KEY or store.secret_key_file",
    ]
    both = {"RESTAGE__REDIS__PASSWORD": SECRET, "RESTAGE__REDIS__PASSWORD_FILE": str(folder / "empty.txt")}
    assert problems_of(write(), {**both, **SECRETS}) == [
        "environment: RESTAGE__REDIS__PASSWORD_FILE: is set together with RESTAGE__REDIS__PASSWORD; set one of them"
    ]
    empty = {"RESTAGE__REDIS__PASSWORD_FILE": str(folder / "empty.txt")}
    assert problems_of(write(), {**empty, **SECRETS}) == [
        "environment: RESTAGE__REDIS__PASSWORD_FILE: needs text that is not empty"
    ]


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    """Every mistake of every layer must be told at once, with file, line, key, value and what is allowed."""
    folder = write(
        base="server:\n  port: 99999\n  prot: 80\nport: 5\nstor: {a: b}\nsweep: 7\nlog:\n",
        local="server:\n  port: 80\n\nstore:\n  region: 123\n  pool_size: '7'\n  secure: 1\nworker:\n"
        "  device: cuda\n  torch_threads: 0\n  max_errors: true\n  poll_seconds: null\n  lease_seconds: .inf\n"
        "models:\n  enabled:\n    - a\n    - 1\n    - [b]\n  default: {x: y}\n  weights_dir: 3\n",
    )
    env = {
        "RESTAGE__STOER__X": SECRET,
        "RESTAGE__STORE__SECRETKEY": SECRET,
        "RESTAGE__LIMITS__MAX_OPEN_JOBS": "5e3",
        "RESTAGE__MODELS__ENABLED": "a,b",
        "RESTAGE__STORE": "x",
        "RESTAGE_STORE__REGION": "x",
        "restage__store__region": "x",
        **SECRETS,
    }

    assert problems_of(folder, env) == [
        "base.yaml:2: server.port = 99999: needs a whole number from 0 to 65535",
        "base.yaml:3: server.prot = 80: is unknown; did you mean server.port?",
        "base.yaml:4: port: is unknown; did you mean server.port?",
        "base.yaml:5: stor: is unknown; did you mean store?",
        "base.yaml:6: sweep = 7: needs settings below it, each on a line of its own",
        "local.yaml:5: store.region = 123: needs text, not empty; put it in quotes",
        "local.yaml:6: store.pool_size = '7': needs a whole number from 1 to 1024",
        "local.yaml:7: store.secure = 1: needs true or false",
        "local.yaml:9: worker.device = 'cuda': needs cpu, or cuda and a number such as cuda:0",
        "local.yaml:10: worker.torch_threads = 0: needs a whole number from 1 to 1024, or null",
        "local.yaml:11: worker.max_errors = true: needs a whole number from 1 to 100",
        "local.yaml:12: worker.poll_seconds = null: needs a number over 0 and at most 315360000",
        "local.yaml:13: worker.lease_seconds = '.inf': needs a number over 0 and at most 315360000",
        "local.yaml:17: models.enabled[1] = 1: needs text; put it in quotes",
        "local.yaml:18: models.enabled[2] = a list: needs text",
        "local.yaml:19: models.default = a mapping: needs text, not empty",
        "local.yaml:20: models.weights_dir = 3: needs a path",
        (
            "environment: RESTAGE__STOER__X: is unknown; store has endpoint, public_endpoint, region, secure, "
            "public_secure, access_key, access_key_file, secret_key, secret_key_file, uploads_bucket, outputs_bucket, "
            "cors_origins, lifecycle, connect_timeout_seconds, read_timeout_seconds, transfer_timeout_seconds, "
            "pool_size"
        ),
        "environment: RESTAGE__STORE__SECRETKEY: is unknown; did you mean RESTAGE__STORE__SECRET_KEY?",
        "environment: RESTAGE__STORE: is unknown; settings are named RESTAGE__SECTION__NAME, in upper case",
        "environment: RESTAGE_STORE__REGION: is unknown; settings are named RESTAGE__SECTION__NAME, in upper case",
        "environment: restage__store__region: is unknown; settings are named RESTAGE__SECTION__NAME, in upper case",
        "environment: RESTAGE__MODELS__ENABLED = 'a,b': needs a list such as [a, b], not empty",
        "environment: RESTAGE__LIMITS__MAX_OPEN_JOBS = 5000.0: needs a whole number from 1 to 1000000000",
    ]


def test_other_variables_are_left_alone(write: Write) -> None:
    """Variables of the client, and those that Kubernetes sets for services named restage, must be no mistakes."""
    env = {"RESTAGE_URL": "x", "RESTAGE_API_KEY": "x", "RESTAGE_PORT": "tcp://10.0.0.1:80", "RESTAGE_REDIS_PORT": "x"}

    folder = write()
    assert load_settings(folder, {**env, **SECRETS}) == load_settings(folder, SECRETS)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "local.yaml:1: needs sections of settings such as `server:`, not a list"),
        ("just text", "local.yaml:1: needs sections of settings such as `server:`, not 'just text'"),
        ("server:\n\tport: 1\n", "local.yaml:2: is not YAML: a tab stands where YAML needs spaces"),
        ("server: {port: 1\nlog: {}\n", "local.yaml:2: is not YAML: did not find expected ',' or '}'"),
        ("server:\n  host: a: b\n", "local.yaml:2: is not YAML: mapping values are not allowed in this context"),
        ("log: {}\n---\nlog: {}\n", "local.yaml:2: is not YAML: found another document"),
        ("log: !!python/object:a.b {}", "local.yaml:1: is not YAML: a value that begins with ! must stand in quotes"),
        ("log:\n  level: *hunter2-qx7\n", "local.yaml:2: is not YAML: found undefined alias"),
        ("log: {level: !hunter2-q x}", "local.yaml:1: is not YAML: a value that begins with ! must stand in quotes"),
        ("? [a]\n: b\n", "local.yaml:1: is not YAML: found unhashable key"),
        ("log: {}\nlog: \0", "local.yaml:2: is not UTF-8 text: control characters are not allowed"),
        ("log: {level: info,\n level: debug}", "local.yaml:2: log.level: is given twice, first in line 1"),
        ("log: {}\nlog: {}", "local.yaml:2: log: is given twice, first in line 1"),
        ("log:\n  level: info\n  <<: {}\n", "local.yaml:3: log.<< = a mapping: is unknown; log has level, format"),
        ("true: {}\n", ("local.yaml:1: True: is unknown; the sections are server, redis, store, auth, models, worker, "
         "sweep, limits, admission, retention, webhooks, log")),
        ("env_name: x\n", ("local.yaml:1: env_name: is unknown; the sections are server, redis, store, auth, models, "
         "worker, sweep, limits, admission, retention, webhooks, log")),
    ],
)  # fmt: skip
def test_odd_files_are_told_with_their_line(write: Write, text: str, problem: str) -> None:
    """A file that is no mapping of sections must be told with the line and without quoting what may be a secret."""
    assert problems_of(write(local=text)) == [problem]


def test_an_unreadable_file_hides_no_other_mistake(write: Write) -> None:
    """Mistakes beside a broken file must be told, but not what may well stand in that file."""
    folder = write(base="server: {prot: 1}", local="store:\n  access_key_file: [")

    assert problems_of(folder, {}) == [
        "base.yaml:1: server.prot = 1: is unknown; did you mean server.port?",
        "local.yaml:2: is not YAML: did not find expected node content",
    ]


def test_missing_files_are_told(write: Write) -> None:
    """A missing base.yaml, a folder in its place and bytes that are no text must each be told."""
    folder = write()
    (folder / "base.yaml").unlink()
    assert problems_of(folder) == ["base.yaml: no such file or directory"]
    (folder / "base.yaml").mkdir()
    assert problems_of(folder) == ["base.yaml: is a directory"]
    (folder / "base.yaml").rmdir()
    (folder / "base.yaml").write_bytes(b"log: {}\nsweep: \xff\n")
    assert problems_of(folder) == ["base.yaml:2: is not UTF-8 text: invalid leading UTF-8 octet"]


@pytest.mark.parametrize("env_name", ["prd", "../local", "base", "models", "prompts", "loc*", "a/b"])
def test_unknown_layers_are_refused(write: Write, env_name: str) -> None:
    """RESTAGE_ENV must name a layer of the folder, and nothing else that happens to be there."""
    folder = write(prod="", models="[]", prompts="{}")

    (problem,) = problems_of(folder, {"RESTAGE_ENV": env_name, **SECRETS})

    assert problem.startswith(f"environment: RESTAGE_ENV = '{env_name}': names no layer: there is no {env_name}.yaml")
    assert problem.endswith("; there are local, prod")


def test_old_names_go_on_working_with_a_warning(write: Write) -> None:
    """A renamed setting must count under its old name, in each layer, and the warning must say the new one."""
    renamed = {"worker.lease": "worker.lease_seconds", "queue.url": "redis.url", "store.key": "store.secret_key"}
    folder = write(base="worker: {lease_seconds: 15}", local="worker:\n  poll_seconds: 1\n  lease: 14\n")

    with pytest.warns(FutureWarning, match=r"local.yaml:3: worker.lease: was renamed; write worker.lease_seconds"):
        settings = load_settings(folder, SECRETS, renamed=renamed)
    assert settings.worker.lease_seconds == 14
    old_variable = {"RESTAGE__WORKER__LEASE": "16", **SECRETS}
    with pytest.warns(FutureWarning) as caught:
        settings = load_settings(folder, old_variable, renamed=renamed)
    assert settings.worker.lease_seconds == 16
    assert str(caught[1].message) == (
        "environment: RESTAGE__WORKER__LEASE: was renamed; write RESTAGE__WORKER__LEASE_SECONDS"
    )


@pytest.mark.parametrize("lines", [("lease: 14", "lease_seconds: 15"), ("lease_seconds: 15", "lease: 14")])
def test_old_and_new_name_together_are_refused(write: Write, lines: tuple[str, str]) -> None:
    """A layer that sets one thing under two names must be refused, whichever comes first."""
    folder = write(local="worker:\n" + "".join(f"  {line}\n" for line in lines))

    (problem,) = problems_of(folder, renamed={"worker.lease": "worker.lease_seconds"})

    assert problem.startswith("local.yaml:3: worker.lease")
    assert "is set twice, as worker.lease" in problem


def test_a_mistake_under_an_old_name_is_told_there(write: Write) -> None:
    """A wrong value, and a secret in YAML, must be told under the old name where it stands."""
    renamed = {"worker.lease": "worker.lease_seconds", "queue.password": "redis.password", "queue.url": "redis.url"}
    folder = write(local=f"worker:\n  lease: 0\nqueue:\n  url: 1\n  password: {SECRET}\n")

    assert problems_of(folder, renamed=renamed) == [
        "local.yaml:2: worker.lease = 0: needs a number over 0 and at most 315360000",
        "local.yaml:4: queue.url = 1: needs text; put it in quotes",
        (
            "local.yaml:5: queue.password: is a secret and may not stand in YAML; "
            "set RESTAGE__REDIS__PASSWORD or redis.password_file"
        ),
    ]


@pytest.mark.parametrize(
    ("setting", "value", "is_right"),
    [
        ("redis.url", "redis://h:1/0", True),
        ("redis.url", "rediss://user@h/0", True),
        ("redis.url", "unix:///run/redis.sock", True),
        ("redis.url", f"redis://:{SECRET}@h", False),
        ("redis.url", f"redis://h/0?password={SECRET}", False),
        ("redis.url", "http://h", False),
        ("redis.url", "redis://", False),
        ("redis.url", "redis://h:99999/0", False),
        ("redis.url", "redis://[::1/0", False),
        ("redis.key_prefix", "a:b", False),
        ("store.endpoint", "s3.example.com", True),
        ("store.endpoint", "[::1]:9000", True),
        ("store.endpoint", f"http://me:{SECRET}@h:9000", False),
        ("store.uploads_bucket", "Up", False),
        ("server.public_url", "https://h/path", True),
        ("server.public_url", f"https://me:{SECRET}@h", False),
        ("server.public_url", "ftp://h", False),
        ("server.host", "http://h", False),
        ("worker.device", "cuda:3", True),
        ("worker.device", "cpu:0", False),
    ],
)
def test_text_settings_are_checked(write: Write, setting: str, value: str, is_right: bool) -> None:
    """Addresses, URLs, buckets and devices must be refused where they cannot work, and passwords in them not shown."""
    section, name = setting.split(".")
    folder = write(local=yaml.safe_dump({section: {name: value}}))
    env = {"RESTAGE__SERVER__HOST": "localhost", **SECRETS} if setting != "server.host" else SECRETS

    if is_right:
        assert getattr(getattr(load_settings(folder, env), section), name) == value
    else:
        (problem,) = problems_of(folder, env)
        assert problem.startswith(f"local.yaml:2: {setting} = ")
        assert SECRET not in problem


@pytest.mark.parametrize(
    ("host", "is_open"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", True),  # noqa: S104 - nothing is bound
        ("::", True),
        ("10.0.0.1", True),
        ("example.com", True),
        ("localhost.example.com", True),
        ("::ffff:0.0.0.0", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:127.0.0.1", True),
        ("127.0.0.1.example.com", True),
        ("127.1", True),
        ("0", True),
    ],
)
def test_without_keys_only_loopback_is_served(write: Write, host: str, is_open: bool) -> None:
    """auth.mode none must be refused on any address that another machine can reach."""
    folder = write(local=f"auth: {{mode: none}}\nserver: {{host: '{host}'}}")

    assert is_loopback(host) != is_open
    if is_open:
        assert problems_of(folder) == [
            (
                f"local.yaml:2: server.host = '{host}': opens the server to anyone who reaches it while auth.mode is "
                "none; needs a loopback address, or keys"
            )
        ]
    else:
        load_settings(folder, SECRETS)
    load_settings(folder, {"RESTAGE__AUTH__MODE": "keys", **SECRETS})


def test_contradictions_are_told_beside_other_mistakes(write: Write) -> None:
    """Settings that are right alone but not together must be told, also when others are wrong by themselves."""
    folder = write(local="retention: {records_seconds: 5}\nlimits: {form_ttl_seconds: 90000}\nserver: {port: x}")

    assert problems_of(folder) == [
        (
            "local.yaml:1: retention.records_seconds = 5: needs at least retention.inputs_seconds (604800): "
            "a photo without a record is never removed"
        ),
        (
            "local.yaml:1: retention.records_seconds = 5: needs at least retention.outputs_seconds (604800): "
            "an output without a record is never removed"
        ),
        "local.yaml:3: server.port = 'x': needs a whole number from 0 to 65535",
        (
            "environment: RESTAGE__LIMITS__UNUSED_UPLOAD_TTL_SECONDS = 86400: needs at least limits.form_ttl_seconds "
            "(90000): an upload must outlive its form"
        ),
    ]


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@example(b"a: &a [*a]")
@example(b"&a {a: *a, a: *a}")
@example(b"[" * 2000)
@example(b"server: {port: " + b"9" * 5000 + b"}")
@example(b"server: {port: !!int x, host: !!bool 1}")
@example(b"\xff\xfes\x00")
@hypothesis_settings(deadline=None, max_examples=150)
def test_no_bytes_break_the_loader(content: bytes) -> None:
    """Whatever bytes a layer holds, loading must end with settings or with a ConfigError that has a line to read."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_bytes(b"")
        (Path(folder) / "local.yaml").write_bytes(content)
        outcome = settings_or_problems(Path(folder))

    assert outcome
    assert isinstance(outcome, Settings) or all("\n" not in line and len(line) < 1000 for line in outcome)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [(section, name) for section, names in settings_of(Settings).items() for name in names]


@given(st.sampled_from(NAMES), JSON_VALUES)
@hypothesis_settings(deadline=None, max_examples=200)
def test_any_value_is_taken_or_told_in_its_place(path: tuple[str, str], value: Any) -> None:
    """Any value of any setting must either be in the settings as it was written, or be told with its line and name."""
    section, name = path
    # Keys make every address right, so that only the value itself decides.
    content = {"auth": {"mode": "keys"}}
    content[section] = {**content.get(section, {}), name: value}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text("")
        (Path(folder) / "local.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        outcome = settings_or_problems(Path(folder))

    if not isinstance(outcome, Settings):
        # A contradiction may be told at the other setting.
        assert all(f"{section}.{name}" in line or "needs at least" in line for line in outcome)
        return
    loaded = getattr(getattr(outcome, section), name)
    is_derived = isinstance(loaded, Path) or settings_of(Settings)[section][name].is_secret or name == "public_url"
    assert is_derived or (loaded == value and isinstance(value, bool) == isinstance(loaded, bool))


@given(st.data())
@hypothesis_settings(deadline=None, max_examples=100)
def test_layers_merge_setting_by_setting(data: st.DataObject) -> None:
    """For any values in any layers, each setting must have the value of the last layer that gives one."""
    names = ["worker.max_errors", "worker.stage_threads", "limits.max_batch_items", "store.pool_size", "server.port"]
    layer = st.dictionaries(st.sampled_from(names), st.integers(1, 60))
    base, local, variables = data.draw(layer), data.draw(layer), data.draw(layer)
    env = {variable_name(*name.split(".")): str(value) for name, value in variables.items()}
    with tempfile.TemporaryDirectory() as folder:
        for file_name, values in (("base", base), ("local", local)):
            sections: dict[str, dict[str, int]] = {}
            for name, value in values.items():
                sections.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value
            (Path(folder) / f"{file_name}.yaml").write_text(yaml.safe_dump(sections))
        settings = load_settings(Path(folder), {**env, **SECRETS})

    for name, expected in {**base, **local, **variables}.items():
        section, key = name.split(".")
        assert getattr(getattr(settings, section), key) == expected


@given(
    st.sampled_from(["secret_key", "secretkey", "SECRET_KEY", "access_key", "passwrd", "api_token", "endpoint"]),
    st.sampled_from(["{}: {}", "{}: [{}]", "{}: {{a: {}}}", "{}: '{}", "{}: !{}", "{}: *{}", "{}: http://u:{}@h"]),
)
@hypothesis_settings(deadline=None)
def test_a_secret_in_the_wrong_place_is_never_shown(name: str, template: str) -> None:
    """Wherever a secret was put by mistake, under a right name or a misspelt one, no message may repeat it."""
    line = template.format(name, SECRET)
    if name == "endpoint" and "://" not in line:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base.yaml").write_text("")
        (Path(folder) / "local.yaml").write_text(f"store:\n  {line}\n")
        problems = problems_of(Path(folder), {**SECRETS, f"RESTAGE__STORE__{name.upper()}X": SECRET})

    assert SECRET not in "\n".join(problems)
    assert any(problem.startswith("local.yaml:") for problem in problems)


def test_settings_cannot_be_changed() -> None:
    """Settings are shared by everything in a process, so an attempt to change one must fail."""
    settings = load_settings(CONFIG_DIR, SECRETS)

    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.env_name = "x"


def test_loading_is_fast() -> None:
    """Loading must take less than ten times the 5 ms that it is meant to take."""
    seconds: list[float] = []
    for _ in range(20):
        start = time.perf_counter()
        load_settings(CONFIG_DIR, SECRETS)
        seconds.append(time.perf_counter() - start)

    assert statistics.median(seconds) < 0.050


@pytest.mark.parametrize(("lease", "is_right"), [(9, True), (8.9, False)])
def test_lease_outlasts_the_sweeps(write: Write, lease: float, is_right: bool) -> None:
    """A lease of less than 4.5 sweep intervals is refused: an outage of Redis would be taken for dead workers."""
    folder = write(local=f"worker: {{lease_seconds: {lease}}}\nsweep: {{interval_seconds: 2}}")
    if is_right:
        assert load_settings(folder, SECRETS).worker.lease_seconds == lease
    else:
        (problem,) = problems_of(folder)
        assert problem.startswith(f"local.yaml:1: worker.lease_seconds = {lease}: needs at least 4.5 x")


@pytest.mark.parametrize("host", ["localhost", "10.0.0.7", "::1", "[::1]", "b\u00fccher.intern", "Receiver_1.lan."])
def test_hosts_that_webhooks_may_call(write: Write, host: str) -> None:
    """Names and addresses are taken as they are written."""
    folder = write(local=yaml.safe_dump({"webhooks": {"allowed_hosts": [host]}}))
    assert load_settings(folder, SECRETS).webhooks.allowed_hosts == [host]


@pytest.mark.parametrize(
    "host", ["", "http://localhost", "localhost:9000", "[::1]:80", "a..b", "a b", "*.lan", "10.0.0.0/8"]
)
def test_hosts_that_are_none_are_told(write: Write, host: str) -> None:
    """What would never match a host must be told at the start, in its place."""
    (problem,) = problems_of(write(local=yaml.safe_dump({"webhooks": {"allowed_hosts": ["ok", host]}})), SECRETS)
    assert problem.startswith("local.yaml:")
    assert "webhooks.allowed_hosts" in problem
    assert problem.endswith("needs names of hosts or addresses, without scheme or port")


def test_the_webhook_secret_has_its_form(write: Write) -> None:
    """A secret that receivers' libraries would not take must be told, with what is needed and without being shown."""
    secret = "whsec_" + "QUJD" * 8
    settings = load_settings(write(), {"RESTAGE__WEBHOOKS__SECRET": secret, **SECRETS})
    assert settings.webhooks.secret is not None
    assert settings.webhooks.secret.get_secret_value() == secret
    assert load_settings(write(), {"RESTAGE__WEBHOOKS__SECRET": "", **SECRETS}).webhooks.secret is None

    folder = write(local="webhooks: {secret_file: secret.txt}")
    (folder / "secret.txt").write_text(f"{secret}\n")
    assert load_settings(folder, SECRETS).webhooks.secret == settings.webhooks.secret
    (folder / "secret.txt").write_text(SECRET)
    needed = "needs whsec_ and 24 to 64 random bytes in base64"
    assert problems_of(folder, SECRETS) == [f"local.yaml:1: webhooks.secret_file: {needed}"]
    assert problems_of(write(), {"RESTAGE__WEBHOOKS__SECRET": SECRET, **SECRETS}) == [
        f"environment: RESTAGE__WEBHOOKS__SECRET: {needed}"
    ]
