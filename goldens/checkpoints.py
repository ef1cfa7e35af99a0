"""Tiny checkpoints in the shapes of the Stable Diffusion families, with formula weights.

Each has every kind of block of its family: levels with and without attention, resnets with and without a shortcut, several heads,
several transformer depths. diffusers writes the folder; the fixture keeps its JSON files and the list of its tensors.
"""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from formula import canonical, fill, gain_of
from layouts import transformers4_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "crates/hypergen-diffusion/tests/fixtures"
EMOJI = ROOT / "models/emoji"
TOKENIZER = EMOJI / "tokenizer"

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
# Two threads or one give torch different sums; fixtures should come out the same everywhere.
torch.set_num_threads(1)

# Scheduler files with exactly the fields that the published checkpoints' files have: fields that are absent there matter, because a
# sampler chosen by name then takes its own default.
# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/scheduler/scheduler_config.json
SD1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
# https://huggingface.co/stabilityai/stable-diffusion-2-1/blob/main/scheduler/scheduler_config.json
SD2_V = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# https://huggingface.co/stabilityai/stable-diffusion-2-1-base/blob/main/scheduler/scheduler_config.json
SD2_BASE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/scheduler/scheduler_config.json
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# https://huggingface.co/stabilityai/sdxl-turbo/blob/main/scheduler/scheduler_config.json
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}

SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}


def build_scheduler(config: dict, sampler: str | None):
    """The scheduler that the file names, or the named one built from the file's fields."""
    classes = {c.__name__: c for c, _ in SAMPLERS.values()}
    cls, extra = SAMPLERS[sampler] if sampler else (classes[config["_class_name"]], {})
    return cls.from_config(copy.deepcopy(config), **extra)


@dataclass
class Checkpoint:
    """One tiny checkpoint: how to build it, and what the fixture says of it."""

    name: str
    scheduler: dict
    unet: dict
    vae: dict
    text: list[dict]
    pads: list[str]
    eos: list[int]
    gains: dict[str, float] = field(default_factory=dict)
    xl: bool = False

    def pipeline(self) -> DiffusionPipeline:
        """The pipeline in float32, filled."""
        torch.manual_seed(0)
        tokenizers, encoders = [], []
        for i, (text, pad, eos) in enumerate(zip(self.text, self.pads, self.eos)):
            tokenizers.append(CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad, model_max_length=77))
            config = CLIPTextConfig(
                vocab_size=4316,
                max_position_embeddings=77,
                bos_token_id=0 if eos == 2 else 4314,
                eos_token_id=eos,
                pad_token_id=1,
                **text,
            )
            cls = CLIPTextModelWithProjection if i == 1 else CLIPTextModel
            encoders.append(cls(config).eval())
        parts = dict(
            vae=AutoencoderKL(**self.vae).eval(),
            unet=UNet2DConditionModel(**self.unet).eval(),
            scheduler=build_scheduler(self.scheduler, None),
        )
        for i, (tokenizer, encoder) in enumerate(zip(tokenizers, encoders)):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts["tokenizer" + suffix] = tokenizer
            parts["text_encoder" + suffix] = encoder
        for key, part in parts.items():
            if isinstance(part, torch.nn.Module):
                fill(part, key, self.gains)
        if self.xl:
            pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, folder: Path) -> dict:
        """Lets diffusers write the folder and returns the fixture that describes it."""
        shutil.rmtree(folder, ignore_errors=True)
        self.pipeline().save_pretrained(folder)
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(self.scheduler, indent=2))
        files, tokenizers, tensors = {}, {}, {}
        for path in sorted(folder.rglob("*.json")):
            name = str(path.relative_to(folder))
            content = json.loads(path.read_text())
            if path.name == "tokenizer.json":
                tokenizers[path.parent.name] = tokenizer_patch(content)
                continue
            for noise in ("_name_or_path", "is_local", "local_files_only"):
                content.pop(noise, None)
            files[name] = content
        for path in sorted(folder.rglob("*.safetensors")):
            prefix = path.parent.name
            entries = {}
            with safe_open(path, "pt") as weights:
                for key in sorted(weights.keys()):
                    shape = weights.get_slice(key).get_shape()
                    gain = gain_of(canonical(prefix, key), self.gains)
                    entries[key] = [gain, *shape]
            tensors[str(path.relative_to(folder))] = entries
        older = {
            f"{folder}/{file}": content
            for folder in tokenizers
            for file, content in transformers4_tokenizer(self.name, folder).items()
        }
        return {"files": files, "tokenizers": tokenizers, "transformers4": older, "tensors": tensors}


def tokenizer_patch(written: dict) -> dict:
    """What distinguishes a written tokenizer.json from the one in models/emoji: the top-level fields that differ."""
    base = json.loads((TOKENIZER / "tokenizer.json").read_text())
    assert written.keys() == base.keys()
    patch = {key: value for key, value in written.items() if value != base[key]}
    assert "model" not in patch and "normalizer" not in patch
    return patch


VAE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 16, 32, 32),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
)
# What brings the latents (some ten units over the scaling factor) back to unit size for the decoder, and makes prompts count.
GAINS = {
    "vae/post_quant_conv.weight": 0.03,
    "vae/decoder.conv_out.weight": 0.6,
    "*embeddings.token_embedding.weight": 8.0,
    "*embeddings.position_embedding.weight": 4.0,
    "*attn2.to_q.weight": 2.0,
    "*attn2.to_out.0.weight": 2.0,
}

CHECKPOINTS = [
    # Stable Diffusion 1.x: a number of heads for all levels, convolutions as projections, quick_gelu, the old end token.
    Checkpoint(
        name="sd1",
        scheduler=SD1,
        unet=dict(
            sample_size=8,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        vae={**VAE, "layers_per_block": 2, "scaling_factor": 0.18215},
        text=[
            dict(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=32,
                hidden_act="quick_gelu",
            )
        ],
        pads=["<|endoftext|>"],
        eos=[2],
        gains=GAINS,
    ),
    # Stable Diffusion 2.x: v prediction, heads by level, linear projections, gelu, padding with "!".
    Checkpoint(
        name="sd2",
        scheduler=SD2_V,
        unet=dict(
            sample_size=12,
            block_out_channels=(32, 64, 96),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=48,
            attention_head_dim=[2, 4, 6],
            use_linear_projection=True,
            norm_num_groups=16,
        ),
        vae={**VAE, "scaling_factor": 0.18215},
        text=[
            dict(
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=3,
                projection_dim=64,
                hidden_act="gelu",
            )
        ],
        pads=["!"],
        eos=[4315],
        gains=GAINS,
    ),
    # SDXL: two encoders, added conditioning, a first level without attention, transformer depths that differ.
    Checkpoint(
        name="sdxl",
        scheduler=SDXL,
        unet=dict(
            sample_size=16,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=80,
            attention_head_dim=[2, 4, 8],
            transformer_layers_per_block=[1, 2, 3],
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 40,
        ),
        vae={**VAE, "scaling_factor": 0.13025, "force_upcast": True},
        text=[
            dict(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=32,
                hidden_act="quick_gelu",
            ),
            dict(
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=40,
                hidden_act="gelu",
            ),
        ],
        pads=["<|endoftext|>", "!"],
        eos=[4315, 4315],
        gains={**GAINS, "*attn2.to_q.weight": 1.0, "*attn2.to_out.0.weight": 1.0},
        xl=True,
    ),
]
BY_NAME = {c.name: c for c in CHECKPOINTS}
