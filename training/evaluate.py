"""Does the model draw what it was asked for? Prints subject and background accuracy; exits with 1 where a target is missed.

Asked are: every trained subject once, in a style and on a background it was trained with; combinations of subject, style and
background that were held out; few steps at three guidances; and, for comparison, an earlier model. Who answers is the judge
(judge.py), whose own accuracy on art that went through the VAE is printed first: no model can be expected to beat it.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np

import drawing
import judge as judging
from art import COLOUR_NAMES, SIZE, STYLES, Art, held_out
from captions import COLOUR_OF_PLAIN_CAPTIONS, prompt

DEFAULTS = (50, 7.5)
TARGETS = {"subject": 0.80, "background": 0.90}


def questions(art: Art, held: bool, limit: int) -> list:
    """(name, style, colour) to ask for, in a fixed shuffled order."""
    draw = random.Random(11)
    known = {(p.name, p.style) for p in art.pictures}
    if held:
        asked = [(n, s, c) for n, s in sorted(known) for c in COLOUR_NAMES if held_out(n, s, c)]
    else:
        asked = []
        for subject in art.names:
            style = draw.choice([s for s in STYLES if (subject, s) in known])
            plain = draw.random() < 0.4
            colours = [c for c in COLOUR_NAMES if not held_out(subject, style, c)]
            asked.append((subject, style, COLOUR_OF_PLAIN_CAPTIONS if plain else draw.choice(colours)))
    draw.shuffle(asked)
    return asked[:limit] if limit else asked


def ask(drawer, judge, art: Art, asked: list, steps: int, guidance: float, size: int = SIZE) -> dict:
    """Draws and judges; the accuracies, how long a picture took, and the subjects that were not recognised."""
    started = time.monotonic()
    pictures = drawer.draw([prompt(*q) for q in asked], size, steps, guidance)
    seconds = (time.monotonic() - started) / len(asked)
    named = [art.names[i] for i in judging.name(judge, pictures)]
    subject = np.mean([n == q[0] for n, q in zip(named, asked)])
    background = np.mean([judging.background(p) == q[2] for p, q in zip(pictures, asked)])
    missed = [f"{q[0]} ({q[1]}, {q[2]}) as {n}" for n, q in zip(named, asked) if n != q[0]]
    return {"pictures": len(asked), "subject": round(float(subject), 4), "background": round(float(background), 4),
            "seconds": round(seconds, 3), "missed": missed}


def show(title: str, result: dict):
    print(f"{title:44} {result['pictures']:4} pictures  subject {result['subject']:6.1%}  "
          f"background {result['background']:6.1%}  {result['seconds']:.2f} s each", flush=True)


def evaluate(args) -> bool:
    work = Path(args.work)
    art = Art(work / "art")
    judge = judging.load(work, len(art.names))
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae").float().eval()
    results = {"judge": judging.examine(judge, art, vae)}
    print("the judge itself:", ", ".join(f"{k} {v:.1%}" for k, v in results["judge"].items()), flush=True)
    trained, held = questions(art, False, args.limit), questions(art, True, args.limit or 200)
    drawer = drawing.open_drawer(args.model, args.hypergen, args.device)
    try:
        for title, asked, (steps, guidance) in (
            ("trained, 50 steps, guidance 7.5", trained, DEFAULTS),
            ("held-out combinations, 50 steps, 7.5", held, DEFAULTS),
            *((f"trained, 8 steps, guidance {g:g}", trained[: args.few], (8, g)) for g in (1, 4, 8)),
        ):
            results[title] = ask(drawer, judge, art, asked, steps, guidance)
            show(title, results[title])
    finally:
        drawer.close()
    if args.first:
        drawer = drawing.open_drawer(args.first, args.hypergen, args.device)
        flat = [(n, "flat", c) for n, _, c in trained]
        try:
            results["first version"] = ask(drawer, judge, art, flat, *DEFAULTS, size=64)
        finally:
            drawer.close()
        show("first version (flat, 64x64), 50 steps, 7.5", results["first version"])
    (work / "evaluation.json").write_text(json.dumps(results, indent=1))
    reached = results["trained, 50 steps, guidance 7.5"]
    passed = all(reached[key] >= least for key, least in TARGETS.items())
    print("targets", ", ".join(f"{k} {v:.0%}" for k, v in TARGETS.items()), "reached" if passed else "MISSED")
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with art/ and judge.pt; evaluation.json goes there")
    parser.add_argument("--model", required=True, help="the diffusers folder to judge")
    parser.add_argument("--first", help="an earlier model's folder, which draws flat emoji at 64x64, for comparison")
    parser.add_argument("--hypergen", help="HyperGen's binary: draw with its server instead of diffusers")
    parser.add_argument("--device", default="cpu", help="where diffusers draws")
    parser.add_argument("--limit", type=int, default=0, help="so many questions a set at most; 0: all subjects, 200 combinations")
    parser.add_argument("--few", type=int, default=100, help="questions at 8 steps")
    sys.exit(0 if evaluate(parser.parse_args()) else 1)


if __name__ == "__main__":
    main()
