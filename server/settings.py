"""Every setting there is: its name, type, default and bounds; config/base.yaml explains them to operators."""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from server.config.layers import find_config_dir, load_layers
from server.hosts import normalise_host
from server.webhook_secret import check_webhook_secret

# Old dotted name → new one. An old name goes on working, with a warning that says the new one, until its line is
# taken out here.
RENAMED_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})

_TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600
_DAY_SECONDS = 24 * 3600
# A pause of three intervals between sweeps looks like an outage of Redis; at its begin a lease has two thirds left.
_SWEEPS_PER_LEASE = 4.5


def _check_redis_url(url: str) -> str:
    parts = urlsplit(url)
    is_right = parts.scheme == "unix" or (parts.scheme in {"redis", "rediss"} and parts.hostname and parts.port != 0)
    if not is_right:
        raise ValueError("needs a URL such as redis://127.0.0.1:6379/0 (redis, rediss or unix)")
    # A URL ends up in logs and error texts; a password must not.
    if parts.password or "password" in parse_qs(parts.query):
        raise ValueError("must not hold a password; set redis.password in the environment or redis.password_file")
    return url


def _check_http_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        raise ValueError("needs a URL such as https://restage.example.com, or null")
    return url.rstrip("/")


def _check_endpoint(endpoint: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", endpoint):
        raise ValueError("needs host:port without a scheme, such as 127.0.0.1:9000 (store.secure chooses https)")
    return endpoint


def _check_bucket(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
        raise ValueError("needs a bucket name: 3 to 63 lower-case letters, digits, dots and hyphens")
    return name


def _check_origin(origin: str) -> str:
    if not re.fullmatch(r"\*|https?://(\*\.)?([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?", origin):
        raise ValueError("needs an origin such as https://app.example.com, without a path, or *")
    return origin.lower().rstrip("/")  # as browsers write it


def _check_device(device: str) -> str:
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,2}", device):
        raise ValueError("needs cpu, or cuda and a number such as cuda:0")
    return device


def _check_host(host: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", host):
        raise ValueError("needs a host name or an address such as 127.0.0.1, without scheme or port")
    return host


def _check_allowed_host(host: str) -> str:
    try:
        normalise_host(host)
    except ValueError as error:
        raise ValueError("needs names of hosts or addresses, without scheme or port") from error
    return host


def _check_webhook_secret(secret: SecretStr) -> SecretStr:
    check_webhook_secret(secret.get_secret_value())
    return secret


def _check_key_prefix(prefix: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", prefix):
        raise ValueError("needs 1 to 32 letters, digits, hyphens, dots or underscores")
    return prefix


Count = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=_TEN_YEARS_SECONDS)]
WholeSeconds = Annotated[int, Field(ge=1, le=_TEN_YEARS_SECONDS)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Bucket = Annotated[str, AfterValidator(_check_bucket)]
Origin = Annotated[str, AfterValidator(_check_origin)]
AllowedHost = Annotated[str, AfterValidator(_check_allowed_host)]
Secret = Annotated[SecretStr, Field(min_length=1)]
WebhookSecret = Annotated[SecretStr, AfterValidator(_check_webhook_secret)]


class Section(BaseModel):
    """What all sections share: they cannot be changed, and a name that nobody reads is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerSettings(Section):
    """Where the API listens, and how the world calls it."""

    host: Annotated[str, AfterValidator(_check_host)] = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    public_url: HttpUrl | None = None
    header_timeout_seconds: Seconds = 30.0
    body_timeout_seconds: Seconds = 30.0
    min_body_bytes_per_second: Count = 5000
    send_timeout_seconds: float = Field(default=60.0, ge=1, le=3600)
    max_connections: int = Field(default=1000, ge=1, le=100_000)
    max_streams: int = Field(default=500, ge=1, le=100_000)


class RedisSettings(Section):
    """The Redis or Valkey that holds ledger and queues."""

    url: Annotated[str, AfterValidator(_check_redis_url)] = "redis://127.0.0.1:6379/0"
    password: Secret | None = None
    password_file: Path | None = None
    timeout_seconds: Seconds = 2.0
    allow_data_loss: bool = False
    key_prefix: Annotated[str, AfterValidator(_check_key_prefix)] = "restage"


class StoreSettings(Section):
    """The S3 store of photos and outputs; `public_*` is how clients reach it, where that differs."""

    endpoint: Endpoint = "127.0.0.1:9000"
    public_endpoint: Endpoint | None = None
    region: str = Field(default="us-east-1", min_length=1)
    secure: bool = False
    public_secure: bool | None = None
    access_key: Secret
    access_key_file: Path | None = None
    secret_key: Secret
    secret_key_file: Path | None = None
    uploads_bucket: Bucket = "restage-uploads"
    outputs_bucket: Bucket = "restage-outputs"
    cors_origins: list[Origin] = Field(default=["*"], max_length=50)
    lifecycle: bool = True
    connect_timeout_seconds: Seconds = 2.0
    read_timeout_seconds: Seconds = 30.0
    transfer_timeout_seconds: Seconds = 120.0
    pool_size: int = Field(default=16, ge=1, le=1024)


class AuthSettings(Section):
    """Who may call the API."""

    mode: Literal["none", "keys"] = "keys"
    keys_file: Path = Path("../.data/keys.jsonl")


class ModelsSettings(Section):
    """Which models of the registry are served, and from which weights."""

    file: Path = Path("models.yaml")
    weights_dir: Path = Path("../weights")
    default: str = Field(default="qwen-image-edit-2511", min_length=1)
    enabled: list[str] = Field(default=["qwen-image-edit-2511", "flux-kontext-dev"], min_length=1)
    removed_grace_seconds: Seconds = 900.0


class WorkerSettings(Section):
    """One worker process, which drives one device."""

    device: Annotated[str, AfterValidator(_check_device)] = "cuda:0"
    lease_seconds: Seconds = 15.0
    job_timeout_seconds: Seconds = 600.0
    load_timeout_seconds: Seconds = 900.0
    step_grace_seconds: Seconds = 60.0
    max_held_jobs: int = Field(default=2, ge=1, le=64)
    stage_threads: int = Field(default=4, ge=1, le=64)
    max_resident_models: int | None = Field(default=None, ge=1, le=64)
    memory_bytes: int | None = Field(default=None, ge=1)
    model_retry_seconds: Seconds = 30.0
    torch_threads: int | None = Field(default=None, ge=1, le=1024)
    poll_seconds: Seconds = 0.5
    max_errors: int = Field(default=3, ge=1, le=100)
    retry_base_seconds: Seconds = 2.0
    max_wait_seconds: Seconds = 300.0
    announce_seconds: Seconds = 5.0
    shutdown_timeout_seconds: Seconds = 600.0


class SweepSettings(Section):
    """How often each API process looks for leases that have run out, retries that are due and silent bells."""

    interval_seconds: Seconds = 2.0


class LimitsSettings(Section):
    """What one request may ask for, and how long what it gets is valid."""

    max_batch_items: int = Field(default=50, ge=1, le=1000)
    max_upload_bytes: Count = 50_000_000
    max_image_pixels: Count = 60_000_000
    min_image_side: int = Field(default=64, ge=1, le=10_000)
    max_open_jobs: Count = 100_000
    max_body_bytes: Count = 1_000_000
    max_prompt_characters: int = Field(default=4000, ge=1, le=100_000)
    form_ttl_seconds: WholeSeconds = 900
    unused_upload_ttl_seconds: WholeSeconds = _DAY_SECONDS
    idempotency_ttl_seconds: WholeSeconds = _DAY_SECONDS
    # A signature of S3 is valid for seven days at most. A job's URL is the same for half its life, and what is left of
    # it must be the five minutes that clients may rely on.
    output_url_ttl_seconds: int = Field(default=3600, ge=600, le=7 * _DAY_SECONDS)


class AdmissionSettings(Section):
    """When new jobs are refused for a while, since they could not be kept or would only wait."""

    max_memory_fraction: float = Field(default=0.8, gt=0, le=1)
    worker_grace_seconds: Seconds = 900.0


class RetentionSettings(Section):
    """How long things are kept after their batch has finished."""

    inputs_seconds: WholeSeconds = 7 * _DAY_SECONDS
    outputs_seconds: WholeSeconds = 7 * _DAY_SECONDS
    records_seconds: WholeSeconds = 30 * _DAY_SECONDS
    orphans_seconds: WholeSeconds = 3600


class WebhooksSettings(Section):
    """How receivers are told that a batch has finished; `secret` signs where there are no keys."""

    allowed_hosts: list[AllowedHost] = []
    timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    give_up_seconds: Seconds = _DAY_SECONDS
    secret: WebhookSecret | None = None
    secret_file: Path | None = None


class LogSettings(Section):
    """What is logged, and how it is written."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Settings(BaseModel):
    """The whole configuration of one process.

    Attributes:
        env_name: the layer that lies over base.yaml: `local`, `test`, `prod` or an operator's own.
        config_dir: the folder that the layers, and prompts.yaml beside them, were read from; absolute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    env_name: str
    config_dir: Path
    server: ServerSettings
    redis: RedisSettings
    store: StoreSettings
    auth: AuthSettings
    models: ModelsSettings
    worker: WorkerSettings
    sweep: SweepSettings
    limits: LimitsSettings
    admission: AdmissionSettings
    retention: RetentionSettings
    webhooks: WebhooksSettings
    log: LogSettings


def load_settings(
    config_dir: Path | None = None,
    env: Mapping[str, str] = os.environ,
    *,
    renamed: Mapping[str, str] = RENAMED_SETTINGS,
) -> Settings:
    """Read base.yaml, the layer that `RESTAGE_ENV` names, and the environment, the later over the earlier.

    A setting under an old name counts, and a `FutureWarning` names the new one. Relative paths are relative to the
    folder of the configuration where they stand in YAML, and to the current folder where they stand in the environment.

    Args:
        config_dir: folder of the YAML files; else `RESTAGE_CONFIG_DIR`, else the one beside the installed package.
        env: variables such as `RESTAGE__REDIS__URL`.
        renamed: old dotted names and what they are called now.

    Raises:
        ConfigError: anything is wrong; `problems` holds one line for every mistake there is.
    """
    folder = find_config_dir(config_dir, env)
    return load_layers(Settings, folder, env, renamed=renamed, find_contradictions=_find_contradictions)


def is_loopback(host: str) -> bool:
    """Tell whether a bind address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _find_contradictions(values: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Compare settings that are right by themselves.

    Args:
        values: by section and name; those with a mistake of their own are left out.

    Returns:
        (section, name, what is wrong with it) for each.
    """
    problems: list[tuple[str, str, str]] = []
    host, mode = values["server"].get("host"), values["auth"].get("mode")
    if mode == "none" and host is not None and not is_loopback(host):
        detail = "opens the server to anyone who reaches it while auth.mode is none; needs a loopback address, or keys"
        problems.append(("server", "host", detail))
    lease, interval = values["worker"].get("lease_seconds"), values["sweep"].get("interval_seconds")
    if lease is not None and interval is not None and lease < _SWEEPS_PER_LEASE * interval:
        detail = (
            f"needs at least {_SWEEPS_PER_LEASE} x sweep.interval_seconds ({interval}): "
            "else a short outage of Redis takes jobs from living workers"
        )
        problems.append(("worker", "lease_seconds", detail))
    for section, longer, other_section, shorter, why in (
        ("limits", "unused_upload_ttl_seconds", "limits", "form_ttl_seconds", "an upload must outlive its form"),
        ("retention", "records_seconds", "retention", "inputs_seconds", "a photo without a record is never removed"),
        ("retention", "records_seconds", "retention", "outputs_seconds", "an output without a record is never removed"),
    ):
        high, low = values[section].get(longer), values[other_section].get(shorter)
        if high is not None and low is not None and high < low:
            problems.append((section, longer, f"needs at least {other_section}.{shorter} ({low}): {why}"))
    return problems
