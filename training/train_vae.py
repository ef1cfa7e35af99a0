"""Trains the VAE, which shrinks 128x128 pictures to 16x16x4; writes WORK/vae/ (diffusers layout) and WORK/vae.png.

It starts from a VAE of one level less, where one is given: the shared blocks are copied, the new finest level learns to hand
them the picture at half size, and the latents therefore begin where the old UNet expects them.
"""

import argparse
import copy
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from art import COLOUR_NAMES, COLOURS, SIZE, Art
from common import Clock, Ema, pick_device, save_state

LEVELS = 4


def build() -> AutoencoderKL:
    """The VAE's shape; 32 channels at the finest level keep it affordable on a CPU."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(32, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def grow(new: AutoencoderKL, old: AutoencoderKL):
    """Copies a VAE of one level less into `new`: the old encoder's level k becomes k + 1, the decoder's keep their number."""
    target, source = new.state_dict(), old.state_dict()
    for key, value in source.items():
        parts = key.split(".")
        if key.startswith("encoder.down_blocks."):
            parts[2] = str(int(parts[2]) + 1)
        name = ".".join(parts)
        if name in target and target[name].shape == value.shape:
            target[name] = value.clone()
    new.load_state_dict(target)
    with torch.no_grad():
        # The new levels begin as (nearly) nothing but a pass through: their residual branches are silent.
        for block in (new.encoder.down_blocks[0], new.decoder.up_blocks[LEVELS - 1]):
            for resnet in block.resnets:
                resnet.conv2.weight.zero_()
                resnet.conv2.bias.zero_()
        smooth = new.decoder.up_blocks[LEVELS - 2].upsamplers[0].conv
        smooth.weight.mul_(0.1)
        for channel in range(smooth.weight.shape[0]):
            smooth.weight[channel, channel] += 1 / 9
        smooth.bias.zero_()


class Pictures:
    """Batches of composed pictures: all styles, all backgrounds, small shifts and scales."""

    def __init__(self, art: Art, seed: int):
        self.art, self.random = art, random.Random(seed)

    def one(self) -> np.ndarray:
        draw = self.random
        index = draw.randrange(len(self.art.pictures))
        colour = "white" if draw.random() < 0.25 else draw.choice(COLOUR_NAMES)
        rgb = [min(255, max(0, c + draw.gauss(0, 4))) for c in COLOURS[colour]]
        shift = (draw.randint(-4, 4), draw.randint(-4, 4))
        return self.art.compose(index, rgb, draw.choice((112, 120)), shift, draw.random() < 0.3)

    def batch(self, count: int) -> torch.Tensor:
        stacked = np.stack([self.one() for _ in range(count)])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(error: torch.Tensor) -> torch.Tensor:
    """Absolute error, absolute error of the gradients (edges), and squared error (large misses)."""
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * (across + down) + 0.5 * error.square().mean()


def reconstruct(vae, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(vae.encode(pictures).latent_dist.mean).sample


def report(vae, art: Art, path: Path, device) -> float:
    """Measures on fixed pictures, sets the latents' scale, draws originals above reconstructions; returns the PSNR in dB."""
    picked = range(0, len(art.pictures), max(1, len(art.pictures) // 48))
    arrays = [art.compose(i, COLOUR_NAMES[n % 10]) for n, i in enumerate(picked)]
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        y = vae.decode(z).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / (y - x).square().mean().item())
    vae.register_to_config(scaling_factor=float(1 / z.std().item()))
    rows = [part[k : k + 12] for k in (0, 12) for part in (x, y)]
    sheet = np.concatenate([np.concatenate(list(r.permute(0, 2, 3, 1).cpu().numpy()), 1) for r in rows])
    Image.fromarray(((sheet + 1) * 127.5).clip(0, 255).astype(np.uint8)).save(path)
    return psnr


def train(args):
    device = pick_device(args.device)
    work = Path(args.work)
    art = Art(work / "art")
    vae, teacher = build(), None
    if args.warm_start:
        teacher = AutoencoderKL.from_pretrained(args.warm_start).float().eval().requires_grad_(False).to(device)
        grow(vae, teacher)
    vae.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = Ema(vae.parameters(), 0.998, every=5)
    state_path, step, clock = work / "vae.state", 0, Clock(device)
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        ema.values, ema.count, step, clock = state["ema"], state["ema_count"], state["step"], Clock(device, state["spent"])

    def save():
        save_state(state_path, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.values,
                                "ema_count": ema.count, "step": step, "spent": clock.spent})
        ema.swap()
        copied = copy.deepcopy(vae).float().eval()
        ema.swap()
        print(f"step {step} average's PSNR {report(copied, art, work / 'vae.png', device):.2f} dB", flush=True)
        copied.save_pretrained(work / "vae")

    pictures, saved, total = Pictures(art, step), clock.spent, 0.0
    while clock.tick() < args.budget:
        done = clock.spent / args.budget
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        x = pictures.batch(args.batch).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = y.float() - x
        loss = reconstruction_loss(error) + 1e-6 * posterior.kl().mean()
        if teacher is not None and done < args.distil:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                wanted = teacher.encode(F.avg_pool2d(x, 2)).latent_dist.mean
            loss = loss + 0.5 * (1 - done / args.distil) * F.mse_loss(posterior.mean.float(), wanted.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        step, total = step + 1, total + error.detach().square().mean().item()
        if step % 50 == 0:
            print(f"{step} {clock.spent:.0f}s PSNR {10 * math.log10(4 * 50 / total):.2f}", flush=True)
            total = 0.0
        if clock.spent - saved > 240:
            saved = clock.spent
            save()
    save()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/; results go there")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=1200, help="seconds of training, pauses not counted")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warm-start", help="folder of a VAE with one level less to grow from")
    parser.add_argument("--distil", type=float, default=0.4, help="share of the budget that keeps the old VAE's latents")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
