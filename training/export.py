"""Writes what a release needs of a trained model: float16 weights in the diffusers layout, nothing else; checks the size."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

# What the binary may carry, and the files that it embeds.
MOST_BYTES = 40_000_000
FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


def forget_path(file: Path):
    """Removes where the weights lay when they were loaded, which is nobody else's business."""
    settings = json.loads(file.read_text())
    if settings.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def export(work: Path, out: Path) -> int:
    """Writes `out` and returns its size in bytes. Refuses weights that float16 cannot hold."""
    pipe = StableDiffusionPipeline.from_pretrained(work / "model", dtype=torch.float32)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        half = part.half()
        for name, value in half.state_dict().items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} does not fit float16")
    pipe.save_pretrained(out)
    # Both generations of the tokenizer's files, so that older loaders read it too.
    for file in (work / "tokenizer").iterdir():
        shutil.copy(file, out / "tokenizer" / file.name)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
        if file.name in ("config.json", "model_index.json"):
            forget_path(file)
    missing = [f for f in FILES if not (out / f).exists()]
    if missing:
        raise FileNotFoundError(f"{out} lacks {missing}")
    size = sum((out / f).stat().st_size for f in FILES)
    if size > MOST_BYTES:
        raise ValueError(f"{size} bytes are more than the {MOST_BYTES} that the binary may carry")
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with model/ and tokenizer/")
    parser.add_argument("--out", required=True, help="the folder to write, models/emoji say")
    args = parser.parse_args()
    print(f"{export(Path(args.work), Path(args.out)) / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
