"""Prompts: one for each room type and style, and what prompts.yaml must hold for that."""

import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml

from server.errors import ConfigError
from server.prompts import ROOM_TYPES, STYLES, ModelPresets, Prompts, RoomType, UnknownPreset

CONFIG_DIR = Path(__file__).parents[2] / "config"
RAW = yaml.safe_load((CONFIG_DIR / "prompts.yaml").read_text())
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
    """Each prompt must say what stays and that no doorway is blocked, with no placeholder left and no line broken."""
    text = prompts.render(room_type, style)

    kept = re.search(r"[Kk]eep ([^.]+) exactly as they are([^.]*)\.", text)
    assert kept
    for thing in ("windows", "doors", "camera position", "perspective", "lighting"):
        assert thing in kept[0]
    for surface in () if room_type == "outdoor" else ("walls", "floor", "ceiling"):
        assert surface in kept[1]
    assert "Nothing may stand in front of a doorway" in text
    assert "at its true size" in text or "at their true size" in text
    assert "shadows" in text
    assert not set("{}\n") & set(text)
    assert "  " not in text


@pytest.mark.parametrize(("room_type", "style"), COMBINATIONS)
def test_text_encoders_read_all_that_matters(prompts: Prompts, room_type: str, style: str) -> None:
    """The whole prompt must fit into T5's 512 tokens, and what is added into CLIP's 77, by a cautious measure."""
    text = prompts.render(room_type, style)
    furnishing = RAW["rooms"][room_type]["furnishings"][style].strip()
    start = text[: text.index(furnishing) + len(furnishing)]

    # English words are seldom more than one token for four characters, and none is more than one for two.
    assert 400 <= len(text) <= 2 * 512
    assert len(start) <= 4 * 77
    assert len(re.findall(r"\w+|[^\w\s]", start)) <= 70


def test_rooms_get_what_can_be_carried_in(prompts: Prompts) -> None:
    """No furnishing may name what is built in or changes light and openings, nor a bathroom's any furniture."""
    fixed = {
        *("curtain", "blind", "wallpaper", "paint", "chandelier", "pendant", "sconce", "fireplace", "built-in"),
        *("mounted", "ceiling", "door", "window", "carpet", "sunlight", "candlelight"),
    }
    furniture = {
        *("chair", "armchair", "sofa", "stool", "bench", "table", "desk", "bed", "cabinet", "shelf", "console"),
        *("sideboard", "dresser", "wardrobe", "stand", "rack", "trunk", "cart", "trolley"),
    }
    for room_type, style in COMBINATIONS:
        words = set(re.findall(r"[a-z-]+", RAW["rooms"][room_type]["furnishings"][style].lower()))
        singular = words | {word.removesuffix("s") for word in words}
        assert not singular & fixed, (room_type, style)
        if room_type == "bathroom":
            assert not singular & furniture, style
        # A stool in a kitchen needs a place that the photo has.
        if room_type == "kitchen":
            assert "where the counter has an overhang" in prompts.render(room_type, style)


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
    ("room_type", "style", "location", "detail"),
    [
        ("livingroom", "modern", "/room_type", "there is no room type 'livingroom'; did you mean living_room?"),
        ("bedroom", "baroque", "/style", "there is no style 'baroque'; allowed are contemporary, industrial, modern"),
    ],
)
def test_unknown_presets_are_refused(prompts: Prompts, room_type: str, style: str, location: str, detail: str) -> None:
    """An unknown room type or style must be refused as the caller's mistake, with its place and what there is."""
    with pytest.raises(UnknownPreset, match=re.escape(detail)) as caught:
        prompts.render(room_type, style)

    assert (caught.value.code, caught.value.http_status) == ("unknown_preset", 422)
    assert [mistake.location for mistake in caught.value.errors] == [location]


def test_a_model_may_wrap_or_replace_a_preset(prompts: Prompts) -> None:
    """A wrapper stands around every prompt but those that the model replaces; what it does not name stays."""
    own = ModelPresets(wrap="Look: {preset} {Done}.", replace={"bedroom": {"modern": "A bed, {preset} and {room}."}})
    for room_type, style in COMBINATIONS:
        plain = prompts.render(room_type, style)
        expected = f"Look: {plain} {{Done}}."
        if (room_type, style) == ("bedroom", "modern"):
            expected = "A bed, {preset} and {room}."
        assert prompts.render(room_type, style, own) == expected
        assert prompts.render(room_type, style, ModelPresets()) == plain
    with pytest.raises(UnknownPreset):
        prompts.render("attic", "modern", own)


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
        ("frames: {a: 1}\nrooms: {}", "prompts.yaml:1: frames.a = 1: needs text; put it in quotes"),
        (
            "frames: {}\nrooms:\n  office: {name: x, frame: a,\n    furnishings: {modern: null}}",
            "prompts.yaml:4: rooms.office.furnishings.modern = null: needs text",
        ),
        ("frames: {}\nrooms: {office: 1}", "prompts.yaml:2: rooms.office = 1: needs a mapping with the keys name,"),
        (
            "frames: {}\nrooms: {office: {frame: a, furnishings: {}}}",
            "prompts.yaml:2: rooms.office.name: is missing; needs text, not empty",
        ),
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
