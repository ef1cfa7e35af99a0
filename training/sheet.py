"""Draws the contact sheet of docs/images: what a new user would type, at the API's defaults, unpicked, with the prompts beneath."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import drawing
from art import SIZE

COLUMNS, LABEL = 8, 18
PROMPTS = (
    "red apple", "a dog", "cat, black background", "rocket, blue background",
    "slice of pizza", "red heart, pink background", "a lion on a green background", "astronaut, purple background",
    "glossy car", "castle, noto style", "birthday cake, glossy style", "chef",
    "sunflower, blue background", "penguin", "smiling face with sunglasses", "guitar, orange background",
    "owl, glossy style, purple background", "strawberry, noto style", "tree", "house on a yellow background",
    "police officer", "ghost, black background", "fish, glossy style", "rainbow, gray background",
    "doctor, glossy style", "butterfly, noto style", "banana, red background", "a bicycle",
    "Christmas tree, noto style", "crown, purple background", "frog, pink background", "hamburger, glossy style",
    "woman", "man, noto style", "robot, orange background", "snowman, blue background",
    "soccer ball, green background", "thumbs up", "light bulb, black background", "elephant, noto style",
)


def assemble(pictures: np.ndarray, prompts: tuple) -> Image.Image:
    """Pictures in -1..1 as a sheet with each prompt under its picture."""
    rows = -(-len(prompts) // COLUMNS)
    side = pictures.shape[1]
    sheet = Image.new("RGB", (COLUMNS * (side + 6) + 6, rows * (side + LABEL + 6) + 6), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for k, (picture, text) in enumerate(zip(pictures, prompts)):
        x, y = 6 + (k % COLUMNS) * (side + 6), 6 + (k // COLUMNS) * (side + LABEL + 6)
        sheet.paste(Image.fromarray(((picture + 1) * 127.5).clip(0, 255).astype(np.uint8)), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#dddddd")
        words = text if len(text) <= 27 else text[:26] + "…"
        pen.text((x + side / 2, y + side + 3), words, fill="#333333", font=font, anchor="mt")
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusers folder")
    parser.add_argument("--out", required=True, type=Path, help="the picture to write, its format by its name")
    parser.add_argument("--hypergen", help="HyperGen's binary: draw with its server instead of diffusers")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    args = parser.parse_args()
    drawer = drawing.open_drawer(args.model, args.hypergen)
    try:
        pictures = drawer.draw(list(PROMPTS), SIZE, args.steps, args.guidance)
    finally:
        drawer.close()
    assemble(pictures, PROMPTS).save(args.out, quality=85)


if __name__ == "__main__":
    main()
