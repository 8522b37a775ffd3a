"""Finds the layers of configuration, base.yaml ← $RESTAGE_ENV.yaml ← environment, and loads settings from them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from server.config.allowed import shown
from server.config.assembly import Assembly, FindContradictions, absolute_path
from server.config.files import Problem
from server.errors import ConfigError

# Files of the folder that are no layer.
NOT_LAYERS = frozenset({"base", "models", "prompts"})

SettingsType = TypeVar("SettingsType", bound=BaseModel)


def find_config_dir(config_dir: Path | None, env: Mapping[str, str]) -> Path:
    """Choose the folder of the configuration; absolute.

    Raises:
        ConfigError: there is no such folder.
    """
    named = config_dir or env.get("RESTAGE_CONFIG_DIR") or Path(__file__).parents[2] / "config"
    folder = absolute_path(Path.cwd(), str(named))
    if not folder.is_dir():
        raise ConfigError([f"{folder}: there is no such folder; RESTAGE_CONFIG_DIR names the one with base.yaml"])
    return folder


def load_layers(
    model: type[SettingsType],
    config_dir: Path,
    env: Mapping[str, str],
    *,
    renamed: Mapping[str, str],
    find_contradictions: FindContradictions,
) -> SettingsType:
    """Build `model`, whose fields are sections of settings, from base.yaml ← $RESTAGE_ENV.yaml ← environment.

    Raises:
        ConfigError: anything is wrong; `problems` holds one line for every mistake.
    """
    env_name = env.get("RESTAGE_ENV") or "local"
    assembly = Assembly(model, config_dir, renamed)
    assembly.add_file("base")
    if env_name in _layer_names(config_dir):
        assembly.add_file(env_name)
    else:
        assembly.problems.append(_unknown_env_name(env_name, config_dir))
    assembly.add_environment(env)
    assembly.read_secret_files()
    settings = assembly.build({"env_name": env_name, "config_dir": config_dir}, find_contradictions)
    for warning in assembly.warnings:
        warnings.warn(warning, FutureWarning, stacklevel=3)
    return settings


def _layer_names(config_dir: Path) -> list[str]:
    return sorted(path.stem for path in config_dir.glob("*.yaml") if path.stem not in NOT_LAYERS)


def _unknown_env_name(env_name: str, config_dir: Path) -> Problem:
    names = ", ".join(_layer_names(config_dir)) or "none"
    detail = f"names no layer: there is no {env_name}.yaml in {config_dir}; there are {names}"
    return Problem("environment", None, "RESTAGE_ENV", shown(env_name), detail)
