# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""Random weights through which every input keeps its influence on the picture; and what all twins have in common."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from torch import nn

# As in the real VAEs. With 4 channels a picture with alpha would have the shape of latents, and be taken for them.
LATENT_CHANNELS = 16
HIDDEN_SIZE = 32  # of the text encoders
NUM_HEADS, HEAD_SIZE = 2, 16  # of the transformers


@torch.no_grad()
def spread_weights(module: nn.Module, seed: int) -> None:
    """Draw all weights of a module anew, with a variance that keeps the one of its input."""
    # The usual small initial weights would let a prompt or a guidance scale change next to nothing in the picture.
    # Unit variance through every layer keeps each input's influence alive to the last one.
    generator = torch.Generator().manual_seed(seed)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.Conv3d):
                fan_in //= layer.kernel_size[0]  # of the frames, a still image fills only the last
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
            if layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.05)
        elif isinstance(layer, nn.Embedding):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        elif name.endswith(("norm_q", "norm_added_q")):
            # Sharp attention: a token that takes the mean of hundreds hardly tells one photo from another.
            layer.get_parameter("weight").fill_(5.0)


@torch.no_grad()
def scale_vae(
    vae: AutoencoderKL | AutoencoderKLQwenImage, last_of_encoder: nn.Module, *, latent_scale: float, frames: bool
) -> None:
    """Scale the ends of a VAE whose weights were spread.

    Latents become as strong as the noise they stand beside, and pixels fill their range without being clipped.

    Args:
        vae: as `spread_weights` left it.
        last_of_encoder: the layer from which its latents come.
        latent_scale: standard deviation of the latents.
        frames: whether it takes batch x channels x frames x height x width.
    """
    generator = torch.Generator().manual_seed(0)
    picture = nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1, (128, 128), mode="bicubic")
    if frames:
        picture = picture.unsqueeze(2)

    def encode() -> torch.Tensor:
        return vae.encode(picture).latent_dist.mode()

    _scale_output(last_of_encoder, encode, latent_scale)
    noise = torch.randn(encode().shape, generator=generator) * latent_scale
    # Qwen's decoder clips to -1…1: far inside, its true scale shows.
    vae.decoder.conv_out.weight.mul_(0.01)
    _scale_output(vae.decoder.conv_out, lambda: vae.decode(noise).sample, 0.4)


def _scale_output(layer: nn.Module, run: Callable[[], torch.Tensor], standard_deviation: float) -> None:
    layer.get_parameter("bias").zero_()
    # Three digits, so that the order in which threads added the numbers up does not show in the weights.
    factor = float(f"{standard_deviation / run().std().item():.3g}")
    layer.get_parameter("weight").mul_(factor)
