# diffusers and transformers export lazily, and declare narrower types than they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
"""The twin of FLUX.2 [klein]."""

import json

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from pipelines.tiny.spreading import HEAD_SIZE, HIDDEN_SIZE, NUM_HEADS, scale_vae, spread_weights
from pipelines.tiny.tokenizers import QWEN_CONTROL_TOKENS, STAGING_WORDS

# As in the real VAE.
LATENT_CHANNELS = 32
# The prompt's embedding is what three layers of the text encoder say, side by side; the pipeline takes these.
TEXT_LAYERS = (9, 18, 27)
# What Qwen3's own template makes of a single turn of the user.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_flux2_klein(*, is_distilled: bool = True) -> Flux2KleinPipeline:
    """Build a twin of FLUX.2 [klein] 4B, or of its base model.

    Args:
        is_distilled: written into the pipeline's configuration; the base model is not, and runs with guidance.
    """
    tokenizer = make_qwen3_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=32,
            # One more than the last that is taken: the very last one's output is normalised, the others' are not.
            num_hidden_layers=TEXT_LAYERS[-1] + 1,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            # As in the real one: its files have no weights of their own for the head.
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=LATENT_CHANNELS * 4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN_SIZE * len(TEXT_LAYERS),
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=2
    )
    for seed, module in enumerate((text_encoder, transformer, vae)):
        spread_weights(module, seed)
    scale_vae(vae, vae.quant_conv, latent_scale=2.0, frames=False)
    _fill_statistics(vae, scale=2.0)
    return Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        # The values of FLUX.2 [klein]'s own scheduler.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=is_distilled,
    )


def make_qwen3_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer for FLUX.2 [klein]'s text encoder: a few words of staging, pieces of words, and bytes.

    The pipeline reads 512 tokens. With bytes alone an ordinary prompt would be too long.
    """
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", *QWEN_CONTROL_TOKENS],
    )
    bare.train_from_iterator([f"user\nassistant\n<think>\n\n</think>\n\n {STAGING_WORDS}"] * 2, trainer)
    learned = json.loads(bare.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",  # noqa: S106 - not that kind of token
        pad_token="<|endoftext|>",  # noqa: S106 - likewise
        extra_special_tokens=QWEN_CONTROL_TOKENS,
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def _fill_statistics(vae: AutoencoderKLFlux2, scale: float) -> None:
    # The pipeline brings latents to mean 0 and variance 1 with these. Values of their own, for each channel, show
    # whether they were loaded: those that a new module has would do nothing.
    generator = torch.Generator().manual_seed(0)
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    mean.copy_(torch.randn(mean.shape, generator=generator) * 0.2 * scale)
    variance.copy_(scale**2 * (0.8 + 0.4 * torch.rand(variance.shape, generator=generator)))
