"""The rendered art and how it becomes training pictures: placed on a coloured background, shifted, scaled, mirrored.

It knows nothing of models. Pictures are float32 arrays of shape (size, size, 3) in -1..1.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
STYLES = ("flat", "glossy", "noto")
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (226, 60, 60),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (70, 175, 95),
    "blue": (60, 120, 230),
    "purple": (140, 85, 200),
    "pink": (245, 160, 200),
    "gray": (150, 155, 160),
}
COLOUR_NAMES = tuple(COLOURS)
# One combination in so many is never trained on, for the evaluation.
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Picture:
    """One drawing of a subject in a style."""

    name: str
    aliases: tuple
    style: str
    keywords: tuple


def held_out(name: str, style: str, colour: str) -> bool:
    """Whether a combination is kept from training. White is the background of captions that name none, so it never is."""
    key = f"{name}/{style}/{colour}".encode()
    return colour != "white" and zlib.crc32(key) % HELD_OUT_ONE_IN == 0


class Art:
    """All rendered pictures: `pictures[i]` describes the premultiplied RGBA drawing `rgba[i]`."""

    def __init__(self, folder):
        folder = Path(folder)
        meta = json.loads((folder / "art.json").read_text())
        self.size = meta["size"]
        self.pictures = [
            Picture(p["name"], tuple(p["aliases"]), p["style"], tuple(p["keywords"])) for p in meta["pictures"]
        ]
        shape = (len(self.pictures), self.size, self.size, 4)
        self.rgba = np.memmap(folder / "art.rgba", dtype=np.uint8, mode="r", shape=shape)
        self.names = sorted({p.name for p in self.pictures})
        self._resized = {}

    def drawing(self, index: int, side: int) -> np.ndarray:
        """The drawing as premultiplied float RGBA of `side` x `side`; kept, for training asks for few sizes often."""
        key = (index, side)
        if key not in self._resized:
            planes = self.rgba[index].astype(np.float32) / 255
            resized = [
                np.asarray(Image.fromarray(planes[..., k]).resize((side, side), Image.LANCZOS)) for k in range(4)
            ]
            self._resized[key] = np.stack(resized, -1).clip(0, 1).astype(np.float16)
        return self._resized[key].astype(np.float32)

    def compose(self, index: int, colour, side: int = 120, shift=(0, 0), mirror: bool = False) -> np.ndarray:
        """The drawing on a background: a colour's name or an RGB triple of 0..255. `shift` is in pixels, right and down."""
        rgb = np.asarray(COLOURS[colour] if isinstance(colour, str) else colour, np.float32) / 255
        drawing = self.drawing(index, side)
        if mirror:
            drawing = drawing[:, ::-1]
        canvas = np.empty((SIZE, SIZE, 3), np.float32)
        canvas[:] = rgb
        left, top = (SIZE - side) // 2 + shift[0], (SIZE - side) // 2 + shift[1]
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
        part = drawing[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1] = part[..., :3] + rgb * (1 - part[..., 3:])
        return canvas.clip(0, 1) * 2 - 1
