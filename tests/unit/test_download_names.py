"""A result's file name is one on every system and in every zip, whatever the client called the photo."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api.outputs import download_name
from server.jobs import Job, JobOutput

OUTPUT = JobOutput("job-1/3/output.webp", "0" * 64, "image/webp", 64, 64, 1)


def name_of(name, index=0):
    job = Job("job-1", "batch-1", index, "anna", "m", "1", "p", inputs=(), name=name)
    return download_name(job, OUTPUT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hall.jpg", "001-hall.webp"),
        ("Küche, 1. OG.jpeg", "001-Küche, 1. OG.webp"),
        ("客厅.png", "001-客厅.webp"),
        ("no suffix", "001-no suffix.webp"),
        ("1. OG", "001-1. OG.webp"),
        ("a.b.c.jpg", "001-a.b.c.webp"),
        (None, "001-job-1.webp"),
        ("", "001-job-1.webp"),
        ("/", "001-job-1.webp"),
        ("..", "001-job-1.webp"),
        (". . .", "001-job-1.webp"),
        ("   ", "001-job-1.webp"),
        ("../../etc/passwd", "001-passwd.webp"),
        ("..\\..\\boot.ini", "001-boot.webp"),
        ("C:\\photos\\hall.jpg", "001-hall.webp"),
        ("C:hall.jpg", "001-C_hall.webp"),
        ("hall.jpg:stream", "001-hall.jpg_stream.webp"),
        ('<>"|?*.jpg', "001-______.webp"),
        ("a\x00b\nc\td\x7f.jpg", "001-a_b_c_d_.webp"),
        ("gnp\u202egpj.exe", "001-gnp_gpj.webp"),
        ("half\ud800.jpg", "001-half_.webp"),
        ("line\u2028end.jpg", "001-line_end.webp"),
        ("hall. .jpg", "001-hall.webp"),
        ("CON", "001-CON.webp"),
        (".hidden", "001-hidden.webp"),
    ],
)
def test_names_are_made_plain(name, expected):
    """What people wrote stays where it can; what a system could misread does not."""
    assert name_of(name) == expected


def test_the_place_in_the_batch_comes_first():
    """Names sort as the batch does, and no two of a batch are equal."""
    assert name_of("a.jpg", index=11) == "012-a.webp"
    assert name_of("a.jpg", index=999) == "1000-a.webp"


@pytest.mark.parametrize("letter", ["a", "ü", "客", "🏠"])
def test_long_names_are_cut(letter):
    """A hundred characters are kept, or as many whole ones as a file system has room for."""
    stem = name_of(letter * 5000 + ".jpg").removeprefix("001-").removesuffix(".webp")
    assert stem == letter * len(stem)
    assert len(stem) == min(100, 200 // len(letter.encode()))


@given(name=st.text(st.characters(), max_size=300))
@example(name="a" * 99 + " b.jpg")
@example(name="a" * 99 + "..jpg")
def test_every_name_is_safe(name):
    """Any text gives one plain part of a path: nothing reserved, no control character, no dot or space at its end."""
    made = name_of(name)
    assert re.fullmatch(r'001-[^<>:"/\\|?*]{1,100}\.webp', made)
    stem = made.removeprefix("001-").removesuffix(".webp")
    assert stem == stem.strip(" .")
    assert len(made.encode()) <= 220
    assert not any(unicodedata.category(each) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for each in made)
