"""Lays values over one another, remembers where each came from, and tells every mistake in them at once."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from server.config.allowed import explain, is_optional, shown
from server.config.files import ConfigFile, KeyPath, Problem, describe_problem, dotted, read_config_file
from server.config.names import VARIABLE_PREFIX, Setting, may_hide_secret, meant_instead, settings_of, variable_name
from server.config.yaml_loader import parse_scalar, parse_yaml
from server.errors import ConfigError

# Values by section and name → (section, name, what is wrong) for each contradiction among them.
FindContradictions = Callable[[Mapping[str, Mapping[str, Any]]], list[tuple[str, str, str]]]


@dataclass(frozen=True)
class _Origin:
    """Where a value came from: a file, or the environment (`file` is None)."""

    file: ConfigFile | None
    path: KeyPath

    def problem(self, value: str | None, detail: str, below: KeyPath = ()) -> Problem:
        if self.file is not None:
            return self.file.problem((*self.path, *below), value, detail)
        return Problem("environment", None, variable_name(*self.path), value, detail)


@dataclass
class Assembly:
    """Settings while they are put together: the values so far, where each came from, and what is wrong."""

    model: type[BaseModel]
    config_dir: Path
    renamed: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list[Problem])
    warnings: list[str] = field(default_factory=list[str])
    values: dict[str, dict[str, Any]] = field(init=False)
    origins: dict[tuple[str, str], _Origin] = field(default_factory=dict[tuple[str, str], _Origin])
    all_files_readable: bool = True
    unreadable_secrets: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def __post_init__(self) -> None:
        # A default path is written like one in base.yaml: relative to the folder.
        self.values = {
            section: {
                name: absolute_path(self.config_dir, str(setting.field.default))
                for name, setting in settings.items()
                if isinstance(setting.field.default, Path)
            }
            for section, settings in settings_of(self.model).items()
        }

    def add_file(self, env_name: str) -> None:
        """Lay one YAML file of the folder over what there is."""
        file = read_config_file(self.config_dir / f"{env_name}.yaml")
        self.problems.extend(file.problems)
        self.all_files_readable = self.all_files_readable and file.is_readable
        if file.content is None:
            return
        if not isinstance(file.content, dict):
            detail = f"needs sections of settings such as `server:`, not {shown(file.content)}"
            self.problems.append(Problem(file.name, 1, "", None, detail))
            return
        for section, values in cast("dict[Any, Any]", file.content).items():
            was_section = any(old.partition(".")[0] == section for old in self.renamed)
            if section not in self.values and not was_section:
                self._report_unknown(_Origin(file, (section,)), None)
            elif isinstance(values, dict):
                for name, value in cast("dict[Any, Any]", values).items():
                    self._set(_Origin(file, (section, name)), value)
            elif values is not None:  # a section whose lines are all comments is null
                problem = file.problem((section,), shown(values), "needs settings below it, each on a line of its own")
                self.problems.append(problem)

    def add_environment(self, env: Mapping[str, str]) -> None:
        """Lay the variables that name a setting over what there is; each that only seems to is a mistake."""
        for variable, text in env.items():
            upper = variable.upper()
            if not upper.startswith("RESTAGE_") or "__" not in variable:
                continue
            path = tuple(upper.removeprefix(VARIABLE_PREFIX).lower().split("__"))
            if not variable.startswith(VARIABLE_PREFIX) or upper != variable or len(path) != 2:
                detail = "is unknown; settings are named RESTAGE__SECTION__NAME, in upper case"
                self.problems.append(Problem("environment", None, variable, None, detail))
            else:
                self._set(_Origin(None, path), text)

    def _set(self, origin: _Origin, value: Any) -> None:
        """Take one value over those of earlier layers; a mistake in its name or kind is noted, not raised."""
        target = self._target(origin)
        if target is None:
            self._report_unknown(origin, value)
            return
        section, name = target
        setting = settings_of(self.model)[section][name]
        previous = self.origins.get(target)
        if previous is not None and previous.file is origin.file and previous.path != origin.path:
            detail = f"is set twice, as {dotted(previous.path)} too; {section}.{name} is the name"
            self.problems.append(origin.problem(None, detail))
            return
        if target != origin.path:
            name_now = dotted(target) if origin.file is not None else variable_name(*target)
            self.warnings.append(describe_problem(origin.problem(None, f"was renamed; write {name_now}")))
        if setting.is_secret and origin.file is not None and value is not None:
            instead = f"{variable_name(section, name)} or {section}.{name}_file"
            self.problems.append(origin.problem(None, f"is a secret and may not stand in YAML; set {instead}"))
            return
        if origin.file is None:
            value = _from_environment(setting, str(value))
        if setting.is_path and isinstance(value, str) and value:
            value = absolute_path(self.config_dir if origin.file is not None else Path.cwd(), value)
        if previous is not None and not setting.is_secret:
            self._check_covered(section, name)
        self.values[section][name] = value
        self.origins[section, name] = origin

    def _check_covered(self, section: str, name: str) -> None:
        """Tell a mistake in a value that a later layer covers: it would surface when that layer goes."""
        section_model = cast("type[BaseModel]", self.model.model_fields[section].annotation)
        try:
            section_model.model_validate({name: self.values[section][name]}, strict=True)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                if details["loc"][0] == name:
                    details["loc"] = (section, *details["loc"])
                    self.problems.extend(self._explain(section, name, details["loc"][2:], details))

    def _target(self, origin: _Origin) -> tuple[str, str] | None:
        """Find the setting that a path of two names means today."""
        section, name = origin.path
        if name in settings_of(self.model).get(section, {}):
            return section, name
        current = self.renamed.get(dotted(origin.path))
        if current is None:
            return None
        section, _, name = current.partition(".")
        return section, name

    def _report_unknown(self, origin: _Origin, value: Any) -> None:
        section, name = str(origin.path[0]), str(origin.path[1]) if len(origin.path) > 1 else None
        meant = meant_instead(self.model, section, name)
        if isinstance(meant, tuple):
            meant = f"did you mean {dotted(meant) if origin.file is not None else variable_name(*meant)}?"
        # The environment is where secrets live: what stands under a misspelt name there is never shown.
        hides = origin.file is None or value is None or any(may_hide_secret(str(step)) for step in origin.path)
        text = None if hides else shown(value)
        self.problems.append(origin.problem(text, f"is unknown; {meant}"))

    def read_secret_files(self) -> None:
        """Fill in secrets from their `*_file`, where the environment did not give them itself."""
        for section, settings in settings_of(self.model).items():
            values = self.values[section]
            for name in (name for name, setting in settings.items() if setting.is_secret):
                if not values.get(name):
                    # An empty variable, as compose files pass it, is none.
                    values.pop(name, None)
                path = values.get(f"{name}_file")
                if not isinstance(path, Path):
                    continue
                origin = self.origins[section, f"{name}_file"]
                if name not in values:
                    self._read_secret_file(section, name, path, origin)
                elif origin.file is None:
                    detail = f"is set together with {variable_name(section, name)}; set one of them"
                    self.problems.append(origin.problem(None, detail))

    def _read_secret_file(self, section: str, name: str, path: Path, origin: _Origin) -> None:
        try:
            secret = path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            self.problems.append(origin.problem(f"'{path}'", f"cannot be read: {reason or 'not UTF-8 text'}"))
            self.unreadable_secrets.add((section, name))
            return
        self.values[section][name] = secret
        self.origins[section, name] = origin

    def build(self, extra: Mapping[str, Any], find_contradictions: FindContradictions) -> Any:
        """Validate everything.

        Raises:
            ConfigError: there is any mistake.
        """
        settings = None
        mistaken: set[tuple[str, str]] = set()
        try:
            settings = self.model.model_validate({**extra, **self.values}, strict=True)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                section, name, *below = details["loc"]
                mistaken.add((str(section), str(name)))
                self.problems.extend(self._explain(str(section), str(name), tuple(below), details))
        values = self._values_without(mistaken)
        for section, name, detail in find_contradictions(values):
            self.problems.append(self._origin(section, name).problem(shown(values[section][name]), detail))
        if self.problems or settings is None:
            # In the order of the files' lines, then the environment.
            self.problems.sort(key=lambda problem: (problem.line is None, problem.file, problem.line or 0))
            raise ConfigError([describe_problem(problem) for problem in self.problems])
        return settings

    def _explain(self, section: str, name: str, below: KeyPath, details: Any) -> Iterator[Problem]:
        setting = settings_of(self.model)[section][name]
        detail = explain(details, self.model)
        if details["type"] == "missing":
            # It may well stand in a file that could not be read, which is told already.
            if self.all_files_readable and (section, name) not in self.unreadable_secrets:
                if setting.is_secret:
                    detail = f"is missing; set {variable_name(section, name)} or {section}.{name}_file"
                yield Problem("environment", None, f"{section}.{name}", None, detail)
        elif setting.is_secret:
            # A check of our own says what is needed without repeating the value.
            detail = detail if details["type"] == "value_error" else "needs text that is not empty"
            yield self._origin(section, name).problem(None, detail)
        else:
            yield self._origin(section, name).problem(shown(details["input"]), detail, below)

    def _origin(self, section: str, name: str) -> _Origin:
        """Where a value came from; for a default, where it could be set."""
        return self.origins.get((section, name), _Origin(None, (section, name)))

    def _values_without(self, mistaken: set[tuple[str, str]]) -> dict[str, dict[str, Any]]:
        values: dict[str, dict[str, Any]] = {}
        for section, settings in settings_of(self.model).items():
            defaults = {name: setting.field.default for name, setting in settings.items()}
            known = {**defaults, **self.values[section]}
            values[section] = {name: value for name, value in known.items() if (section, name) not in mistaken}
        return values


def absolute_path(folder: Path, written: str) -> Path:
    """Make a path absolute without following links, which the operator made on purpose."""
    return Path(os.path.normpath(folder / os.path.expanduser(written)))  # noqa: PTH111 - Path's raises without a home


def _from_environment(setting: Setting, text: str) -> Any:
    """Read a variable as its setting wants it: text as it stands, anything else as in YAML."""
    # Compose files pass variables that nobody set as empty ones. A password may well be "null".
    if is_optional(setting.field.annotation) and (not text or (text == "null" and not setting.is_secret)):
        return None
    if setting.is_text:
        return text
    if not setting.is_list:
        return parse_scalar(text.strip())
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text
