"""The judge of the evaluation: a small classifier that names the subject of a 64x64 picture.

It is trained apart from the model, on the rendered art alone (all styles, all backgrounds, shifted, scaled, blurred, its
colours shaken), and must prove itself on what it is asked about: art that went through the VAE. The background's colour
needs no training: it is read from the picture's corners and edges.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from art import COLOUR_NAMES, COLOURS, Art
from common import Clock, pick_device, save_state

SIDE = 64


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """64x64 RGB in -1..1 to the logits of the subjects."""

    def __init__(self, subjects: int):
        super().__init__()
        self.features = nn.Sequential(
            block(3, 32, 2), block(32, 64, 1), block(64, 64, 2), block(64, 128, 1), block(128, 128, 2),
            block(128, 192, 1), block(192, 256, 2), block(256, 256, 1),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(256 * 16, subjects))

    def forward(self, x):
        return self.head(self.features(x))


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures of any size to the judge's."""
    return F.interpolate(pictures, (SIDE, SIDE), mode="area") if pictures.shape[-1] > SIDE else pictures


def background(picture: np.ndarray) -> str:
    """The colour, of the ten, nearest to the median of the picture's outermost frame and corners; (H, W, 3) in -1..1."""
    side = picture.shape[0]
    edge, corner = max(1, side // 32), side // 10
    frame = [picture[:edge].reshape(-1, 3), picture[-edge:].reshape(-1, 3),
             picture[:, :edge].reshape(-1, 3), picture[:, -edge:].reshape(-1, 3)]
    frame += [picture[ys, xs].reshape(-1, 3) for ys in (slice(corner), slice(-corner, None))
              for xs in (slice(corner), slice(-corner, None))]
    middle = np.median(np.concatenate(frame), 0)
    distances = [np.square(middle - (np.array(rgb) / 127.5 - 1)).sum() for rgb in COLOURS.values()]
    return COLOUR_NAMES[int(np.argmin(distances))]


def shaken(art: Art, draw: random.Random) -> tuple:
    """A training picture (64x64) and its picture's index."""
    index = draw.randrange(len(art.pictures))
    rgb = [draw.randrange(256) for _ in range(3)] if draw.random() < 0.3 else list(COLOURS[draw.choice(COLOUR_NAMES)])
    x = art.compose(index, rgb, draw.choice((104, 112, 120, 128)), (draw.randint(-8, 8), draw.randint(-8, 8)))
    x = x.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
    if draw.random() < 0.5:
        x = (x - x.mean()) * draw.uniform(0.7, 1.2) + x.mean() + draw.uniform(-0.15, 0.15)
        x = x * np.array([draw.uniform(0.9, 1.1) for _ in range(3)], np.float32)
    if draw.random() < 0.4:
        x = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, (1, 1), (0, 1))) / 4
    if draw.random() < 0.3:
        x = x + np.random.default_rng(draw.randrange(1 << 30)).normal(0, 0.06, x.shape)
    return x.astype(np.float32), index


def load(work: Path, subjects: int) -> Judge:
    judge = Judge(subjects)
    judge.load_state_dict(torch.load(work / "judge.pt", map_location="cpu"))
    return judge.eval()


@torch.no_grad()
def name(judge: Judge, pictures: np.ndarray) -> np.ndarray:
    """The subjects' indices for pictures of shape (N, H, W, 3) in -1..1."""
    x = shrink(torch.from_numpy(pictures).float().permute(0, 3, 1, 2))
    return torch.cat([judge(part).argmax(1) for part in x.split(64)]).numpy()


def examine(judge: Judge, art: Art, vae) -> dict:
    """Its accuracy on every picture on one background each, as rendered and after the VAE; that of the backgrounds too."""
    wanted = np.array([art.names.index(p.name) for p in art.pictures])
    colours = [COLOUR_NAMES[i % len(COLOUR_NAMES)] for i in range(len(art.pictures))]
    right = {"renders": 0, "reconstructions": 0, "backgrounds": 0}
    for start in range(0, len(wanted), 32):
        part = range(start, min(start + 32, len(wanted)))
        pictures = np.stack([art.compose(i, colours[i]) for i in part])
        right["renders"] += int((name(judge, pictures) == wanted[part.start : part.stop]).sum())
        if vae is None:
            continue
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            again = vae.decode(vae.encode(x).latent_dist.mean).sample.float().clamp(-1, 1)
        again = again.permute(0, 2, 3, 1).numpy()
        right["reconstructions"] += int((name(judge, again) == wanted[part.start : part.stop]).sum())
        right["backgrounds"] += sum(background(p) == colours[i] for p, i in zip(again, part))
    return {key: value / len(wanted) for key, value in right.items()}


def train(args):
    device = pick_device(args.device)
    work = Path(args.work)
    art = Art(work / "art")
    judge = Judge(len(art.names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    labels = torch.tensor([art.names.index(p.name) for p in art.pictures])
    draw, clock, step, total = random.Random(7), Clock(device), 0, 0.0
    while clock.tick() < args.budget:
        done = clock.spent / args.budget
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, done)))
        drawn = [shaken(art, draw) for _ in range(args.batch)]
        x = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 3, 1, 2).to(device)
        wanted = labels[[d[1] for d in drawn]].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = judge(x)
        loss = F.cross_entropy(logits.float(), wanted, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, total = step + 1, total + loss.item()
        if step % 100 == 0:
            print(f"step {step} {clock.spent:.0f}s loss {total / 100:.3f}", flush=True)
            total = 0.0
    judge.cpu().eval()
    save_state(work / "judge.pt", judge.state_dict())
    vae = AutoencoderKL.from_pretrained(work / "vae").eval() if (work / "vae").exists() else None
    print({key: round(value, 4) for key, value in examine(judge, art, vae).items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/ (and vae/); judge.pt goes there")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=240, help="seconds of training, pauses not counted")
    parser.add_argument("--batch", type=int, default=96)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
