# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The twin of InstructPix2Pix, whose output has the size of the photo that it is given."""

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines.tiny.spreading import HIDDEN_SIZE, scale_vae, spread_weights
from pipelines.tiny.tokenizers import make_clip_tokenizer

# As in the real VAE.
LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215


def build_instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """Build a twin of InstructPix2Pix, without the checker that would paint over pictures."""
    tokenizer = make_clip_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=HIDDEN_SIZE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        # The photo's latents come beside those of the output.
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=HIDDEN_SIZE,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=512,
        scaling_factor=LATENT_SCALE,
    )
    for seed, module in enumerate((text_encoder, unet, vae)):
        spread_weights(module, seed)
    scale_vae(vae, vae.quant_conv, latent_scale=1 / LATENT_SCALE, frames=False)
    return StableDiffusionInstructPix2PixPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        # The values of Stable Diffusion's own scheduler; with an eta above 0 it draws noise at each step.
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
