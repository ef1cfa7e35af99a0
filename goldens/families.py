"""Distilled families: what diffusers draws with their own schedulers and few steps, guidance embedded in the UNet among them."""

import copy
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline

from checkpoints import BY_NAME, FIXTURES, SDXL, Checkpoint
from fixture import psnr, write_json, write_tensors
from pipelines import CAFE, FOX, STABLE, load

# Fields as in the published files: SimianLuo/LCM_Dreamshaper_v7, stabilityai/sd-turbo, ByteDance/SDXL-Lightning's card, h1t/TCD-SDXL-LoRA's card.
COMMON = {k: SDXL[k] for k in ("beta_end", "beta_schedule", "beta_start", "clip_sample", "num_train_timesteps", "set_alpha_to_one", "steps_offset")}
SCHEDULERS = {
    "lcm": {**COMMON, "_class_name": "LCMScheduler", "original_inference_steps": 50, "prediction_type": "epsilon"},
    "sd_turbo": {**SDXL, "timestep_spacing": "trailing"},
    "lightning": {**SDXL, "timestep_spacing": "trailing"},
    "lightning_one": {**SDXL, "timestep_spacing": "trailing", "prediction_type": "sample"},
    "tcd": {**SDXL, "_class_name": "TCDScheduler"},
}

SD1 = BY_NAME["sd1"]


class Consistency(Checkpoint):
    """A tiny Stable Diffusion 1.x whose UNet is told the guidance scale."""

    def pipeline(self) -> DiffusionPipeline:
        plain = replace(SD1, unet=self.unet, name=self.name).pipeline()
        parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
        parts["scheduler"] = build("lcm")
        pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def fields(checkpoint: Checkpoint) -> dict:
    return {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}


LCM = Consistency(
    **{**fields(SD1), "name": "lcm", "scheduler": SCHEDULERS["lcm"], "unet": {**SD1.unet, "time_cond_proj_dim": 20}}
)


def build(scheduler: str):
    config = copy.deepcopy(SCHEDULERS[scheduler])
    return getattr(diffusers, config["_class_name"]).from_config(config)


@dataclass
class Case:
    name: str
    # The family that the checkpoint has to be recognised as.
    family: str
    checkpoint: str
    scheduler: str
    steps: int
    guidance_scale: float
    prompt: str = FOX
    width: int = 56
    height: int = 40
    seed: int = 0


CASES = [
    Case("lcm_4", "LCM (guidance embedded)", "lcm", "lcm", 4, 8.5, seed=70),
    Case("lcm_1", "LCM (guidance embedded)", "lcm", "lcm", 1, 3.0, CAFE, seed=71),
    Case("lcm_8", "LCM (guidance embedded)", "lcm", "lcm", 8, 1.0, CAFE, 40, 72, seed=72),
    Case("lcm_lora_4", "LCM", "sd1", "lcm", 4, 1.0, seed=73),
    Case("sdxl_lcm_4", "SDXL LCM", "sdxl", "lcm", 4, 1.5, CAFE, seed=74),
    Case("lightning_4", "SDXL Lightning", "sdxl", "lightning", 4, 0.0, seed=75),
    Case("lightning_2", "SDXL Lightning", "sdxl", "lightning", 2, 0.0, CAFE, 40, 72, seed=76),
    Case("lightning_1", "SDXL Lightning (one step)", "sdxl", "lightning_one", 1, 0.0, CAFE, seed=77),
    Case("tcd_4", "TCD", "sdxl", "tcd", 4, 0.0, seed=78),
    # The tiny checkpoint's text is not as wide as the true one's, by which this family is told apart; a unit test does that.
    Case("sd_turbo_1", "Stable Diffusion", "sd2", "sd_turbo", 1, 1.0, seed=79),
    Case("sd_turbo_4", "Stable Diffusion", "sd2", "sd_turbo", 4, 1.0, CAFE, seed=80),
]


def draw(pipe: DiffusionPipeline, case: Case, dtype: torch.dtype) -> dict:
    pipe.to(dtype)
    found = {}
    for kind in ("latent", "np"):
        pipe.scheduler = build(case.scheduler)
        with torch.inference_mode():
            found[kind] = pipe(
                case.prompt,
                width=case.width,
                height=case.height,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance_scale,
                # Doubles are drawn otherwise: both types begin with the same floats.
                generator=torch.Generator().manual_seed(case.seed),
                output_type=kind,
            ).images[0]
    return found


def make(scratch: Path) -> None:
    write_json(FIXTURES / "checkpoints/lcm.json", LCM.save(scratch / "lcm"), 3)
    rows, tensors = {}, {}
    original = torch.randn
    torch.randn = lambda *args, dtype=None, **kwargs: original(*args, dtype=torch.float32, **kwargs).to(dtype or torch.float32)
    for case in CASES:
        folder = scratch / case.checkpoint
        if not folder.exists():
            BY_NAME[case.checkpoint].save(folder)
        single, double = draw(load(folder), case, torch.float32), draw(load(folder), case, torch.float64)
        stable = psnr(single["np"].astype("float64"), double["np"].astype("float64"))
        print(f"{case.name}: float64 {stable:.1f} dB, std {single['np'].std():.2f}", flush=True)
        assert stable >= STABLE and single["np"].std() > 0.05, case.name
        row = asdict(case)
        rows[row.pop("name")] = row
        tensors[f"{case.name}/latents"] = single["latent"].numpy()
        tensors[f"{case.name}/picture"] = (single["np"] * 255).round().astype("uint8")
    torch.randn = original
    write_json(FIXTURES / "families.json", {"schedulers": SCHEDULERS, "cases": rows}, 2)
    write_tensors(FIXTURES / "families.safetensors", tensors)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
