"""Encodes every picture on every trained background once: WORK/latents.npz, what the diffusion model trains on.

The combinations held out for the evaluation are not in it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from art import COLOUR_NAMES, Art, held_out
from common import pick_device


def combinations(art: Art) -> list:
    """(picture's index, colour's index) of everything that may be trained on."""
    return [
        (i, c)
        for i, picture in enumerate(art.pictures)
        for c, colour in enumerate(COLOUR_NAMES)
        if not held_out(picture.name, picture.style, colour)
    ]


def encode(args):
    device = pick_device(args.device)
    work = Path(args.work)
    art = Art(work / "art")
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device, memory_format=torch.channels_last).eval()
    items = combinations(art)
    latents = np.empty((len(items), vae.config.latent_channels, 16, 16), np.float16)
    small = args.small_vae and AutoencoderKL.from_pretrained(args.small_vae).float().to(device).eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(items), 32):
            arrays = [art.compose(i, COLOUR_NAMES[c]) for i, c in items[start : start + 32]]
            x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device)
            encoder, x = (small, F.avg_pool2d(x, 2)) if small else (vae, x)
            z = encoder.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            latents[start : start + 32] = (z * vae.config.scaling_factor).cpu().numpy()
            if start % 1600 == 0:
                print(f"{start} of {len(items)}", flush=True)
    pictures, colours = np.array(items).T
    np.savez(work / "latents.npz", latents=latents, pictures=pictures, colours=colours)
    print(f"{len(items)} latents, standard deviation {latents.astype(np.float32).std():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/ and vae/; latents.npz goes there")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--small-vae", help="the VAE that WORK/vae grew from: the same latents for a quarter of the work")
    encode(parser.parse_args())


if __name__ == "__main__":
    main()
