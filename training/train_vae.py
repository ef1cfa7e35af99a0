"""Trains the VAE, which shrinks 128x128 pictures to 16x16x4; writes WORK/vae/ (diffusers layout) and WORK/vae.png.

Given a VAE of one level less (64x64 to 16x16x4), ours grows from it. The encoder is built, not trained: it halves the picture
and goes on as the old one, so its latents never change while the decoder learns to draw them at twice the size, and the
diffusion model may be trained before, beside or after it. Without such a VAE both halves are trained together.
"""

import argparse
import copy
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from art import COLOUR_NAMES, COLOURS, SIZE, Art
from common import Clock, Ema, Half, pick_device, save_state

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
    target = new.state_dict()
    for key, value in old.state_dict().items():
        parts = key.split(".")
        if key.startswith("encoder.down_blocks."):
            parts[2] = str(int(parts[2]) + 1)
        name = ".".join(parts)
        if name in target and target[name].shape == value.shape:
            target[name] = value.clone()
    new.load_state_dict(target)
    with torch.no_grad():
        # The new levels begin as a mere pass through: their residual branches are silent.
        for block in (new.encoder.down_blocks[0], new.decoder.up_blocks[LEVELS - 1]):
            for resnet in block.resnets:
                resnet.conv2.weight.zero_()
                resnet.conv2.bias.zero_()
        halve(new.encoder, old.encoder.conv_in)
        smooth = new.decoder.up_blocks[LEVELS - 2].upsamplers[0].conv
        smooth.weight.mul_(0.1)
        for channel in range(smooth.weight.shape[0]):
            smooth.weight[channel, channel] += 1 / 9
        smooth.bias.zero_()


def halve(encoder, old_conv_in):
    """Makes the new finest level compute "halve the picture, then the old first convolution".

    The first convolution copies each colour at nine offsets (27 of 32 channels); the downsampling one, which sees rows
    2i to 2i + 2 of that, so reaches rows 2i - 1 to 2i + 3 of the picture. A half-size row i - 1, i, i + 1 is the mean of rows
    (2i - 2, 2i - 1), (2i, 2i + 1), (2i + 2, 2i + 3): row 2i - 2 alone is out of reach, and its neighbour stands in for it.
    """
    # For each of the old kernel's rows: pairs of (row of the downsampling kernel, offset copied by the first convolution).
    reach = {0: ((0, -1), (0, -1)), 1: ((0, 0), (1, 0)), 2: ((2, 0), (2, 1))}
    first, down = encoder.conv_in, encoder.down_blocks[0].downsamplers[0].conv
    for layer in (first, down):
        layer.weight.zero_()
        layer.bias.zero_()
    for colour in range(3):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                first.weight[colour * 9 + (dy + 1) * 3 + dx + 1, colour, dy + 1, dx + 1] = 1
    down.bias.copy_(old_conv_in.bias)
    for a in range(3):
        for b in range(3):
            for y, dy in reach[a]:
                for x, dx in reach[b]:
                    for colour in range(3):
                        channel = colour * 9 + (dy + 1) * 3 + dx + 1
                        down.weight[:, channel, y, x] += old_conv_in.weight[:, colour, a, b] / 4


class Pictures:
    """Batches of composed pictures: all styles, all backgrounds, some shifted, scaled or mirrored."""

    def __init__(self, art: Art, seed: int):
        self.art, self.random = art, random.Random(seed)

    def one(self) -> np.ndarray:
        draw = self.random
        index = draw.randrange(len(self.art.pictures))
        colour = "white" if draw.random() < 0.25 else draw.choice(COLOUR_NAMES)
        if draw.random() < 0.7:
            return self.art.compose(index, colour)
        rgb = [min(255, max(0, c + draw.gauss(0, 6))) for c in COLOURS[colour]]
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


def report(vae, art: Art, path: Path, device, rescale: bool) -> float:
    """Measures on fixed pictures, sets the latents' scale where asked to, draws originals above reconstructions; returns the PSNR in dB."""
    picked = range(0, len(art.pictures), max(1, len(art.pictures) // 48))
    arrays = [art.compose(i, COLOUR_NAMES[n % 10]) for n, i in enumerate(picked)]
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        y = vae.decode(z).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / (y - x).square().mean().item())
    if rescale:
        vae.register_to_config(scaling_factor=float(1 / z.std().item()))
    rows = [part[k : k + 12] for k in (0, 12) for part in (x, y)]
    sheet = np.concatenate([np.concatenate(list(r.permute(0, 2, 3, 1).cpu().numpy()), 1) for r in rows])
    Image.fromarray(((sheet + 1) * 127.5).clip(0, 255).astype(np.uint8)).save(path)
    return psnr


class Trainer:
    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        # What is already trained comes apart at the rate that a new VAE wants.
        self.rate = args.rate or (4e-4 if args.warm_start else 1.5e-3)
        self.device = pick_device(args.device)
        self.art = Art(self.work / "art")
        self.vae, self.old = build(), None
        if args.warm_start:
            self.old = AutoencoderKL.from_pretrained(args.warm_start).float().eval().requires_grad_(False)
            grow(self.vae, self.old)
            self.vae.register_to_config(scaling_factor=self.old.config.scaling_factor)
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
            self.old.to(self.device, torch.bfloat16, memory_format=torch.channels_last)
        self.vae.to(self.device, memory_format=torch.channels_last)
        self.parameters = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.ema = Ema(self.parameters, 0.998, every=5)
        self.step, self.clock = 0, Clock(self.device)
        self.resume()
        self.half = Half(self.vae)
        if args.compile:
            decoder = self.half.copies[0]
            decoder.decode = torch.compile(decoder.decode)
        self.pictures = Pictures(self.art, self.step)

    def resume(self):
        path = self.work / "vae.state"
        if path.exists():
            state = torch.load(path, map_location=self.device)
            self.vae.load_state_dict(state["vae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.values, self.ema.count = state["ema"], state["ema_count"]
            self.step, self.clock = state["step"], Clock(self.device, state["spent"])

    def save(self):
        save_state(self.work / "vae.state", {
            "vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema.values,
            "ema_count": self.ema.count, "step": self.step, "spent": self.clock.spent,
        })
        self.ema.swap()
        averaged = copy.deepcopy(self.vae).eval()
        self.ema.swap()
        psnr = report(averaged, self.art, self.work / "vae.png", self.device, self.old is None)
        averaged.save_pretrained(self.work / "vae")
        print(f"step {self.step}: the average reconstructs at {psnr:.2f} dB", flush=True)

    def latents(self, x: torch.Tensor) -> tuple:
        """A batch's latents and what they cost. Those of a grown VAE are shaken, for a diffusion model's are never exact."""
        vae = self.half.copies[0]
        if self.old is None:
            posterior = vae.encode(x).latent_dist
            return posterior.sample(), 1e-6 * posterior.kl().float().mean()
        with torch.no_grad():
            mean = self.old.encode(F.avg_pool2d(x, 2)).latent_dist.mean
        return mean + torch.randn_like(mean) * (0.15 * torch.rand(len(x), 1, 1, 1, device=x.device)).to(x.dtype), 0.0

    def train_step(self) -> float:
        x = self.pictures.batch(self.args.batch).to(self.device)
        z, cost = self.latents(x.bfloat16())
        error = self.half.copies[0].decode(z).sample.float() - x
        (reconstruction_loss(error) + cost).backward()
        self.half.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        done = min(1.0, self.clock.spent / self.args.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, (self.step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        self.optimizer.step()
        self.half.refresh()
        self.ema.update(self.step)
        self.step += 1
        return error.detach().square().mean().item()

    def run(self):
        if self.step == 0:
            self.save()
        saved, total = self.clock.spent, 0.0
        while self.clock.tick() < self.args.budget:
            total += self.train_step()
            if self.step % 20 == 0:
                psnr = 10 * math.log10(4 * 20 / total)
                print(f"{time.strftime('%H:%M')} step {self.step} {self.clock.spent:.0f}s PSNR {psnr:.2f}", flush=True)
                total = 0.0
            if self.clock.spent - saved > self.args.save_every:
                saved = self.clock.spent
                self.save()
        self.save()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/; results go there")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=1200, help="seconds of training, pauses not counted")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, help="peak learning rate; 4e-4 for a grown VAE, 1.5e-3 for a new one")
    parser.add_argument("--warm-start", help="folder of a VAE with one level less to grow from")
    parser.add_argument("--compile", action="store_true", help="compile the decoder first: a minute or two that long trainings repay")
    parser.add_argument("--save-every", type=float, default=120, help="seconds of training between checkpoints")
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
