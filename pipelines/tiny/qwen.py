# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""The twins of the Qwen-Image-Edit models."""

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from pipelines.tiny.spreading import HEAD_SIZE, HIDDEN_SIZE, LATENT_CHANNELS, NUM_HEADS, scale_vae, spread_weights
from pipelines.tiny.tokenizers import QWEN_CONTROL_TOKENS, make_qwen_tokenizer


def build_qwen_image_edit() -> QwenImageEditPipeline:
    """Build a twin of the original Qwen-Image-Edit."""
    return QwenImageEditPipeline(**_make_components(zero_cond_t=False))


def build_qwen_image_edit_plus(*, zero_cond_t: bool = True) -> QwenImageEditPlusPipeline:
    """Build a twin of Qwen-Image-Edit 2511, or of 2509.

    Args:
        zero_cond_t: the one difference in architecture; 2511 has it, 2509 has not.
    """
    return QwenImageEditPlusPipeline(**_make_components(zero_cond_t=zero_cond_t))


def build_qwen_image_edit_2509() -> QwenImageEditPlusPipeline:
    """Build a twin of Qwen-Image-Edit 2509."""
    return build_qwen_image_edit_plus(zero_cond_t=False)


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Make a Qwen2.5-VL that knows a tokenizer's tokens; its weights are still to be spread."""
    token_id = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", *QWEN_CONTROL_TOKENS)}
    return Qwen2_5_VLForConditionalGeneration(
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


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Make what turns text and pictures into Qwen2.5-VL's inputs."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    )


def _make_components(*, zero_cond_t: bool) -> dict[str, Any]:
    tokenizer = make_qwen_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
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
        spread_weights(module, seed)
    scale_vae(vae, vae.quant_conv, latent_scale=1.0, frames=True)
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "processor": make_processor(tokenizer),
        # The values of Qwen-Image-Edit's own scheduler.
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
            use_dynamic_shifting=True,
        ),
    }
