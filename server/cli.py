"""The command line: one thin command for each thing to do; a command imports what it needs when it runs."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from server.client.errors import BadPhotos, ClientError
from server.errors import ConfigError, ServerError
from server.reconcile.command_line import reconcile

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.counting import Quantization
    from server.key_file import KeyLimits, KeyRecord, Role
    from server.keys import KeyStore
    from server.settings import Settings

_EXIT_USAGE = 2
# More than any machine has, for a while.
_MAX_VRAM_GIB = 100_000

_url_option = click.option(
    "--url",
    envvar="RESTAGE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The server; or set RESTAGE_URL. A key for it is read from RESTAGE_API_KEY only.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="restage")
def restage() -> None:
    """Stage photos of empty rooms on your own GPUs."""


@restage.command()
@click.option(
    "--data",
    "data_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".data"),
    show_default=True,
    help="Folder of everything that is kept; started again on it, open jobs go on.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the API; 0 takes a free one.")
@click.option("--workers", "num_workers", type=click.IntRange(1, 16), default=1, show_default=True)
def up(data_dir: Path, port: int | None, num_workers: int) -> None:
    """Run everything on this machine: Valkey, an S3 store, the API and workers."""
    import os

    from server.supervisor import run_supervisor

    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError([f"--data {data_dir}: cannot be made ({error.strerror}); give another folder"]) from error
    if not os.access(data_dir, os.W_OK | os.X_OK):
        raise ConfigError([f"--data {data_dir}: may not be written by you; give another folder"])
    sys.exit(run_supervisor(data_dir, port=port, num_workers=num_workers))


@restage.command()
def api() -> None:
    """Run the HTTP API against a Redis and a store that are already there."""
    from server.main import serve
    from server.settings import load_settings

    sys.exit(serve(load_settings()))


@restage.command()
@click.option("--device", help="cpu, or cuda:0 and so on; over worker.device of the settings.")
def worker(device: str | None) -> None:
    """Run one worker, which drives one device."""
    from server.ledger.redis_checks import check_redis_if_there
    from server.logs import configure_logging
    from server.settings import load_settings
    from server.worker.decoding import start_decoders

    settings = load_settings()
    configure_logging(settings.log)
    check_redis_if_there(settings.redis)
    decoders = start_decoders(settings)
    # Behind the line above: this brings torch, and the decoders begin beside its long import.
    from server.worker.main import run_worker

    sys.exit(run_worker(settings, decoders, device))


@restage.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--room-type", help="living_room, bedroom, kitchen, … (`default` when left out).")
@click.option("--style", help="modern, scandinavian, industrial, … (`modern` when left out).")
@click.option("--model", help="Id of a model; see `restage models`.")
@click.option("--prompt", help="Your own words, in place of those of room type and style.")
@click.option("--negative-prompt", help="What to keep away from, for models that have it.")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the model, such as seed=7.")
@click.option("--lora", "loras", multiple=True, metavar="ID[=SCALE]", help="A LoRA of the model; scale 1 if left out.")
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    default=Path("staged"),
    show_default=True,
    help="Folder for the results. Files of the same name are replaced.",
)
@click.option("--label", help="A name for the batch, such as an address.")
@click.option("--zip", "as_archive", is_flag=True, help="Fetch all results at the end as <label or batch id>.zip.")
@click.option("--no-wait", is_flag=True, help="Submit, print the batch's id and return.")
@click.option("--anew", is_flag=True, help="Submit a new batch, whatever became of an earlier run of this command.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of a table.")
@_url_option
def submit(
    photos: tuple[Path, ...],
    params: tuple[str, ...],
    loras: tuple[str, ...],
    out_dir: Path,
    as_archive: bool,
    no_wait: bool,
    anew: bool,
    as_json: bool,
    url: str,
    **given: str | None,
) -> None:
    """Stage PHOTOS as one batch and fetch the results as 001-<name>.webp and so on.

    The same command again goes on with a run that was cut off, or that did not wait: photos that arrived are not sent
    again, and no second batch is made. Once all results are there, it stages the photos anew.

    Exit status: 0 when all are done, 1 when some were refused or failed or the server does not take them, 2 for a
    mistake in the command, 130 when it was interrupted.
    """
    from server.client.command import Fetching, submit_photos
    from server.client.photos import check_photos, prepare_folder
    from server.client.request import BatchRequest

    try:
        check_photos(photos)
        if not no_wait:
            prepare_folder(out_dir)
    except BadPhotos as error:
        _print_errors(error.problems)
        sys.exit(_EXIT_USAGE)
    label = given.pop("label")
    defaults: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if params:
        defaults["params"] = _parse_params(params)
    if loras:
        defaults["loras"] = [_parse_lora(lora) for lora in loras]
    request = BatchRequest(photos=photos, defaults=defaults, label=label)
    fetching = None if no_wait else Fetching(out_dir, as_archive)
    sys.exit(submit_photos(url, request, fetching, anew=anew, as_json=as_json))


def _parse_params(params: tuple[str, ...]) -> dict[str, Any]:
    """Read `KEY=VALUE` pairs; a value is JSON (7, 2.5, true) or else text."""
    parsed: dict[str, Any] = {}
    for param in params:
        key, sign, value = param.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"'{param}' is not KEY=VALUE, such as seed=7", param_hint="--param")
        if key in parsed:
            raise click.BadParameter(f"'{key}' is given twice", param_hint="--param")
        try:
            parsed[key] = json.loads(value, parse_constant=_refuse_constant)
        except ValueError:
            parsed[key] = value
    return parsed


def _parse_lora(lora: str) -> dict[str, Any]:
    """Read `ID` or `ID=SCALE`."""
    lora_id, sign, scale = lora.partition("=")
    try:
        return {"id": lora_id, "scale": float(scale)} if sign else {"id": lora_id}
    except ValueError:
        raise click.BadParameter(f"'{lora}' is not ID=SCALE, such as oak=0.8", param_hint="--lora") from None


def _refuse_constant(name: str) -> None:
    """Read NaN and Infinity as text, as JSON has it: the server then says what it takes instead."""
    raise ValueError(name)


@restage.group(invoke_without_command=True)
@_url_option
@click.pass_context
def models(context: click.Context, url: str) -> None:
    """List the models of a server, and why one is not ready."""
    from server.client.command import print_models

    if context.invoked_subcommand is None:
        print_models(url)


@models.command("plan")
@click.argument("model_ids", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--vram", "vram_gib", type=float, required=True, help="Memory of the whole GPU in GiB, as nvidia-smi shows it."
)
@click.option(
    "--quantization",
    type=click.Choice(["none", "int8", "fp8"]),
    help="Of the weights of the transformers' linear layers, whatever the entries say; as they say when left out.",
)
def plan_models(model_ids: tuple[str, ...], vram_gib: float, quantization: "Quantization | None") -> None:
    """Count what models take of a GPU, and which fit beside which; without a GPU, a server or the weights.

    MODEL is the id of an entry of models.yaml, enabled or not; all that name a source when left out. A model whose
    weights are here is counted from their own configuration, another from the published one.
    """
    import os

    # NaN is in no range, and is neither below nor above one.
    if not 0 < vram_gib <= _MAX_VRAM_GIB:
        raise click.BadParameter(f"{vram_gib:g} is not over 0 and at most {_MAX_VRAM_GIB}, in GiB", param_hint="--vram")
    # Set before the libraries that read it are imported: nothing here may reach for a network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from server.plan_command import print_plan
    from server.registry import ModelNotFound

    try:
        sys.exit(print_plan(_load_settings_without_store(), model_ids, vram_gib, quantization))
    except ModelNotFound as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from error


@restage.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@click.option("--up", "for_up", is_flag=True, help="As `restage up` sees it, which brings Redis and the store itself.")
def check(for_up: bool) -> None:
    """Check settings, registry and prompts without reaching for anything; every mistake is reported."""
    from server.prompts import Prompts
    from server.registry import load_registry
    from server.settings import load_settings

    settings = _load_settings_without_store() if for_up else load_settings()
    problems: list[str] = []
    for load in (lambda: load_registry(settings), lambda: Prompts.load(settings.config_dir)):
        try:
            load()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    click.echo(f"the configuration '{settings.env_name}' in {settings.config_dir} is usable")
    click.echo(f"models: {', '.join(settings.models.enabled)}")


@restage.group()
def weights() -> None:
    """Fetch the weights of models, and compare them with what was recorded."""


@weights.command("fetch")
@click.argument("model")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Holds a token of the hub, for models that are gated; no other token is ever used.",
)
@click.option(
    "--endpoint",
    envvar="HF_ENDPOINT",
    default="https://huggingface.co",
    show_default=True,
    help="The hub, or a mirror of it; or set HF_ENDPOINT.",
)
def fetch_weights(model: str, token_file: Path | None, endpoint: str) -> None:
    """Fetch the weights of MODEL, an id of the registry, and of its LoRAs, from where their `source` says.

    Only what is loaded is fetched: safetensors, configurations and vocabularies, never pickles or code. The same
    command again goes on with one that was cut off. HF_HUB_OFFLINE does not keep this one command from the network.

    Exit status: 0 when all is there, 1 when something could not be fetched, 130 when it was interrupted.
    """
    from server.weights.command import fetch_weights

    sys.exit(fetch_weights(_load_settings_without_store(), model, endpoint, token_file))


@weights.command("verify")
@click.argument("models", nargs=-1)
@click.option("--record", is_flag=True, help="Record weights that were carried here by hand, without a manifest.")
def verify_weights(models: tuple[str, ...], record: bool) -> None:
    """Compare the weights of MODELS, or of all enabled ones, with their manifests; reads every byte.

    Exit status: 0 when all are as recorded, 1 when not, with a line for each file that is not.
    """
    from server.weights.command import verify_weights

    sys.exit(verify_weights(_load_settings_without_store(), models, record=record))


@restage.group()
def keys() -> None:
    """Make and withdraw the API keys of this machine."""


def _read_limit(_context: click.Context, _option: click.Parameter, text: str | None) -> int | str | None:
    """Read a whole number from 1, or `none`; how high a limit may be is for the file of keys to say."""
    if text is None or text == "none":
        return text
    if not re.fullmatch("[1-9][0-9]{0,17}", text):
        raise click.BadParameter(f"'{text}' is neither a whole number from 1 nor none")
    return int(text)


def _limit_options(command: "Callable[..., None]") -> "Callable[..., None]":
    """Give a command an option for each limit of a key; those that are not named come as None."""
    for option, explanation in (
        ("--max-bytes-per-day", "Bytes of photos that it announces or sends."),
        ("--max-open-jobs", "Jobs of its owner that may be queued or running, with those that it adds."),
        ("--requests-per-minute", "Calls of the API."),
    ):
        command = click.option(option, callback=_read_limit, metavar="N|none", help=explanation)(command)
    priorities = click.Choice(["high", "normal", "low"])
    return click.option("--max-priority", type=priorities, help="The highest priority of its jobs.")(command)


def _read_limits(options: dict[str, Any]) -> "KeyLimits":
    named = {name: None if value == "none" else value for name, value in options.items() if value is not None}
    return cast("KeyLimits", named)


@keys.command("add")
@click.argument("owner")
@click.option("--role", type=click.Choice(["user", "admin"]), default="user", show_default=True)
@_limit_options
def add_key(owner: str, role: "Role", **options: Any) -> None:
    """Make a key for OWNER and print it; on standard error, the secret (whsec_…) that signs its webhooks.

    Neither is shown again. Limits that are not named do not limit; `restage keys limit` changes them later.
    """
    keys = _open_keys()
    key = keys.add(owner, role, **_read_limits(options))
    _, key_id, _ = key.split("_", 2)
    click.echo(key)
    # Apart, so that RESTAGE_API_KEY=$(restage keys add …) holds the key alone.
    for secret in keys.webhook_secrets(key_id):
        click.echo(f"its webhooks are signed with {secret}", err=True)


@keys.command("limit")
@click.argument("key_id")
@_limit_options
def limit_key(key_id: str, **options: Any) -> None:
    """Change the limits of the key KEY_ID that are named, at once, and show them all; `none` takes one away.

    The key itself stays as it is.
    """
    _print_key(_open_keys().limit(key_id, **_read_limits(options)))


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """Withdraw the key KEY_ID, at once."""
    _open_keys().revoke(key_id)
    click.echo(f"key {key_id} is withdrawn")


@keys.command("rotate-webhook")
@click.argument("key_id")
def rotate_webhook(key_id: str) -> None:
    """Change the secret that signs the webhooks of KEY_ID, in two steps.

    The first makes a new secret and prints it; webhooks are signed with the old one too. The second, once all receivers
    know the new one, drops the old one.
    """
    secret = _open_keys().rotate_webhook(key_id)
    if secret is None:
        click.echo(f"key {key_id}: the older secret signs no more", err=True)
    else:
        click.echo(secret)
        click.echo(f"key {key_id}: this secret signs now; one before it does too, until the next call", err=True)


@keys.command("list")
def list_keys() -> None:
    """List the keys, the oldest first; their secrets are not shown."""
    for key in _open_keys().list():
        _print_key(key)


def _print_key(key: "KeyRecord") -> None:
    secrets = f"webhook secrets: {len(key.webhook_secrets)}"  # two while one is rotated
    since = f"since {key.created_at:%Y-%m-%d}"
    limits = {
        "requests a minute": key.requests_per_minute,
        "open jobs": key.max_open_jobs,
        "bytes a day": key.max_bytes_per_day,
    }
    told = "".join(f"  {most} {what}" for what, most in limits.items() if most is not None)
    click.echo(f"{key.id}  {key.role:5}  up to {key.max_priority:6}  {since}  {secrets}  {key.owner}{told}")


def _open_keys() -> "KeyStore":
    from server.keys import KeyStore

    return KeyStore(_load_settings_without_store().auth.keys_file)


def _load_settings_without_store() -> "Settings":
    """Load the settings where the store's keys and the API's address do not matter, or are set by `restage up`."""
    import os

    from server.settings import load_settings

    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("RESTAGE__STORE__")}
    given = {"SERVER__HOST": "127.0.0.1", "STORE__ACCESS_KEY": "unused", "STORE__SECRET_KEY": "unused"}
    return load_settings(env=kept | {f"RESTAGE__{name}": value for name, value in given.items()})


restage.add_command(reconcile)


def main() -> None:
    """Run a command; what is expected to go wrong ends it with one clear message and status 1."""
    try:
        restage()
    except ConfigError as error:
        click.echo("the configuration cannot be used:", err=True)
        _print_errors(error.problems)
    except (ServerError, ClientError) as error:
        _print_errors([str(error)])
    sys.exit(1)


def _print_errors(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"restage: {line}", err=True)


if __name__ == "__main__":
    main()
