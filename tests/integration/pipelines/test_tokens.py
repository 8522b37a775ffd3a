"""Prompts are read whole or refused: nothing is cut off, and none takes more memory than was planned."""

import time
from pathlib import Path

import pytest

from pipelines.errors import BadInput
from pipelines.tokens import check_prompt_tokens
from server.prompts import ROOM_TYPES, STYLES, Prompts

REPOSITORY = Path(__file__).parents[3]
# A digit is one token of Qwen; T5 puts one before them, and one behind.
LONGEST = {"qwen": "1" * 1024, "qwen_original": "1" * 1024, "kontext": "1" * 510}


@pytest.fixture(params=list(LONGEST))
def limited(request, load_twin):
    """Give one twin of each family in turn."""
    return load_twin(request.param)


def test_longest_prompt_is_read_whole(limited, photos):
    """With as many tokens as are allowed, the last of them still changes the picture."""
    longest = LONGEST[limited.name]
    assert (
        limited.run(photos[:1], prompt=longest, num_inference_steps=2)
        != limited.run(photos[:1], prompt=longest[:-1] + "2", num_inference_steps=2)
    ).any()


def test_longer_prompt_is_refused(limited, photos):
    """One token more is told, with how many there are and how many are allowed, before anything is computed."""
    limit = 512 if limited.name == "kontext" else 1024
    message = f"^the prompt has {limit + 1} tokens; this model reads at most {limit}: shorten it$"
    with pytest.raises(BadInput, match=message):
        limited.start(photos[:1], prompt=LONGEST[limited.name] + "1")


@pytest.mark.parametrize("name", ["qwen", "qwen_original"])
def test_longer_negative_prompt_is_refused(load_twin, photos, name):
    """A negative prompt is encoded like a prompt, and has the same limit."""
    twin = load_twin(name)
    assert twin.start(photos[:1], negative_prompt=LONGEST[name]).step == 0
    with pytest.raises(BadInput, match=r"^the negative prompt has 1025 tokens; this model reads at most 1024"):
        twin.start(photos[:1], negative_prompt=LONGEST[name] + "1")


@pytest.mark.parametrize("text", ["🛋️" * 2000, "\N{ZERO WIDTH JOINER}" * 4000, "word " * 800, "客" * 4000], ids=ascii)
def test_hostile_prompts_are_counted_quickly(qwen, photos, text):
    """The 4000 characters that may be sent, whatever they are, take milliseconds to refuse (1 second is allowed)."""
    started = time.monotonic()
    with pytest.raises(BadInput, match=r"the prompt has \d+ tokens"):
        qwen.start(photos[:1], prompt=text)
    assert time.monotonic() - started < 1


def test_limit_itself_is_allowed(kontext):
    """The end of the text, which T5's tokenizer adds, counts; an empty text has nothing else."""
    check_prompt_tokens(kontext.model.pipeline.tokenizer_2, "", "prompt", 1)
    with pytest.raises(BadInput, match="the colour has 1 tokens; this model reads at most 0"):
        check_prompt_tokens(kontext.model.pipeline.tokenizer_2, "", "colour", 0)


def test_every_preset_fits(limited, photos):
    """No room type and style is too long, not even for the twins, whose tokenizers spell most words."""
    prompts = Prompts.load(REPOSITORY / "config")
    for room_type in ROOM_TYPES:
        for style in STYLES:
            limited.start(photos[:1], prompt=prompts.render(room_type, style))
