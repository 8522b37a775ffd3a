# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The tiny twins' tokenizers, made on the spot so that no vocabulary has to be fetched or kept."""

import json
import string

from diffusers import QwenImageEditPlusPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

QWEN_CONTROL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# One token each for T5, so that ordinary prompts stay well under its 512 tokens; other words are spelled.
STAGING_WORDS = (
    "a add already and any are as at bathroom bed bedroom blue camera ceiling chair contact contemporary curtains "
    "decor dining direction do door doors doorway empty entryway every exactly floor follow for front furniture green "
    "in industrial it its keep kitchen lamp lamps light lighting living may mirror modern move no not nothing of "
    "office on only outdoor outside perspective photo photograph plants position realistic red room rug scandinavian "
    "shadows size sofa soft stage staging stand style table that the their they things this to traditional true "
    "unchanged wall walls where window windows with wood"
)


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer for Qwen-Image-Edit's text encoder: the system prompt in words, all else in bytes.

    The pipeline drops the first 64 tokens, which is what its system prompt has under the real tokenizer. Trained on
    that very text, this one makes one token of each of its words, and so 64 as well.
    """
    pipeline = QwenImageEditPlusPipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=None,
    )
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", *QWEN_CONTROL_TOKENS],
    )
    bare.train_from_iterator([pipeline.prompt_template_encode] * 2, trainer)
    learned = json.loads(bare.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",  # noqa: S106 - not that kind of token
        pad_token="<|endoftext|>",  # noqa: S106 - likewise
        extra_special_tokens=QWEN_CONTROL_TOKENS,
        model_max_length=131072,
    )


def make_clip_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer for FLUX's CLIP encoder: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def make_t5_tokenizer() -> T5TokenizerFast:
    """Make a tokenizer for FLUX's T5 encoder: a few words of staging, and letters for all others."""
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -5.0) for letter in letters]
    pieces += [(f"▁{word}", -3.0) for word in STAGING_WORDS.split()]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)
