"""Draws each family at its true size with diffusers and with HyperGen, from the same random weights, and measures how far apart they are.

    cargo build --release -p hypergen-diffusion --example latents
    python bench/fidelity/compare.py --scratch /var/tmp/fidelity sd15 sdxl

Every drawing is a process of its own that ends before the next begins, so that no two models are in memory at once.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from shapes import BY_NAME, FAMILIES, ROOT, Family, write
import single
from fixture import distance, psnr

PROMPT = "a red fox in the snow, oil painting"
NEGATIVE = "blurry, low quality"
DEFAULT_SEED = 7
DTYPES = ["float32", "bfloat16"]
OURS = ROOT / "target/release/examples/latents"


def reference(family: Family, folder: Path, size: int, seed: int, dtype: str, out: Path) -> None:
    """diffusers' latents and picture, in this process."""
    import diffusers

    from pipelines import float32_noise

    torch.set_num_threads(os.cpu_count() or 1)
    number = getattr(torch, dtype)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=number, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    guided = family.guidance_scale > 1 and "time_cond_proj_dim" not in family.unet
    arguments = {"negative_prompt": NEGATIVE} if guided else {}
    with float32_noise(), torch.inference_mode():
        latents = pipe(
            PROMPT,
            width=size,
            height=size,
            num_inference_steps=family.steps,
            guidance_scale=family.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **arguments,
        ).images
        # The decoder is compared on its own latents: float32's of the same run.
        decoded = pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(number), return_dict=False)[0]
    pixels = (decoded[0].double() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    np.savez(out, latents=latents[0].double().numpy(), picture=np.round(pixels * 255).astype(np.uint8), spread=pixels.std())


def ours(family: Family, folder: Path, size: int, seed: int, dtype: str, out: Path) -> dict:
    """HyperGen's, with what it took."""
    request = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "size": f"{size}x{size}",
        "steps": family.steps,
        "guidance_scale": family.guidance_scale,
        "seed": seed,
        "dtype": dtype,
    }
    told = subprocess.run([OURS, folder, json.dumps(request), out], check=True, capture_output=True, text=True)
    told = json.loads(told.stdout)
    values = np.fromfile(f"{out}.latents", np.float32).reshape(told["height"], told["width"], -1).transpose(2, 0, 1)
    picture = np.fromfile(f"{out}.picture", np.uint8).reshape(size, size, 3)
    return {"latents": values.astype(np.float64), "picture": picture, "peak_rss_bytes": told["peak_rss_bytes"]}


def apart(a, b) -> dict:
    """PSNR of the pictures, relative norm of the latents' difference, and the worst difference over their root mean square."""
    worst = np.abs(a["latents"] - b["latents"]).max() / np.sqrt(np.mean(b["latents"] ** 2))
    return {
        "picture_db": round(psnr(a["picture"] / 255, b["picture"] / 255), 2),
        "latents": float(f"{distance(a['latents'], b['latents']):.3g}"),
        "worst_latent": float(f"{worst:.3g}"),
    }


def single_file(family: Family, scratch: Path, size: int, seed: int) -> dict:
    """The same weights in the original key layout: how far their drawing is from the folder's, which was drawn before."""
    path = scratch / f"{family.name}.safetensors"
    single.write(family, scratch / family.name, path)
    drawn = ours(family, path, size, seed, "float32", scratch / f"{family.name}-single")
    path.unlink()
    folder = scratch / f"{family.name}-float32"
    same = [Path(f"{folder}.{kind}").read_bytes() == Path(f"{scratch / family.name}-single.{kind}").read_bytes() for kind in ("latents", "picture")]
    with np.load(f"{folder}.npz") as reference_drawn:
        return {"equals_folder": all(same), **apart(drawn, reference_drawn)}


def compare(family: Family, scratch: Path, size: int, seed: int, with_single_file: bool) -> dict:
    row = {"family": family.name, "size": f"{size}x{size}", "seed": seed, "steps": family.steps, "guidance_scale": family.guidance_scale}
    folder = write(family, scratch)
    theirs, mine = {}, {}
    for dtype in DTYPES:
        out = scratch / f"{family.name}-{dtype}"
        started = time.monotonic()
        worker = [sys.executable, __file__, "--scratch", scratch, "--size", str(size), "--seed", str(seed), "--worker", dtype, family.name]
        subprocess.run(worker, check=True)
        theirs[dtype] = np.load(f"{out}.npz")
        row[f"diffusers_{dtype}_s"] = round(time.monotonic() - started, 1)
        started = time.monotonic()
        mine[dtype] = ours(family, folder, size, seed, dtype, out)
        row[f"hypergen_{dtype}_s"] = round(time.monotonic() - started, 1)
        row[f"hypergen_{dtype}_peak_rss_bytes"] = mine[dtype]["peak_rss_bytes"]
    row["picture_spread"] = round(float(theirs["float32"]["spread"]), 3)
    row["latents_std"] = round(float(theirs["float32"]["latents"].std()), 3)
    row["float32"] = apart(mine["float32"], theirs["float32"])
    # Both against the same thing: diffusers' float32.
    row["bfloat16"] = apart(mine["bfloat16"], theirs["float32"])
    row["bfloat16_diffusers"] = apart(theirs["bfloat16"], theirs["float32"])
    if with_single_file and family.name in single.PREDICTIONS:
        row["single_file"] = single_file(family, scratch, size, seed)
    return row


def table(rows: list[dict]) -> str:
    head = "| family | size, steps | float32: picture | latents | bfloat16: latents | diffusers' bfloat16: latents |\n| --- | --- | --- | --- | --- | --- |\n"
    line = "| {family} | {size}, {steps} | {0[picture_db]} dB | {0[latents]} | {1[latents]} | {2[latents]} |\n"
    return head + "".join(line.format(r["float32"], r["bfloat16"], r["bfloat16_diffusers"], **r) for r in rows)


def keep(row: dict) -> None:
    """Writes a row beside those of the same day's other families, sizes and seeds."""
    path = ROOT / f"bench/results/{date.today()}-fidelity-{platform.machine()}-{os.cpu_count()}cores.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    key = lambda r: (r["family"], r["size"], r.get("seed", DEFAULT_SEED))
    rows = [r for r in rows if key(r) != key(row)] + [row]
    path.write_text("[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=[f.name for f in FAMILIES])
    parser.add_argument("--scratch", type=Path, required=True, help="where the weights go: 30 GB for all")
    parser.add_argument("--size", type=int, help="side of the pictures, instead of each family's")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"of the drawing ({DEFAULT_SEED})")
    parser.add_argument("--single-file", action="store_true", help="also from a single file in the original key layout")
    parser.add_argument("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    scratch = args.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.families:
        family = BY_NAME[name]
        size = args.size or family.size
        if args.worker:
            reference(family, scratch / name, size, args.seed, args.worker, scratch / f"{name}-{args.worker}.npz")
            continue
        rows.append(compare(family, scratch, size, args.seed, args.single_file))
        print(json.dumps(rows[-1]), flush=True)
        keep(rows[-1])
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
