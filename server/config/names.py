"""Knows every setting by its name, in YAML and in the environment, and what a wrong name probably meant."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from server.config.allowed import plain_types

VARIABLE_PREFIX = "RESTAGE__"
# The value under an unknown name with one of these in it is not shown: it may be a secret under a misspelt name.
_SECRET_HINTS = ("key", "secret", "pass", "pw", "token", "cred", "auth")
_SECRET_NAMES = ("password", "secret_key", "access_key")


@dataclass(frozen=True)
class Setting:
    """What must be known about one setting before pydantic sees its value.

    Attributes:
        is_text: a variable's text is the value as it stands; else it is read as in YAML.
        is_list: a variable holds a list as YAML or JSON.
    """

    field: FieldInfo
    is_secret: bool
    is_path: bool
    is_text: bool
    is_list: bool

    @classmethod
    def of(cls, field: FieldInfo) -> "Setting":
        """Read a field's annotation."""
        kinds = [getattr(kind, "__origin__", kind) for kind in plain_types(field.annotation)]
        return cls(
            field,
            is_secret=SecretStr in kinds,
            is_path=Path in kinds,
            is_text=not any(kind in kinds for kind in (int, float, bool, list)),
            is_list=list in kinds,
        )


@cache
def settings_of(model: type[BaseModel]) -> Mapping[str, Mapping[str, Setting]]:
    """List the settings of a model whose fields are sections: section → name → setting."""
    return {
        section: {name: Setting.of(field) for name, field in section_field.annotation.model_fields.items()}
        for section, section_field in model.model_fields.items()
        if isinstance(section_field.annotation, type) and issubclass(section_field.annotation, BaseModel)
    }


def variable_name(*path: Any) -> str:
    """Name the environment variable of a setting: `RESTAGE__STORE__ENDPOINT`."""
    return VARIABLE_PREFIX + "__".join(str(step) for step in path).upper()


def may_hide_secret(name: str) -> bool:
    """Tell whether an unknown name looks as if its value were not to be shown."""
    lower = name.lower()
    return any(hint in lower for hint in _SECRET_HINTS) or bool(difflib.get_close_matches(lower, _SECRET_NAMES))


def meant_instead(model: type[BaseModel], section: str, name: str | None) -> tuple[str, ...] | str:
    """Find what an unknown name probably meant.

    Args:
        model: of all settings.
        section: as it was written, perhaps wrong.
        name: as it was written below the section; None where the section itself is unknown in a file.

    Returns:
        The path of a section or setting; or a text that lists what there is.
    """
    settings = settings_of(model)
    near_section = section if section in settings else _closest(section, settings)
    near_name = _closest(name, settings[near_section]) if name and near_section else None
    # A name may be right and only stand in the wrong section, or in none.
    homes = [home for home, names in settings.items() if (name or section) in names]
    if near_section and near_name:
        return near_section, near_name
    if homes:
        return homes[0], name or section
    if near_section and not name:
        return (near_section,)
    if near_section:
        return f"{near_section} has {', '.join(settings[near_section])}"
    return f"the sections are {', '.join(settings)}"


def _closest(name: str, known: Mapping[str, Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
