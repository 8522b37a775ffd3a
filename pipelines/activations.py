"""Estimate what a run takes beside the weights: one short formula for each kind of component, confirmed by no GPU.

The factors were chosen above what the tensors of a dry run take (real classes at real size, without numbers; see
docs/memory-plan.md). What kernels need for themselves is not known, and so not in them.
"""

from dataclasses import dataclass

from pipelines.sizes import MULTIPLE_OF

# A prompt of 4000 characters, the longest that is accepted, in plain English.
PROMPT_TOKENS = 1024
# One token of Qwen2.5-VL stands for 28 x 28 pixels: 14 to a patch, and patches are merged two by two.
ENCODER_PIXELS_PER_TOKEN = 28 * 28
# One token of the transformers stands for a square of this side: 8 pixels to a latent, latents packed two by two.
DENOISER_PIXELS_PER_TOKEN = MULTIPLE_OF * MULTIPLE_OF
# Numbers alive at once. A dry run counts 15 to 22, 9, and 6 (a VAE for pictures) or 18 (one made for videos).
DENOISER_VALUES = 24
ENCODER_VALUES = 10
VAE_VALUES = 20


@dataclass(frozen=True)
class RunSize:
    """The largest run that is planned for.

    Attributes:
        area: of the output, and of each photo as the VAE and the transformer see it, in pixels.
        encoder_area: of each photo as a text encoder sees it that can see, in pixels.
        num_photos: as many as one job may have.
        value_bytes: of one number in the model's dtype.
    """

    area: int
    encoder_area: int
    num_photos: int
    value_bytes: int


@dataclass(frozen=True)
class TextEncoderShape:
    """What of a text encoder its activations follow.

    Attributes:
        hidden_size: of one token between two layers.
        inner_size: of one token inside a layer.
        num_layers: whose results are all kept until the last is done.
        vocabulary_size: where the model also guesses what follows each token, though nobody asks; 0 where not.
        sees_photos: whether photos are read together with the prompt.
    """

    hidden_size: int
    inner_size: int
    num_layers: int
    vocabulary_size: int
    sees_photos: bool


def denoising_bytes(hidden_size: int, run: RunSize) -> int:
    """Estimate one pass through the transformer, with attention that never holds a number for each pair of tokens.

    Guidance makes two passes, one after the other, so it takes no more.

    Args:
        hidden_size: of one token.
        run: the largest planned for.
    """
    tokens = (1 + run.num_photos) * run.area // DENOISER_PIXELS_PER_TOKEN + PROMPT_TOKENS
    tokens += run.num_photos * run.encoder_area // ENCODER_PIXELS_PER_TOKEN
    return tokens * hidden_size * DENOISER_VALUES * run.value_bytes


def vae_bytes(base_channels: int, run: RunSize) -> int:
    """Estimate the decoding of a picture, which takes more than the encoding of a photo; photos come one by one.

    Args:
        base_channels: of the level at full resolution.
        run: the largest planned for.
    """
    return run.area * base_channels * VAE_VALUES * run.value_bytes


def encoding_bytes(shape: TextEncoderShape, run: RunSize) -> int:
    """Estimate one pass of a prompt, and of the photos where it sees them, through a text encoder."""
    tokens = PROMPT_TOKENS
    if shape.sees_photos:
        tokens += run.num_photos * run.encoder_area // ENCODER_PIXELS_PER_TOKEN
    kept = shape.hidden_size * (shape.num_layers + 1)
    values = kept + shape.inner_size * ENCODER_VALUES + shape.vocabulary_size
    return tokens * values * run.value_bytes
