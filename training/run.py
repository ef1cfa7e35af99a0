"""From nothing to a model folder in one command: art, VAE, latents, diffusion model, judge, export, evaluation.

    python run.py --work WORK --out OUT
    python run.py --work WORK --out OUT --warm-start ../models/emoji --vae ../models/emoji/vae

Stages that are done are skipped and a stopped one goes on where its checkpoint was, so the same command may be given again.
--budget is the seconds of the diffusion model's training; the other stages take shares of it within limits.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# glibc gives large freed blocks back to the kernel, which clears them anew at the next use: an eighth of a compiled step on a CPU.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(10**9)}


def stage(name: str, *arguments):
    """Runs one of the scripts beside this file."""
    print(f"== {name} {' '.join(map(str, arguments))}", flush=True)
    environment = KEEP_MEMORY | {"OMP_WAIT_POLICY": "passive"} | os.environ
    subprocess.run([sys.executable, "-u", HERE / f"{name}.py", *map(str, arguments)], check=True, env=environment)


def art(work: Path):
    """Installs the art's packages at the versions of package-lock.json and renders the subjects."""
    if (work / "art" / "art.json").exists():
        return
    packages = work / "npm"
    packages.mkdir(parents=True, exist_ok=True)
    for file in ("package.json", "package-lock.json"):
        shutil.copy(HERE / file, packages / file)
    subprocess.run(["npm", "ci"], cwd=packages, check=True)
    subprocess.run(["node", HERE / "render.mjs", packages / "node_modules", work / "art"], check=True)


def tokenizer(work: Path):
    """The tokenizer stays the one that the repository has: byte-level BPE spells every word, and old weights go on fitting."""
    if not (work / "tokenizer").exists():
        shutil.copytree(HERE.parent / "models" / "emoji" / "tokenizer", work / "tokenizer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything in between; kept, a few hundred MB")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=3600, help="seconds for the diffusion model")
    parser.add_argument("--batch", type=int, default=64, help="the diffusion model's batch; 256 suits a GPU")
    parser.add_argument("--warm-start", help="a model folder whose text encoder and UNet to start from; from nothing without")
    vae = parser.add_mutually_exclusive_group()
    vae.add_argument("--vae", help="a VAE folder to take as it is")
    vae.add_argument("--warm-start-vae", help="a VAE folder of one level less to grow from")
    parser.add_argument("--first", help="an earlier model's folder for the evaluation to compare with")
    parser.add_argument("--hypergen", help="HyperGen's binary, to draw with it in the evaluation")
    args = parser.parse_args()
    work, shared = args.work, ("--work", args.work, "--device", args.device)
    # Compiling takes some minutes and makes a step a quarter shorter.
    compiled = ("--compile",) if args.budget >= 1800 else ()
    art(work)
    tokenizer(work)
    if not (work / "latents.npz").exists():
        if args.vae:
            shutil.copytree(args.vae, work / "vae", dirs_exist_ok=True)
        else:
            grown = ("--warm-start", args.warm_start_vae) if args.warm_start_vae else ()
            stage("train_vae", *shared, "--budget", min(3600, max(60, args.budget / 3)), *compiled, *grown)
        small = ("--small-vae", args.warm_start_vae) if args.warm_start_vae else ()
        stage("latents", *shared, *small)
    warm = ("--warm-start", args.warm_start) if args.warm_start else ()
    stage("train_diffusion", *shared, "--budget", args.budget, "--batch", args.batch, *compiled, *warm)
    if not (work / "judge.pt").exists():
        stage("judge", *shared, "--budget", min(600, max(60, args.budget / 8)))
    stage("export", "--work", work, "--out", args.out)
    drawer = ("--hypergen", args.hypergen) if args.hypergen else ()
    stage("sheet", "--model", args.out, "--out", work / "contact-sheet.webp", *drawer)
    earlier = ("--first", args.first) if args.first else ()
    stage("evaluate", "--work", work, "--model", args.out, *drawer, *earlier)


if __name__ == "__main__":
    main()
