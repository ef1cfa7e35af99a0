"""Two ways to draw many prompts with a model folder: diffusers in batches, or HyperGen's server one after the other.

Both give float32 arrays of shape (size, size, 3) in -1..1. The server is the quicker one on a CPU.
"""

import base64
import io
import json
import re
import subprocess
import threading
import urllib.request

import numpy as np
import torch
from PIL import Image


def seed_of(prompt: str, number: int) -> int:
    """Every picture has its own seed, the same in each run and in both ways."""
    return (number * 7919 + sum(prompt.encode())) % 2**31


class Diffusers:
    """diffusers' own pipeline, with the sampler that the folder names; the figures of the model card come from here or below."""

    def __init__(self, folder, device: str = "cpu", batch: int = 32):
        from diffusers import StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.batch, self.device = batch, device

    def draw(self, prompts: list, size: int, steps: int, guidance: float) -> np.ndarray:
        parts = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            seeds = [torch.Generator().manual_seed(seed_of(p, start + k)) for k, p in enumerate(part)]
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16):
                parts.append(self.pipe(part, num_inference_steps=steps, guidance_scale=guidance, height=size, width=size,
                                       generator=seeds, output_type="np").images)
        return np.concatenate(parts).astype(np.float32) * 2 - 1

    def close(self):
        pass


class Server:
    """`hypergen serve MODEL`, started on a free port and stopped at the end."""

    def __init__(self, binary, folder):
        command = [str(binary), "serve", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.address = None
        for line in self.process.stdout:
            found = re.search(r"http://[0-9.]+:\d+", line)
            if found:
                self.address = found.group()
                break
        if not self.address:
            raise RuntimeError(f"{binary} did not start")
        # What the server says is read on, for a full pipe would stop it.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def draw(self, prompts: list, size: int, steps: int, guidance: float) -> np.ndarray:
        return np.stack([self._one(p, seed_of(p, k), size, steps, guidance) for k, p in enumerate(prompts)])

    def _one(self, prompt: str, seed: int, size: int, steps: int, guidance: float) -> np.ndarray:
        body = {"prompt": prompt, "seed": seed, "size": f"{size}x{size}", "num_inference_steps": steps,
                "guidance_scale": guidance, "response_format": "b64_json"}
        request = urllib.request.Request(
            f"{self.address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            encoded = json.load(answer)["data"][0]["b64_json"]
        picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
        return np.asarray(picture, np.float32) / 127.5 - 1

    def close(self):
        self.process.terminate()
        self.process.wait()


def open_drawer(folder, binary=None, device: str = "cpu"):
    """The server where its binary is named, diffusers otherwise."""
    return Server(binary, folder) if binary else Diffusers(folder, device)
