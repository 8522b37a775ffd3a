"""Reads YAML with plain values that mean what an operator thinks they mean, and notices duplicate keys."""

import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z")

# Untyped in the stubs.
_SAFE: Any = SafeConstructor


def parse_scalar(text: str) -> Any:
    """Read a plain scalar as the YAML files do: null, a boolean, a number, or else the text itself."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    try:
        if _INT.match(text):
            return int(text.replace("_", ""))
        if _FLOAT.match(text):
            return float(text)
    except ValueError:  # an integer of more digits than Python converts
        return text
    return text


def parse_yaml(text: str) -> Any:
    """Read a YAML document given as text, as an environment variable holds a list.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=YamlLoader)  # noqa: S506 - a safe loader


class YamlLoader(yaml.CSafeLoader):
    """YAML 1.1's syntax with YAML 1.2's plain values: `no` and `off` are text, 010 is not 8, 1:30 is not 90.

    Merge keys (`<<`) and tags other than those of plain values are not taken.
    """

    # Own tables: those of the base class know YAML 1.1's numbers, dates and merge keys.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        f"{_TAG}map": _SAFE.construct_yaml_map,
        f"{_TAG}seq": _SAFE.construct_yaml_seq,
        f"{_TAG}str": _SAFE.construct_yaml_str,
    }

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self.has_duplicate_keys = False

    def key(self, node: yaml.ScalarNode) -> Any:
        """Give the Python value of a mapping's key."""
        return _SAFE.construct_object(self, node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; of a key that is given twice, the last counts and the fact is kept."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            self.has_duplicate_keys = True
        return mapping

    def construct_plain(self, node: Any) -> Any:
        """Build null, a boolean or a number; one with a wrong explicit tag stays text."""
        return parse_scalar(self.construct_scalar(node))

    def refuse_tag(self, node: Any) -> Any:
        """Refuse an own tag.

        Raises:
            ConstructorError: always.
        """
        # The tag itself may be a secret that begins with an exclamation mark.
        raise ConstructorError(None, None, "a value that begins with ! must stand in quotes", node.start_mark)


def _install(tag: str, pattern: re.Pattern[str], first_characters: list[str]) -> None:
    _LOADER.add_implicit_resolver(_TAG + tag, pattern, first_characters)
    _LOADER.add_constructor(_TAG + tag, YamlLoader.construct_plain)


_LOADER: Any = YamlLoader
_install("null", _NULL, ["~", "n", "N", ""])
_install("bool", _BOOL, list("tTfF"))
_install("int", _INT, list("-+0123456789"))
_install("float", _FLOAT, list("-+.0123456789"))
_LOADER.add_constructor(None, YamlLoader.refuse_tag)
