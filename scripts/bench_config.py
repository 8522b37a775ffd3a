"""Measure how long settings take to load, against reading the same settings from environment variables alone.

`python scripts/bench_config.py [--runs N]` prints the median of each way. It exits 1 if the YAML layers take 5 ms or
more. pydantic-settings, the other way, comes with `pip install restage[bench]`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.config.names import VARIABLE_PREFIX, settings_of, variable_name
from server.settings import Settings, load_settings

LIMIT_MS = 5.0
CONFIG_DIR = Path(__file__).parent.parent / "config"
SECRETS = {"RESTAGE__STORE__ACCESS_KEY": "access", "RESTAGE__STORE__SECRET_KEY": "secret"}
LOCAL, PROD = {"RESTAGE_ENV": "local", **SECRETS}, {"RESTAGE_ENV": "prod", **SECRETS}


class EnvironmentSettings(BaseSettings, Settings):  # pyright: ignore[reportIncompatibleVariableOverride]
    """The same settings as pydantic-settings reads them: from environment variables and nothing else."""

    model_config = SettingsConfigDict(
        env_prefix=VARIABLE_PREFIX, env_nested_delimiter="__", env_parse_none_str="null", extra="ignore"
    )


def main() -> int:
    """Compare, print, and say whether the limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="loads of each kind, taken in turn (default: 300)")
    runs = max(1, parser.parse_args().runs)
    local = load_settings(CONFIG_DIR, LOCAL)
    variables = variables_of(local)
    # pydantic-settings reads the process's own environment only.
    os.environ |= variables | {"RESTAGE__ENV_NAME": local.env_name, "RESTAGE__CONFIG_DIR": str(local.config_dir)}
    yaml_local, yaml_prod = "YAML layers, base + local", "YAML layers, base + prod"
    reference = f"{len(variables)} variables, pydantic-settings"
    ways: Mapping[str, Callable[[], BaseModel]] = {
        yaml_local: lambda: load_settings(CONFIG_DIR, LOCAL),
        yaml_prod: lambda: load_settings(CONFIG_DIR, PROD),
        f"YAML layers + {len(variables)} variables": lambda: load_settings(CONFIG_DIR, LOCAL | variables),
        # Every value comes from the environment.
        reference: EnvironmentSettings,  # pyright: ignore[reportAssignmentType]
    }
    for name, load in ways.items():
        if name != yaml_prod and load().model_dump() != local.model_dump():
            sys.exit(f"{name}: these are other settings, so the comparison would mean nothing")
    medians = measure(ways, runs)
    print(f"median of {runs} loads each, in a process that has imported everything")
    for name, milliseconds in medians.items():
        print(f"  {name:<34} {milliseconds:6.2f} ms  {milliseconds / medians[reference]:5.2f} x pydantic-settings")
    is_kept = max(medians[yaml_local], medians[yaml_prod]) < LIMIT_MS
    print(f"limit of {LIMIT_MS:g} ms: {'kept' if is_kept else 'BROKEN'}")
    return 0 if is_kept else 1


def variables_of(settings: Settings) -> dict[str, str]:
    """Write every setting as an environment variable, in a form that both ways read, but for secrets not set."""
    return {
        variable_name(section, name): as_text(value)
        for section, names in settings_of(Settings).items()
        for name, setting in names.items()
        if (value := getattr(getattr(settings, section), name)) is not None or not setting.is_secret
    }


def as_text(value: Any) -> str:
    """Write one value as text."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def measure(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Time each way `runs` times, in turn so that a slow moment of the machine hits all; medians in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, load in ways.items():
            start = time.perf_counter()
            load()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
