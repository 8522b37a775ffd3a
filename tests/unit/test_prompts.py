"""Prompts: one for each room type and style, and what prompts.yaml must hold for that."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml

from server.errors import ConfigError
from server.prompts import ROOM_TYPES, STYLES, Prompts, RoomType, UnknownPreset

CONFIG_DIR = Path(__file__).parents[2] / "config"
COMBINATIONS = [(room_type, style) for room_type in ROOM_TYPES for style in STYLES]


@pytest.fixture
def prompts() -> Prompts:
    """Give the shipped prompts."""
    return Prompts.load(CONFIG_DIR)


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Prompts.load(folder)
    return [problem[problem.index("prompts.yaml") :] for problem in caught.value.problems]


def test_the_presets_are_those_of_the_interface() -> None:
    """Clients rely on the names of nine room types and five styles."""
    assert ROOM_TYPES == (
        "living_room",
        "bedroom",
        "kitchen",
        "bathroom",
        "dining_room",
        "office",
        "entryway",
        "outdoor",
        "default",
    )
    assert STYLES == ("modern", "contemporary", "traditional", "industrial", "scandinavian")
    assert get_args(RoomType) == ROOM_TYPES


@pytest.mark.parametrize(("room_type", "style"), COMBINATIONS)
def test_every_prompt_keeps_the_room(prompts: Prompts, room_type: str, style: str) -> None:
    """Each prompt must say what stays and that nothing is blocked, with no placeholder left and no line broken."""
    text = prompts.render(room_type, style)

    for kept in (
        "windows",
        "doors",
        "camera position",
        "perspective",
        "exactly as they are",
        "Keep" if "Keep" in text else "keep",
    ):
        assert kept in text
    assert "stand in front of a doorway" in text or "free" in text
    assert not set("{}\n") & set(text)
    assert "  " not in text
    # FLUX's second text encoder reads 512 tokens at most; a word is rarely more than two.
    assert 60 <= len(text.split()) <= 200


def test_every_prompt_differs(prompts: Prompts) -> None:
    """No two combinations may have the same prompt."""
    assert len({prompts.render(*combination) for combination in COMBINATIONS}) == len(COMBINATIONS)


def test_what_stays_depends_on_the_room(prompts: Prompts) -> None:
    """A bathroom gets no furniture, a kitchen keeps its cabinets, and outdoors the sky stays."""
    for style in STYLES:
        assert "no furniture" in prompts.render("bathroom", style)
        assert "Keep every cabinet" in prompts.render("kitchen", style)
        outdoor = prompts.render("outdoor", style)
        assert "the sky" in outdoor
        assert "ceiling" not in outdoor
        for room_type in ("living_room", "bedroom", "dining_room", "office", "entryway", "default"):
            assert "only movable furniture and decor: keep the walls" in prompts.render(room_type, style)


@pytest.mark.parametrize(
    ("room_type", "style", "detail"),
    [
        ("livingroom", "modern", "there is no room type 'livingroom'; did you mean living_room?"),
        ("bedroom", "baroque", "there is no style 'baroque'; allowed are contemporary, industrial, modern"),
    ],
)
def test_unknown_presets_are_refused(prompts: Prompts, room_type: str, style: str, detail: str) -> None:
    """An unknown room type or style must be refused as the caller's mistake, with what there is."""
    with pytest.raises(UnknownPreset, match=detail.replace("?", r"\?")) as caught:
        prompts.render(room_type, style)

    assert (caught.value.code, caught.value.http_status) == ("unknown_preset", 422)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """What is missing, unknown, empty or without its placeholder must each be told with its line."""
    content = yaml.safe_load((CONFIG_DIR / "prompts.yaml").read_text())
    content["frames"]["indoor"] = "Add {furnishing}."
    content["frames"]["outdoor"] += " {room}"
    del content["rooms"]["office"], content["rooms"]["bedroom"]["furnishings"]["modern"]
    content["rooms"]["attic"] = content["rooms"]["default"]
    content["rooms"]["kitchen"]["frame"] = "kitchn"
    content["rooms"]["kitchen"]["furnishings"]["modern"] = " "
    content["rooms"]["kitchen"]["furnishings"]["gothic"] = "x"
    (tmp_path / "prompts.yaml").write_text(yaml.dump(content, sort_keys=False, width=100_000, Dumper=NoAliases))
    lines = (tmp_path / "prompts.yaml").read_text().splitlines()

    def line(beginning: str, after: str = "frames:") -> int:
        start = lines.index(after)
        return next(number for number, text in enumerate(lines[start:], start + 1) if text.startswith(beginning))

    assert problems_of(tmp_path) == [
        f"prompts.yaml:{line('  indoor:')}: frames.indoor: needs {{room}} and {{furnishing}} once each",
        f"prompts.yaml:{line('  outdoor:')}: frames.outdoor: needs {{room}} and {{furnishing}} once each",
        f"prompts.yaml:{line('rooms:')}: rooms.office: is missing",
        f"prompts.yaml:{line('    furnishings', '  bedroom:')}: rooms.bedroom.furnishings.modern: is missing",
        (
            f"prompts.yaml:{line('    frame', '  kitchen:')}: rooms.kitchen.frame = 'kitchn': is no frame; "
            "did you mean kitchen?"
        ),
        f"prompts.yaml:{line('      modern', '  kitchen:')}: rooms.kitchen.furnishings.modern: needs text, not empty",
        (
            f"prompts.yaml:{line('      gothic')}: rooms.kitchen.furnishings.gothic: is unknown; allowed are "
            "contemporary, industrial, modern, scandinavian, traditional"
        ),
        (
            f"prompts.yaml:{line('  attic')}: rooms.attic: is unknown; allowed are bathroom, bedroom, default, "
            "dining_room, entryway, kitchen, living_room, office, outdoor"
        ),
    ]


class NoAliases(yaml.SafeDumper):
    """Writes what occurs twice twice, as a person would."""

    def ignore_aliases(self, data: object) -> bool:
        """Never use an alias."""
        return data is data  # noqa: PLR0124 - always, and with the argument used


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "prompts.yaml: null: needs a mapping with the keys frames, rooms"),
        ("[]", "prompts.yaml: a list: needs a mapping with the keys frames, rooms"),
        ("frames: {}", "prompts.yaml: rooms: is missing; needs a mapping of names to values"),
        ("frames: {a: 1}\nrooms: {}", "prompts.yaml:1: frames.a = 1: needs a mapping of names to values"),
        ("frames: {", "prompts.yaml:1: is not YAML"),
    ],
)
def test_odd_files_are_told(tmp_path: Path, text: str, problem: str) -> None:
    """A file of another shape must be told, with the line where there is one."""
    (tmp_path / "prompts.yaml").write_text(text)

    assert problems_of(tmp_path)[0].startswith(problem)


def test_missing_file_is_told(tmp_path: Path) -> None:
    """Prompts that are not there must be told by their path."""
    assert problems_of(tmp_path) == ["prompts.yaml: no such file or directory"]


def test_an_operator_may_change_a_sentence(tmp_path: Path) -> None:
    """What an operator writes must be what models are given, braces in it included."""
    shutil.copy(CONFIG_DIR / "prompts.yaml", tmp_path)
    text = (tmp_path / "prompts.yaml").read_text().replace("name: a living room", "name: 'a {lounge} of mine'")
    (tmp_path / "prompts.yaml").write_text(text)

    assert "this photo as a {lounge} of mine. Add" in Prompts.load(tmp_path).render("living_room", "modern")
