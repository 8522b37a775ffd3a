# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The twin of LongCat-Image-Edit, whose class tells of no steps and brings each photo to a million pixels."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
)

from pipelines.tiny.flux2 import make_qwen3_tokenizer
from pipelines.tiny.qwen import make_processor, make_text_encoder
from pipelines.tiny.spreading import HEAD_SIZE, HIDDEN_SIZE, LATENT_CHANNELS, NUM_HEADS, scale_vae, spread_weights


def build_longcat_image_edit() -> LongCatImageEditPipeline:
    """Build a twin of LongCat-Image-Edit, with as little as possible to compute for each of the million pixels."""
    # With more words than that of Qwen's twins: the pipeline fails on a prompt of more than 512 tokens.
    tokenizer = make_qwen3_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    transformer = LongCatImageTransformer2DModel(
        in_channels=LATENT_CHANNELS * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN_SIZE,
        pooled_projection_dim=HIDDEN_SIZE,
        axes_dims_rope=[4, 6, 6],
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=1024,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    for seed, module in enumerate((text_encoder, transformer, vae)):
        spread_weights(module, seed)
    _raise_prompt(transformer)
    scale_vae(vae, vae.encoder.conv_out, latent_scale=1 / 0.3611, frames=False)
    return LongCatImageEditPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_processor=make_processor(tokenizer),
        # The values of FLUX.1's own scheduler, which LongCat-Image took over.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@torch.no_grad()
def _raise_prompt(transformer: LongCatImageTransformer2DModel) -> None:
    # There are eight thousand tokens of pixels, and a few dozen of the prompt: unless attention prefers these, another
    # prompt makes the same picture.
    for name, weight in transformer.named_parameters():
        if name.endswith("norm_added_k.weight"):
            weight.fill_(3.0)
