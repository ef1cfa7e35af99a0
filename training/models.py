"""The shapes of text encoder, UNet and sampler, and how they start: from an earlier model's weights or from nothing."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 32


def scheduler() -> DDIMScheduler:
    """v prediction and a last step of pure noise: without it no picture's mean, a black background say, can be reached."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        projection_dim=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel._from_config(config, attn_implementation="eager")


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=192,
        attention_head_dim=[2, 4, 6],
        use_linear_projection=True,
    )


def load(tokenizer: CLIPTokenizer, warm_start) -> tuple:
    """(text encoder, UNet) in float32, from a diffusers folder where one is given.

    The text encoder's attention is the plain one for the same reason as the UNet's (`use_plain_attention`).
    """
    if warm_start:
        text_encoder = CLIPTextModel.from_pretrained(
            warm_start, subfolder="text_encoder", dtype=torch.float32, attn_implementation="eager"
        )
        unet = UNet2DConditionModel.from_pretrained(warm_start, subfolder="unet", dtype=torch.float32)
    else:
        text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    return text_encoder.train(), unet.train()


def use_plain_attention(unet: UNet2DConditionModel):
    """On CPUs, PyTorch's fused attention is slow backwards at this size: plain products take half its time."""
    unet.set_attn_processor(AttnProcessor())


def tokens(tokenizer: CLIPTokenizer, captions: list) -> torch.Tensor:
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids
