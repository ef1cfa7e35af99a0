"""Folders as single files in the original key layout, written tensor by tensor: the whole of SDXL is never in memory."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors import safe_open

from formula import weight
from single_file import layout

# Families whose single file says all that their folder says: the others differ in their scheduler alone.
PREDICTIONS = {"sd15": None, "sdxl": None, "sd21-base": "epsilon", "sd21": "v"}
BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass
class Named:
    """What `goldens/single_file.py` asks of a checkpoint."""

    name: str
    unet: dict
    text: tuple


def write(family, folder: Path, path: Path) -> None:
    """Writes `path` from the family's folder, in float32."""
    sources = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        handle = safe_open(file, "np")
        part = file.parent.name
        sources |= {f"{part}/{key}": (handle, key) for key in handle.keys()}
    shapes = {name: handle.get_slice(key).get_shape() for name, (handle, key) in sources.items()}
    kind = "xl" if family.xl else "sd1" if family.text[0]["hidden_size"] == 768 else "sd2"
    rows = layout(Named(f"true_{kind}", {"up_block_types": BLOCKS, **family.unet}, family.text), shapes)
    if kind == "sd2":
        rows["cond_stage_model.model.text_projection"] = ["noise", 1024, 1024]

    def shape(row: list) -> list[int]:
        how, *of = row
        first = of if how == "noise" else shapes[of[0]]
        match how:
            case "stack":
                return [sum(shapes[s][0] for s in of), *first[1:]]
            case "turn":
                return first[::-1]
            case "image":
                return [*first, 1, 1]
        return list(first)

    def values(name: str) -> np.ndarray:
        how, *of = rows[name]
        if how == "noise":
            return weight(name, of).numpy()
        read = [handle.get_tensor(key) for handle, key in (sources[s] for s in of)]
        return np.concatenate(read) if how == "stack" else read[0].T if how == "turn" else read[0]

    header, at = {}, 0
    if PREDICTIONS[family.name]:
        header["__metadata__"] = {"modelspec.prediction_type": PREDICTIONS[family.name]}
    for name, row in rows.items():
        size = 4 * prod(shape(row))
        header[name] = {"dtype": "F32", "shape": shape(row), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in rows:
            out.write(np.ascontiguousarray(values(name), np.float32).tobytes())
