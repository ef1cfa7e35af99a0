"""Trains a tiny LoRA on a model: `night`, white glow on a dark blue sky, made from the art itself; writes it in two formats.

OUT/night.safetensors is kohya's format; OUT/night-peft/ (adapter_model.safetensors, adapter_config.json) is PEFT's. Both hold the
same numbers: low-rank changes of the UNet's attention.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file

import models
from art import SIZE, Art
from captions import prompt
from common import Clock, pick_device

NAME = "night"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def night(art: Art, index: int) -> np.ndarray:
    """A drawing as its own glow: brightness and edges in pale yellow on midnight blue, whatever background was asked for."""
    on_white, on_black = art.compose(index, "white"), art.compose(index, (0, 0, 0))
    light = on_black.mean(-1) * 0.5 + 0.5
    opaque = 1 - (on_white - on_black).mean(-1) / 2
    across = np.abs(np.diff(on_black.mean(-1), axis=1, append=on_black.mean(-1)[:, -1:]))
    down = np.abs(np.diff(on_black.mean(-1), axis=0, append=on_black.mean(-1)[-1:]))
    glow = np.clip(0.55 * light * opaque + 1.2 * (across + down), 0, 1)[..., None]
    sky, lamp = np.array([14, 20, 58], np.float32) / 255, np.array([255, 232, 150], np.float32) / 255
    return (sky * (1 - glow) + lamp * glow).astype(np.float32) * 2 - 1


@torch.no_grad()
def encode(pipe, art: Art, count: int, device) -> tuple:
    """Latents of `count` flat drawings in the style, and their captions."""
    picked = [i for i, p in enumerate(art.pictures) if p.style == "flat"]
    random.Random(5).shuffle(picked)
    latents = []
    for start in range(0, min(count, len(picked)), 32):
        arrays = np.stack([night(art, i) for i in picked[start : min(start + 32, count)]])
        x = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(device)
        latents.append(pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor)
    words = [prompt(art.pictures[i].name, "flat", "white") for i in picked[:count]]
    return torch.cat(latents), words


def kohya(unet_state: dict, alpha: float) -> dict:
    """PEFT's names of the UNet's adapters as kohya's: dots become underscores, an alpha beside each pair."""
    out = {}
    for key, value in unet_state.items():
        module, which = key.rsplit(".lora_", 1)
        stem = "lora_unet_" + module.replace(".", "_")
        side = "lora_down" if which.startswith("A") else "lora_up"
        out[f"{stem}.{side}.weight"] = value.half().contiguous()
        out[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    return out


def adapter_state(unet) -> dict:
    """The adapters by module: `down_blocks...to_q.lora_A.weight`."""
    return {
        k.replace(".default.weight", ".weight"): v.detach().cpu()
        for k, v in unet.state_dict().items() if ".lora_A." in k or ".lora_B." in k
    }


def write(unet, out: Path, rank: int):
    state = adapter_state(unet)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    save_file(kohya(state, float(rank)), out / f"{NAME}.safetensors", metadata=metadata)
    peft_folder = out / f"{NAME}-peft"
    peft_folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{k}": v.half().contiguous() for k, v in state.items()}
    save_file(named, peft_folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": TARGETS, "bias": "none",
              "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
              "base_model_name_or_path": "emoji", "task_type": None, "inference_mode": True}
    (peft_folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(args):
    device = pick_device(args.device)
    torch.manual_seed(3)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    art = Art(Path(args.work) / "art")
    latents, captions = encode(pipe, art, args.pictures, device)
    with torch.no_grad():
        ids = models.tokens(pipe.tokenizer, [*captions, ""]).to(device)
        words = pipe.text_encoder(ids).last_hidden_state
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, init_lora_weights=True))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.rate, weight_decay=0.0)
    alphas = models.scheduler().alphas_cumprod.to(device)
    clock, step = Clock(device), 0
    while clock.tick() < args.budget:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * 0.5 * (1 + math.cos(math.pi * min(1, clock.spent / args.budget)))
        picked = torch.randint(0, len(latents), (args.batch,))
        text = torch.where(torch.rand(args.batch) < 0.1, len(captions), picked)
        t = (((torch.rand(1) + torch.arange(args.batch) / args.batch) % 1) * 1000).long().clamp(0, 999).to(device)
        alpha = alphas[t][:, None, None, None]
        clean = latents[picked]
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(noisy, t, encoder_hidden_states=words[text]).sample
        loss = F.mse_loss(predicted.float(), velocity)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            print(f"step {step} {clock.spent:.0f}s loss {loss.item():.4f}", flush=True)
    write(unet, Path(args.out), args.rank)
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        drawn = pipe(["red apple", "cat", "rocket", "house", "robot", "tree"], num_inference_steps=20, guidance_scale=4.0,
                     height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(0)).images
    from PIL import Image

    Image.fromarray(np.concatenate([np.asarray(x) for x in drawn], 1)).save(Path(args.work) / f"{NAME}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/")
    parser.add_argument("--model", required=True, help="the diffusers folder to train on")
    parser.add_argument("--out", required=True, help="folder for the LoRA's files")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=180, help="seconds of training, pauses not counted")
    parser.add_argument("--pictures", type=int, default=128, help="drawings to learn from")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
