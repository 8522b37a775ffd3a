"""Reads the configuration's YAML files so that every mistake can be told with its file and line."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from server.config.yaml_loader import YamlLoader

# The way to a value in a document: keys of mappings and indexes of lists.
KeyPath = tuple[Any, ...]


@dataclass(frozen=True)
class Problem:
    """One mistake in the configuration.

    Attributes:
        file: the file as an operator would type it, or `environment`.
        line: counted from 1; None where there is no line, as in the environment.
        key: dotted name, list index in brackets, or the name of an environment variable; empty for a whole file.
        value: what stands there, already shortened and safe to show; None where nothing does or it is a secret.
        detail: what is wrong and what is allowed.
    """

    file: str
    line: int | None
    key: str
    value: str | None
    detail: str


def describe_problem(problem: Problem) -> str:
    """Write a problem as one line: `config/local.yaml:12: server.port = 0: needs a whole number from 1 to 65535`."""
    where = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
    what = " = ".join(part for part in (problem.key, problem.value) if part)
    return ": ".join(part for part in (where, what, problem.detail) if part)


def dotted(path: KeyPath) -> str:
    """Write a path as an operator reads it: `worker.device`, `models[1].defaults`."""
    text = ""
    for step in path:
        if isinstance(step, int) and not isinstance(step, bool):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text


@dataclass
class ConfigFile:
    """A YAML file that was read; a broken one has no content but says what is wrong with it.

    Attributes:
        name: the file as an operator would type it.
        content: plain Python values; None where the file is empty or cannot be read.
        problems: syntax errors, duplicate keys, a file that is missing.
    """

    name: str
    content: Any = None
    problems: list[Problem] = field(default_factory=list[Problem])
    is_readable: bool = True
    text: bytes = b""

    def problem(self, path: KeyPath, value: str | None, detail: str) -> Problem:
        """Make a problem out of what stands at `path`, looking up its line."""
        return Problem(self.name, self.line_of(path), dotted(path), value, detail)

    def line_of(self, path: KeyPath) -> int | None:
        """Find the line of a key, or of the innermost thing around it that exists; None in an empty file.

        The file is parsed once more for it: positions are wanted only when something is wrong.
        """
        loader = YamlLoader(self.text)
        try:
            node: Any = loader.get_single_node() if self.is_readable else None
            line = None
            for step in path:
                found = _child(loader, node, step)
                if found is None:
                    break
                line, node = found
            return line
        finally:
            loader.dispose()


def read_config_file(path: Path) -> ConfigFile:
    """Read one YAML file; what is wrong with it comes back in `problems`, never as an exception."""
    name = _shown_path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        return ConfigFile(name, problems=[Problem(name, None, "", None, reason)], is_readable=False)
    try:
        loader = YamlLoader(text)
    except yaml.YAMLError as error:
        return ConfigFile(name, problems=[_syntax_problem(name, text, error)], is_readable=False)
    try:
        content = loader.get_single_data()
        has_duplicate_keys = loader.has_duplicate_keys
    except (yaml.YAMLError, RecursionError) as error:
        return ConfigFile(name, problems=[_syntax_problem(name, text, error)], is_readable=False)
    finally:
        loader.dispose()
    file = ConfigFile(name, content, text=text)
    if has_duplicate_keys:
        file.problems.extend(_duplicate_keys(name, text))
    return file


def _shown_path(path: Path) -> str:
    """Shorten a path below the current folder; anything else stays absolute, so that it is never ambiguous."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - Path.resolve would follow links that the operator made
    below = os.path.relpath(absolute)
    return absolute if below.startswith("..") else below


def _child(loader: YamlLoader, node: Any, step: Any) -> tuple[int, Any] | None:
    """Go one step down: the line of a key (the last, where it is given twice) or item, and the node of its value."""
    found = None
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and loader.key(key) == step:
                found = key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
        item = node.value[step]
        found = item.start_mark.line + 1, item
    return found


def _syntax_problem(name: str, text: bytes, error: Exception) -> Problem:
    """Tell a syntax error without quoting the file, which may hold a secret just there."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        detail = str(getattr(error, "problem", "")).removeprefix("but ")
        # The scanner stops at a tab without naming it: the most frequent mistake deserves its own words.
        lines = text.splitlines()
        if mark.line < len(lines) and lines[mark.line][mark.column : mark.column + 1] == b"\t":
            detail = "a tab stands where YAML needs spaces"
        # At the end of the file the mark is one line past the last.
        return Problem(name, min(mark.line + 1, len(lines)), "", None, f"is not YAML: {detail}")
    position = getattr(error, "position", None)
    if position is not None:
        line = text[:position].count(b"\n") + 1
        return Problem(name, line, "", None, f"is not UTF-8 text: {getattr(error, 'reason', '')}")
    return Problem(name, None, "", None, "is nested too deeply")


def _duplicate_keys(name: str, text: bytes) -> Iterator[Problem]:
    loader = YamlLoader(text)
    try:
        yield from _duplicates_below(name, loader, loader.get_single_node(), (), set())
    finally:
        loader.dispose()


def _duplicates_below(name: str, loader: YamlLoader, node: Any, path: KeyPath, seen: set[int]) -> Iterator[Problem]:
    if id(node) in seen:  # an alias; it may even stand inside of what it names
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates_below(name, loader, item, (*path, index), seen)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[Any, int] = {}
        for key, value in node.value:
            step, line = loader.key(key), key.start_mark.line + 1
            if step in first_lines:
                detail = f"is given twice, first in line {first_lines[step]}"
                yield Problem(name, line, dotted((*path, step)), None, detail)
            first_lines.setdefault(step, line)
            yield from _duplicates_below(name, loader, value, (*path, step), seen)
