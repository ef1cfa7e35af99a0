"""Whole pipelines: latents and pictures that diffusers makes in float32, and how far its bfloat16 is from them."""

import json
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from checkpoints import BY_NAME, CHECKPOINTS, EMOJI, FIXTURES, SD2_BASE, SD2_V, TURBO, build_scheduler
from fixture import distance, psnr, write_json, write_tensors
from layouts import LAYOUTS, write_layout

# Scheduler files that stand in for the checkpoint's own.
SCHEDULERS = {
    "sd2_base": SD2_BASE,
    "turbo": TURBO,
    # What SD 2.x becomes when it is trained down to pure noise (Lin et al. 2023, arXiv 2305.08891).
    "zero_snr": {**SD2_V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}

# diffusers' float32 must agree with its float64 at least this well, in dB, or a golden says nothing about us.
STABLE = 90.0


@dataclass
class Case:
    name: str
    checkpoint: str
    prompt: str
    negative_prompt: str | None = None
    width: int = 48
    height: int = 40
    steps: int = 10
    guidance_scale: float = 7.5
    seed: int = 0
    sampler: str | None = None
    scheduler: str | None = None
    layout: str | None = None


FOX = "a red fox in the snow, oil painting"
CAFE = "カフェの猫 ☕ naïve Ünïcode 🦊"
LONG = "one hundred tiny wooden houses on a green hill, " * 12 + "at night"

CASES = [
    # Stable Diffusion 1.x: the file's own PNDM first, then each sampler by name.
    Case("sd1_own", "sd1", FOX, width=64, height=64),
    Case("sd1_own_next_seed", "sd1", FOX, width=64, height=64, seed=1),
    Case("sd1_negative", "sd1", CAFE, "blurry, ugly 醜い", 72, 56, steps=4, seed=7),
    Case("sd1_empty_negative", "sd1", "cat face", "", seed=3, steps=4),
    Case("sd1_one_step", "sd1", "cat face", steps=1, guidance_scale=1.0, seed=11),
    Case("sd1_empty_prompt", "sd1", "", steps=4, seed=12),
    Case("sd1_long_prompt", "sd1", LONG, "🌧", steps=4, seed=13),
    Case("sd1_ddim", "sd1", FOX, None, 40, 64, seed=4, sampler="ddim"),
    Case("sd1_ddim_1", "sd1", FOX, steps=1, seed=4, sampler="ddim"),
    Case("sd1_pndm", "sd1", CAFE, steps=4, seed=5, sampler="pndm"),
    Case("sd1_euler", "sd1", FOX, seed=5, sampler="euler"),
    Case("sd1_euler_4", "sd1", CAFE, "fog", 104, 96, steps=4, seed=6, sampler="euler"),
    Case("sd1_euler_a", "sd1", FOX, None, 72, 56, seed=8, sampler="euler_a"),
    Case("sd1_euler_a_next_seed", "sd1", FOX, None, 72, 56, seed=9, sampler="euler_a"),
    Case("sd1_euler_a_4", "sd1", CAFE, steps=4, seed=2**32 + 3, sampler="euler_a"),
    Case("sd1_dpmpp_2m", "sd1", FOX, None, 56, 72, seed=9, sampler="dpmpp_2m"),
    Case("sd1_dpmpp_2m_1", "sd1", CAFE, steps=1, seed=9, sampler="dpmpp_2m"),
    Case("sd1_dpmpp_2m_karras", "sd1", FOX, seed=10, sampler="dpmpp_2m_karras"),
    Case("sd1_dpmpp_2m_karras_4", "sd1", CAFE, "", steps=4, seed=10, guidance_scale=3.0, sampler="dpmpp_2m_karras"),
    # Latents of 4, 8, 16 and 24 numbers: torch draws fewer than 16 in another way.
    Case("sd1_4_numbers", "sd1", "dot", None, 8, 8, steps=4, seed=1, sampler="euler_a"),
    Case("sd1_8_numbers", "sd1", "dot", None, 16, 8, steps=4, seed=1, sampler="ddim"),
    Case("sd1_16_numbers", "sd1", "dot", None, 16, 16, steps=4, seed=1, sampler="euler"),
    Case("sd1_24_numbers", "sd1", "dot", None, 16, 24, steps=4, seed=1, sampler="euler_a"),
    # Stable Diffusion 2.x, v prediction.
    Case("sd2_own", "sd2", FOX, width=64, height=64, seed=20),
    Case("sd2_exclamation", "sd2", "hello! what a day!! 🎉", "rain! <|endoftext|> snow", 72, 56, steps=4, seed=21),
    Case("sd2_one_step", "sd2", CAFE, steps=1, guidance_scale=1.0, seed=22),
    Case("sd2_pndm", "sd2", FOX, seed=23, sampler="pndm"),
    Case("sd2_euler", "sd2", FOX, "", seed=24, sampler="euler"),
    Case("sd2_euler_a", "sd2", CAFE, seed=25, sampler="euler_a"),
    Case("sd2_dpmpp_2m", "sd2", FOX, None, 56, 40, seed=26, sampler="dpmpp_2m"),
    Case("sd2_dpmpp_2m_karras", "sd2", FOX, seed=27, sampler="dpmpp_2m_karras"),
    Case("sd2_base_own", "sd2", FOX, "fog", seed=28, scheduler="sd2_base"),
    Case("sd2_base_euler", "sd2", CAFE, steps=4, seed=29, scheduler="sd2_base", sampler="euler"),
    Case("sd2_zero_snr_ddim", "sd2", FOX, seed=30, scheduler="zero_snr"),
    Case("sd2_zero_snr_euler", "sd2", FOX, seed=31, scheduler="zero_snr", sampler="euler"),
    # SDXL.
    Case("sdxl_own", "sdxl", FOX, width=64, height=64, seed=40),
    Case("sdxl_own_next_seed", "sdxl", FOX, width=64, height=64, seed=41),
    Case("sdxl_empty_negative", "sdxl", FOX, "", seed=42),
    Case("sdxl_negative", "sdxl", CAFE, "blurry! 醜い", 72, 56, steps=4, seed=43, guidance_scale=5.0),
    Case("sdxl_no_guidance", "sdxl", "hello! " + LONG, None, 56, 72, steps=4, seed=44, guidance_scale=1.0),
    Case("sdxl_ddim", "sdxl", FOX, seed=45, sampler="ddim"),
    Case("sdxl_pndm", "sdxl", FOX, seed=46, sampler="pndm"),
    Case("sdxl_euler_a", "sdxl", CAFE, "", 72, 56, steps=4, seed=47, sampler="euler_a"),
    Case("sdxl_dpmpp_2m", "sdxl", FOX, None, 104, 56, steps=4, seed=48, sampler="dpmpp_2m"),
    Case("sdxl_dpmpp_2m_karras", "sdxl", CAFE, seed=49, sampler="dpmpp_2m_karras"),
    # SDXL Turbo: the same network, ancestral and trailing, without guidance.
    Case("turbo_1", "sdxl", FOX, steps=1, guidance_scale=0.0, seed=50, scheduler="turbo"),
    Case("turbo_2", "sdxl", CAFE, None, 72, 56, steps=2, guidance_scale=0.0, seed=51, scheduler="turbo"),
    Case("turbo_4", "sdxl", FOX, steps=4, guidance_scale=1.0, seed=52, scheduler="turbo"),
    # The two generations of files, other names, shards, other number types. Those in float32 must equal the plain folder's picture.
    *[
        Case(f"{checkpoint}_{name}", checkpoint, CAFE, "hello!", steps=2, seed=60, layout=name)
        for name, layout in LAYOUTS.items()
        for checkpoint in layout.checkpoints
    ],
    # The embedded model. Its own sampler is DDIM, v prediction, zero-terminal SNR, trailing.
    Case("emoji_apple", "emoji", "red apple", None, 128, 128, steps=20, seed=0),
    Case("emoji_rocket", "emoji", "rocket, blue background", None, 128, 128, steps=50, seed=1),
    Case("emoji_cat", "emoji", "cat face, black background", "dog", 128, 128, steps=20, seed=2),
    Case("emoji_non_ascii", "emoji", "Crème brûlée 🍮", "", 128, 128, steps=50, seed=3),
    Case("emoji_euler", "emoji", "birthday cake, pink background", None, 104, 72, steps=20, seed=4, sampler="euler"),
    Case("emoji_no_guidance", "emoji", "pizza", None, 128, 128, steps=20, seed=5, guidance_scale=1.0),
]


@contextmanager
def float32_noise():
    """Draws all noise in float32 and casts it. In half precision torch draws in float32 as well, but where the count is no multiple
    of 16 it takes other numbers for the last 16 and everything after them, which would drown the comparison of number types."""
    original = torch.randn

    def randn(*args, dtype=None, **kwargs):
        return original(*args, dtype=torch.float32, **kwargs).to(dtype or torch.float32)

    torch.randn = randn
    try:
        yield
    finally:
        torch.randn = original


def load(folder: Path, variant: str | None = None) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, variant=variant, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipe: DiffusionPipeline, case: Case, scheduler: dict, dtype: torch.dtype, more: dict | None = None
) -> dict[str, np.ndarray]:
    """Latents and picture (floats in [0, 1], and bytes), through the pipeline's own call; `more` are further arguments of it."""
    pipe.to(dtype)
    found = {}
    for kind in ("latent", "np"):
        pipe.scheduler = build_scheduler(scheduler, case.sampler)
        with float32_noise(), torch.inference_mode():
            arguments = dict(
                prompt=case.prompt,
                negative_prompt=case.negative_prompt,
                width=case.width,
                height=case.height,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance_scale,
                generator=torch.Generator().manual_seed(case.seed),
                output_type=kind,
            )
            found[kind] = pipe(**(arguments | (more or {}))).images[0]
    return {
        "latents": found["latent"].double().numpy(),
        "floats": np.asarray(found["np"], np.float64),
        "picture": np.asarray(pipe.image_processor.numpy_to_pil(found["np"])[0]),
    }


def precision(single: dict, double: dict, brain: dict) -> dict:
    """How far the float32 run is from float64, and bfloat16 from float32."""
    return {
        "float64": round(psnr(single["floats"], double["floats"]), 1),
        "bfloat16": {
            "latents": round(distance(brain["latents"], single["latents"]), 5),
            "picture": round(psnr(brain["picture"] / 255, single["picture"] / 255), 2),
        },
    }


def make(scratch: Path) -> None:
    for checkpoint in CHECKPOINTS:
        fixture = checkpoint.save(scratch / checkpoint.name)
        write_json(FIXTURES / f"checkpoints/{checkpoint.name}.json", fixture, 3)
    rows, tensors, lowest = {}, {}, np.inf
    for case in CASES:
        if case.checkpoint == "emoji":
            folder, scheduler = EMOJI, json.loads((EMOJI / "scheduler/scheduler_config.json").read_text())
        else:
            folder, scheduler = scratch / case.checkpoint, BY_NAME[case.checkpoint].scheduler
        variant = None
        if case.layout:
            folder = scratch / f"{case.checkpoint}_{case.layout}"
            write_layout(scratch / case.checkpoint, folder, case.layout)
            variant = LAYOUTS[case.layout].variant
        pipe = load(folder, variant)
        scheduler = SCHEDULERS[case.scheduler] if case.scheduler else scheduler
        single = run(pipe, case, scheduler, torch.float32)
        double = run(load(folder, variant), case, scheduler, torch.float64)
        brain = run(load(folder, variant), case, scheduler, torch.bfloat16)
        row = asdict(case)
        row.pop("name")
        row |= precision(single, double, brain)
        rows[case.name] = row
        tensors[f"{case.name}/latents"] = single["latents"].astype(np.float32)
        tensors[f"{case.name}/picture"] = single["picture"]
        lowest = min(lowest, row["float64"])
        spread = single["floats"].std()
        print(f"{case.name}: std {spread:.2f} float64 {row['float64']} dB, bfloat16 {row['bfloat16']}", flush=True)
        assert row["float64"] >= STABLE, case.name
        assert spread > 0.05, f"{case.name}: a flat picture tests nothing"
    write_json(FIXTURES / "pipelines.json", {"schedulers": SCHEDULERS, "layouts": layout_rows(), "cases": rows}, 2)
    write_tensors(FIXTURES / "pipelines.safetensors", tensors)
    print(f"float32 agrees with float64 at {lowest} dB and more")


def layout_rows() -> dict:
    """The layouts as the Rust tests read them, with the files that they write beside the weights."""
    rows = {}
    for name, layout in LAYOUTS.items():
        row = asdict(layout)
        row.pop("checkpoints")
        rows[name] = row
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
