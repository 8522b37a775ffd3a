"""Turns a room type and a style into the prompt that the model is given, so that clients need not write one."""

from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.config.allowed import explain, shown, suggest
from server.config.files import ConfigFile, Problem, describe_problem, read_config_file
from server.errors import ConfigError, FieldError, InvalidRequest

RoomType = Literal[
    "living_room", "bedroom", "kitchen", "bathroom", "dining_room", "office", "entryway", "outdoor", "default"
]
Style = Literal["modern", "contemporary", "traditional", "industrial", "scandinavian"]
ROOM_TYPES: Final[tuple[RoomType, ...]] = get_args(RoomType)
STYLES: Final[tuple[Style, ...]] = get_args(Style)

# Stands once in a model's `presets.wrap`.
PRESET_PLACEHOLDER: Final = "{preset}"
_PLACEHOLDERS = ("{room}", "{furnishing}")


class UnknownPreset(InvalidRequest):
    """Raised when a room type or a style is not one of those that there are prompts for; locations are an item's."""

    code = "unknown_preset"
    title = "There is no such room type or style"


class ModelPresets(BaseModel):
    """What one model wants of the prompts otherwise.

    Attributes:
        wrap: around every prompt, which stands where `PRESET_PLACEHOLDER` is.
        replace: whole prompts in place of those of prompts.yaml; they are not wrapped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wrap: str = PRESET_PLACEHOLDER
    replace: dict[RoomType, dict[Style, str]] = {}


class _Room(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    frame: str
    furnishings: dict[str, str]


class _PromptsFile(BaseModel):
    """The shape of prompts.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: dict[str, str]
    rooms: dict[str, _Room]


class Prompts:
    """One prompt for every room type and style."""

    def __init__(self, texts: dict[tuple[str, str], str]) -> None:
        self._texts = MappingProxyType(texts)

    @classmethod
    def load(cls, config_dir: Path) -> "Prompts":
        """Read prompts.yaml.

        Raises:
            ConfigError: with one line for every mistake and every combination that is missing.
        """
        file = read_config_file(config_dir / "prompts.yaml")
        problems = list(file.problems)
        content = None
        if file.is_readable:
            try:
                content = _PromptsFile.model_validate(file.content, strict=True)
                problems += _check(file, content)
            except ValidationError as error:
                for details in error.errors(include_url=False):
                    value = None if details["type"] == "missing" else shown(details["input"])
                    problems.append(file.problem(details["loc"], value, explain(details, _PromptsFile)))
        if problems or content is None:
            problems.sort(key=lambda problem: problem.line or 0)
            raise ConfigError([describe_problem(problem) for problem in problems])
        return cls(
            {
                (room_type, style): _fill(content.frames[room.frame], room.name, furnishing)
                for room_type, room in content.rooms.items()
                for style, furnishing in room.furnishings.items()
            }
        )

    def render(self, room_type: str, style: str, presets: ModelPresets | None = None) -> str:
        """Give the prompt of a room type and a style.

        Args:
            room_type: any text.
            style: likewise.
            presets: of the model that is to be given the prompt; None for the prompt as it stands in the file.

        Raises:
            UnknownPreset: there is no such room type or style.
        """
        if room_type not in ROOM_TYPES:
            raise _unknown("room_type", f"there is no room type {shown(room_type)}; {suggest(room_type, ROOM_TYPES)}")
        if style not in STYLES:
            raise _unknown("style", f"there is no style {shown(style)}; {suggest(style, STYLES)}")
        text = self._texts[room_type, style]
        if presets is None:
            return text
        own = presets.replace.get(room_type, {}).get(style)
        return presets.wrap.replace(PRESET_PLACEHOLDER, text) if own is None else own


def _unknown(field: str, detail: str) -> UnknownPreset:
    return UnknownPreset(detail, (FieldError(f"/{field}", "invalid_value", detail),))


def _fill(frame: str, room: str, furnishing: str) -> str:
    return frame.replace("{room}", room).replace("{furnishing}", furnishing)


def _check(file: ConfigFile, content: _PromptsFile) -> list[Problem]:
    """Look for what a prompt would lack: a placeholder, a frame, a room type, a style."""
    problems: list[Problem] = []
    for name, frame in content.frames.items():
        if any(frame.count(placeholder) != 1 for placeholder in _PLACEHOLDERS):
            problems.append(file.problem(("frames", name), None, f"needs {' and '.join(_PLACEHOLDERS)} once each"))
    problems += _compare(file, ("rooms",), set(content.rooms), ROOM_TYPES)
    for room_type, room in content.rooms.items():
        path = ("rooms", room_type)
        if room.frame not in content.frames:
            detail = f"is no frame; {suggest(room.frame, content.frames)}"
            problems.append(file.problem((*path, "frame"), shown(room.frame), detail))
        problems += _compare(file, (*path, "furnishings"), set(room.furnishings), STYLES)
        problems += [
            file.problem((*path, "furnishings", style), None, "needs text, not empty")
            for style, furnishing in room.furnishings.items()
            if not furnishing.strip()
        ]
    return problems


def _compare(file: ConfigFile, path: tuple[str, ...], found: set[str], known: tuple[str, ...]) -> list[Problem]:
    missing = [file.problem((*path, name), None, "is missing") for name in known if name not in found]
    unknown = [
        file.problem((*path, name), None, f"is unknown; {suggest(name, known)}") for name in sorted(found - set(known))
    ]
    return missing + unknown
