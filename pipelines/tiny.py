# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""Tiny twins: the real pipeline classes with small random weights, so that every path can run on any machine.

A twin makes no sensible picture, but it depends on the prompt, the photo, the seed, the steps and the guidance as the
real model does, and it is made in about a second, without a download, to the same bytes each time.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from pipelines.tiny_tokenizers import QWEN_CONTROL_TOKENS, make_clip_tokenizer, make_qwen_tokenizer, make_t5_tokenizer

# As in the real VAEs. With 4 channels a picture with alpha would have the shape of latents, and be taken for them.
LATENT_CHANNELS = 16
HIDDEN_SIZE = 32  # of the text encoders
NUM_HEADS, HEAD_SIZE = 2, 16  # of the transformers


def make_tiny_weights(out: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write the weights of tiny twins, leaving alone those that are there.

    Args:
        out: folder of all weights; created if needed.
        names: keys of `TWINS`; all of them when left out.

    Returns:
        One folder for each name, in the layout that `from_pretrained` reads.

    Raises:
        ValueError: a name is not in `TWINS`.
    """
    wanted = list(TWINS) if names is None else list(names)
    unknown = sorted(set(wanted) - set(TWINS))
    if unknown:
        raise ValueError(f"no tiny twin is called {', '.join(unknown)}; there are {', '.join(TWINS)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        if not (out / name).exists():
            _write_twin(TWINS[name], out / name)
    return [out / name for name in wanted]


def _write_twin(build: Callable[[], DiffusionPipeline], folder: Path) -> None:
    # Written beside and renamed, so that a folder of that name is always complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build().save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def build_qwen_image_edit_plus(*, zero_cond_t: bool = True) -> QwenImageEditPlusPipeline:
    """Build a twin of Qwen-Image-Edit 2511, or of 2509.

    Args:
        zero_cond_t: the one difference in architecture; 2511 has it, 2509 has not.
    """
    tokenizer = make_qwen_tokenizer()
    token_id = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", *QWEN_CONTROL_TOKENS)}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": HIDDEN_SIZE,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                # Frame, row and column share the 4 rotary frequencies of a head of 8.
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
                "bos_token_id": token_id["<|endoftext|>"],
                "eos_token_id": token_id["<|im_end|>"],
                "pad_token_id": token_id["<|endoftext|>"],
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": HIDDEN_SIZE,
                "fullatt_block_indexes": [1],
            },
            image_token_id=token_id["<|image_pad|>"],
            video_token_id=token_id["<|video_pad|>"],
            vision_start_token_id=token_id["<|vision_start|>"],
            vision_end_token_id=token_id["<|vision_end|>"],
        )
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS * 4,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN_SIZE,
        axes_dims_rope=(8, 4, 4),
        zero_cond_t=zero_cond_t,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for seed, module in enumerate((text_encoder, transformer, vae)):
        _spread_weights(module, seed)
    _scale_vae(vae, vae.quant_conv, latent_scale=1.0, frames=True)
    return QwenImageEditPlusPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
        ),
        # The values of Qwen-Image-Edit's own scheduler.
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
            use_dynamic_shifting=True,
        ),
    )


def build_flux_kontext() -> FluxKontextPipeline:
    """Build a twin of FLUX.1 Kontext [dev]."""
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=HIDDEN_SIZE,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=HIDDEN_SIZE,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=LATENT_CHANNELS * 4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN_SIZE,
        pooled_projection_dim=HIDDEN_SIZE,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    for seed, module in enumerate((clip, t5, transformer, vae)):
        _spread_weights(module, seed)
    _scale_vae(vae, vae.encoder.conv_out, latent_scale=1 / 0.3611, frames=False)
    return FluxKontextPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        # The values of FLUX.1's own scheduler.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@torch.no_grad()
def _spread_weights(module: nn.Module, seed: int) -> None:
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
def _scale_vae(
    vae: AutoencoderKL | AutoencoderKLQwenImage, last_of_encoder: nn.Module, *, latent_scale: float, frames: bool
) -> None:
    # Latents as strong as the noise they stand beside, and pixels that fill their range without being clipped.
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


TWINS: dict[str, Callable[[], DiffusionPipeline]] = {
    "tiny-qwen-image-edit-2511": build_qwen_image_edit_plus,
    "tiny-flux-kontext": build_flux_kontext,
}
