"""Trains text encoder and UNet on the cached latents; writes WORK/model/ (diffusers layout, float32) and WORK/sheet.png.

Weights are kept in float32; a bfloat16 copy runs forwards and backwards, which both CPUs with AMX and GPUs do fastest.
A stopped training goes on where its last checkpoint was (WORK/diffusion.state); a larger --budget starts the rate anew.
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
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

import models
from art import COLOUR_NAMES, Art
from captions import caption
from common import Clock, Ema, Half, pick_device, save_state

SHEET_PROMPTS = (
    "red apple", "dog", "cat, black background", "rocket, blue background", "pizza, glossy style", "red heart, noto style",
    "a lion", "astronaut, purple background", "sunflower, green background", "a glossy car", "castle, noto style",
    "birthday cake, pink background", "smiling face with sunglasses", "doctor, glossy style", "guitar, orange background",
    "bicycle", "penguin, noto style, yellow background", "tree", "house on a red background", "ghost, gray background",
    "woman", "police officer, noto style", "strawberry, glossy style, blue background", "fish",
)


class Trainer:
    def __init__(self, args):
        self.args, self.work = args, Path(args.work)
        self.device = pick_device(args.device)
        self.art = Art(self.work / "art")
        self.tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(self.work / "vae").eval()
        self.text_encoder, self.unet = models.load(self.tokenizer, args.warm_start)
        self.text_encoder.to(self.device)
        self.unet.to(self.device, memory_format=torch.channels_last)
        if self.device.type == "cpu":
            models.use_plain_attention(self.unet)
        self.parameters = [*self.text_encoder.parameters(), *self.unet.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, args.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = Ema(self.parameters, args.ema)
        self.step, self.clock, self.draw = 0, Clock(self.device), random.Random(args.seed)
        self.resume()
        self.half = Half(self.text_encoder, self.unet)
        if args.compile:
            self.half.copies = [torch.compile(m) for m in self.half.copies]
        cached = np.load(self.work / "latents.npz")
        self.latents = torch.from_numpy(cached["latents"]).to(self.device)
        self.pictures, self.colours = cached["pictures"], cached["colours"]
        # White, which plain captions mean, and the flat style are asked for most often.
        white = torch.from_numpy(np.where(self.colours == COLOUR_NAMES.index("white"), args.white, 1.0))
        flat = torch.tensor([1.5 if self.art.pictures[i].style == "flat" else 1.0 for i in self.pictures])
        wanted = set(args.more_of.read_text().splitlines()) if args.more_of else ()
        more = torch.tensor([args.more if self.art.pictures[i].name in wanted else 1.0 for i in self.pictures])
        self.weights = white * flat * more
        self.alphas = models.scheduler().alphas_cumprod.to(self.device)

    def resume(self):
        path = self.work / "diffusion.state"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device)
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.values, self.ema.count = state["ema"], state["ema_count"]
        self.step, self.clock = state["step"], Clock(self.device, state["spent"])
        self.draw.seed(self.args.seed + self.step)
        torch.manual_seed(self.args.seed + self.step)

    def save(self):
        save_state(self.work / "diffusion.state", {
            "text_encoder": self.text_encoder.state_dict(), "unet": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(), "ema": self.ema.values, "ema_count": self.ema.count,
            "step": self.step, "spent": self.clock.spent,
        })

    def rate(self) -> float:
        done = min(1.0, self.clock.spent / self.args.budget)
        warm = min(1.0, (self.step + 1) / 200)
        return self.args.rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def captions(self, picked) -> list:
        """Captions for a batch; a tenth is empty, for guidance needs a model without a prompt."""
        return [
            "" if self.draw.random() < 0.1
            else caption(self.art.pictures[self.pictures[k]], COLOUR_NAMES[self.colours[k]], self.draw)
            for k in picked
        ]

    def train_step(self) -> torch.Tensor:
        count = self.args.batch
        picked = torch.multinomial(self.weights, count)
        clean = self.latents[picked.to(self.device)].float()
        # Timesteps are spread evenly over a batch, which makes its loss less noisy than independent draws do.
        t = (((torch.rand(1) + torch.arange(count) / count) % 1) * 1000).long().clamp(0, 999)[torch.randperm(count)]
        alpha = self.alphas[t.to(self.device)][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        text_encoder, unet = self.half.copies
        words = text_encoder(models.tokens(self.tokenizer, self.captions(picked.tolist())).to(self.device)).last_hidden_state
        noisy = noisy.bfloat16().contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t.to(self.device), encoder_hidden_states=words).sample
        loss = F.mse_loss(predicted.float(), velocity)
        loss.backward()
        self.half.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.half.refresh()
        self.ema.update(self.step)
        self.step += 1
        return loss.detach()

    def write_model(self):
        """The averaged weights as a diffusers folder, and a sheet of samples at the defaults of the API but for fewer steps."""
        self.ema.swap()
        text_encoder = copy.deepcopy(self.text_encoder).float().cpu().eval()
        unet = copy.deepcopy(self.unet).float().cpu().eval()
        self.ema.swap()
        pipe = StableDiffusionPipeline(
            vae=self.vae, text_encoder=text_encoder, tokenizer=self.tokenizer, unet=unet, scheduler=models.scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
        pipe.save_pretrained(self.work / "model")
        pipe.set_progress_bar_config(disable=True)
        sheets = []
        for guidance, steps in ((7.5, 25), (3.0, 8)):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                drawn = pipe(list(SHEET_PROMPTS), num_inference_steps=steps, guidance_scale=guidance, height=128, width=128,
                             generator=torch.Generator().manual_seed(0), output_type="np").images
            sheets += [np.concatenate(list(drawn[k : k + 12]), 1) for k in range(0, 24, 12)]
        sheet = (np.concatenate(sheets).clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(sheet).save(self.work / "sheet.png")

    def run(self):
        saved = drawn = self.clock.spent
        total, started, first = 0.0, self.clock.spent, self.step
        while self.clock.tick() < self.args.budget:
            total += self.train_step().item()
            if self.step % 50 == 0:
                speed = (self.step - first) * self.args.batch / max(1e-9, self.clock.spent - started)
                print(f"{time.strftime('%H:%M')} step {self.step} {self.clock.spent:.0f}s loss {total / 50:.4f} "
                      f"{speed:.1f}/s rate {self.rate():.1e}", flush=True)
                total = 0.0
            if self.clock.spent - saved > self.args.save_every:
                saved = self.clock.spent
                self.save()
            if self.clock.spent - drawn > self.args.draw_every:
                drawn = self.clock.spent
                self.write_model()
        self.save()
        self.write_model()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/, vae/, tokenizer/ and latents.npz")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=3600, help="seconds of training in all, earlier ones counted in, pauses not")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--ema", type=float, default=0.998, help="decay a step of the averaged weights")
    parser.add_argument("--white", type=float, default=3.0, help="how much more often white backgrounds are drawn than others")
    parser.add_argument("--more-of", type=Path, help="a file of subjects, one a line, to draw more often: those that came later, or are missed")
    parser.add_argument("--more", type=float, default=2.0, help="how much more often")
    parser.add_argument("--warm-start", help="a diffusers folder whose text_encoder/ and unet/ to start from")
    parser.add_argument("--save-every", type=float, default=150, help="seconds of training between checkpoints")
    parser.add_argument("--draw-every", type=float, default=450, help="seconds of training between sheets of samples")
    parser.add_argument("--compile", action="store_true", help="compile the models first: minutes that long trainings repay")
    parser.add_argument("--seed", type=int, default=1)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
