"""The families at their true size: configurations as published, weights drawn at random and scaled so that activations stay sane."""

import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "goldens"))

from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

from checkpoints import GAINS, SD1, SD2_BASE, SD2_V, SDXL, TURBO  # noqa: E402
from formula import canonical, gain_of, scale_and_center  # noqa: E402
from tokens import write_asset, write_folder  # noqa: E402

EOS = "<|endoftext|>"

# https://huggingface.co/stabilityai/sd-turbo/blob/main/scheduler/scheduler_config.json
SD_TURBO = {**SD2_BASE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
# https://huggingface.co/SimianLuo/LCM_Dreamshaper_v7/blob/main/scheduler/scheduler_config.json
LCM = {
    "_class_name": "LCMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/blob/main/unet/config.json
UNET_1 = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
)
# https://huggingface.co/stabilityai/stable-diffusion-2-1-base/blob/main/unet/config.json
UNET_2 = {**UNET_1, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/unet/config.json
UNET_XL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
    scaling_factor=0.18215,
)
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
              hidden_act="quick_gelu")
# OpenCLIP's ViT-H/14 without its last layer, and its ViT-bigG/14.
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, projection_dim=512,
              hidden_act="gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
              hidden_act="gelu")


@dataclass
class Family:
    name: str
    scheduler: dict
    steps: int
    guidance_scale: float
    # Width and height that are drawn: native where that is affordable.
    size: int
    unet: dict = field(default_factory=lambda: UNET_1)
    vae: dict = field(default_factory=lambda: VAE)
    text: tuple = (CLIP_L,)
    pads: tuple = (EOS,)
    pipeline: str = "StableDiffusionPipeline"

    @property
    def xl(self) -> bool:
        return len(self.text) == 2

    @property
    def weights(self) -> str:
        """Families of the same networks share one set of weights."""
        if self.xl:
            return "xl"
        condition = "w" if "time_cond_proj_dim" in self.unet else ""
        return f"sd{1 if self.text == (CLIP_L,) else 2}{condition}"


XL = dict(unet=UNET_XL, vae=VAE_XL, text=(CLIP_L, CLIP_G), pads=(EOS, "!"), pipeline="StableDiffusionXLPipeline")
TWO = dict(unet=UNET_2, text=(CLIP_H,), pads=("!",))
FAMILIES = [
    Family("sd15", SD1, 4, 7.5, 512),
    Family("sdxl", SDXL, 3, 7.5, 256, **XL),
    Family("sdxl-turbo", TURBO, 2, 0.0, 512, **{**XL, "unet": {**UNET_XL, "sample_size": 64}}),
    Family("sd21-base", SD2_BASE, 3, 7.5, 384, **TWO),
    Family("sd21", SD2_V, 3, 7.5, 384, **{**TWO, "unet": {**UNET_2, "sample_size": 96}}),
    Family("sd-turbo", SD_TURBO, 2, 0.0, 512, **TWO),
    Family("lcm-sd15", LCM, 4, 8.5, 512, unet={**UNET_1, "time_cond_proj_dim": 256}, pipeline="LatentConsistencyModelPipeline"),
]
BY_NAME = {f.name: f for f in FAMILIES}


def fill(module: torch.nn.Module, prefix: str) -> None:
    """The goldens' scaling (`goldens/formula.py`) with torch's numbers: the formula itself would take minutes."""
    generator = torch.Generator().manual_seed(len(prefix))
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            name = canonical(prefix, key)
            scale, center = scale_and_center(name, list(tensor.shape), gain_of(name, GAINS))
            tensor.uniform_(-float(scale), float(scale), generator=generator).add_(float(center))
            assert math.isfinite(float(tensor.flatten()[0]))


def empty(build):
    """A network without the initialisation that `fill` overwrites."""
    with torch.device("meta"):
        network = build()
    return network.to_empty(device="cpu")


def write(family: Family, scratch: Path) -> Path:
    """The family's folder; diffusers and transformers save every part."""
    weights = scratch / f"weights-{family.weights}"
    if not (weights / "done").exists():
        shutil.rmtree(weights, ignore_errors=True)
        # One part at a time, in files of 2 GB: saving copies what it saves.
        unet = empty(lambda: UNet2DConditionModel(**family.unet))
        fill(unet, "unet")
        unet.save_pretrained(weights / "unet", max_shard_size="2GB")
        del unet
        vae = empty(lambda: AutoencoderKL(**family.vae))
        fill(vae, "vae")
        vae.save_pretrained(weights / "vae")
        merges = write_asset()
        for i, (text, pad) in enumerate(zip(family.text, family.pads)):
            suffix = f"_{i + 1}" if i else ""
            cls = CLIPTextModelWithProjection if i else CLIPTextModel
            config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, eos_token_id=2, bos_token_id=0, pad_token_id=1, **text)
            encoder = cls(config)
            fill(encoder, f"text_encoder{suffix}")
            encoder.save_pretrained(weights / f"text_encoder{suffix}", max_shard_size="10GB")
            del encoder
            write_folder(weights / f"tokenizer{suffix}", merges, pad, "strings").save_pretrained(weights / f"tokenizer{suffix}")
        (weights / "done").touch()
    folder = scratch / family.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    index = {"_class_name": family.pipeline, "_diffusers_version": "0.42.1"}
    for part in sorted(p for p in weights.iterdir() if p.is_dir()):
        (folder / part.name).mkdir()
        for file in part.iterdir():
            (folder / part.name / file.name).symlink_to(file)
        cls = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}.get(part.name)
        if cls is None and part.name.startswith("tokenizer"):
            cls = ["transformers", "CLIPTokenizer"]
        index[part.name] = cls or ["transformers", "CLIPTextModel" + ("WithProjection" if part.name.endswith("_2") else "")]
    index["scheduler"] = ["diffusers", family.scheduler["_class_name"]]
    if family.xl:
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(family.scheduler, indent=2))
    config = json.loads((weights / "unet/config.json").read_text())
    (folder / "unet/config.json").unlink()
    config["sample_size"] = family.unet["sample_size"]
    (folder / "unet/config.json").write_text(json.dumps(config, indent=2))
    return folder
