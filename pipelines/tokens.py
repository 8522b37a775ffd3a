"""Refuse a prompt that a model would cut off without a word, choke on, or take for its own control tokens."""

from typing import Any

from pipelines.errors import BadInput


def check_control_tokens(tokenizer: Any, text: str, name: str) -> None:
    """Refuse a text that could end the user's turn, or ask for a photo that is not there.

    Args:
        tokenizer: of the text encoder whose prompts are framed by control tokens.
        text: as the request gives it.
        name: of the text in the message, such as `negative prompt`.

    Raises:
        BadInput: the text holds one of the control tokens.
    """
    # A single character is no frame: one of Stable Diffusion's tokenizers pads with `!`.
    found = [token for token in tokenizer.all_special_tokens if len(token) > 1 and token in text]
    if found:
        raise BadInput(f"the {name} holds {found[0]}, which is one of the model's control tokens: leave it out")


def check_prompt_tokens(tokenizer: Any, text: str, name: str, limit: int) -> None:
    """Refuse a text that has more tokens than its model reads.

    Args:
        tokenizer: of the text encoder.
        text: all that the limit is for: the prompt alone, or with the template around it. What the tokenizer adds by
            itself, such as an end of text, counts too.
        name: of the text in the message, such as `negative prompt`.
        limit: how many tokens are allowed.

    Raises:
        BadInput: the text has more.
    """
    # Not verbose, since transformers would warn of what is refused here.
    num_tokens = len(tokenizer(text, verbose=False)["input_ids"])
    if num_tokens > limit:
        raise BadInput(f"the {name} has {num_tokens} tokens; this model reads at most {limit}: shorten it")
