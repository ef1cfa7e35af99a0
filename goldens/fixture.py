"""How fixtures are written: JSON for what people read, safetensors for numbers."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save


def write_json(path: Path, content, depth: int = 2) -> None:
    """JSON with one line for each entry down to `depth`, so that a change of one entry is a change of one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(content, depth) + "\n")


def render(value, depth: int, indent: int = 0) -> str:
    if depth == 0 or not value or not isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=True)
    pad, end = " " * (indent + 1), " " * indent
    if isinstance(value, dict):
        rows = [f"{pad}{json.dumps(k)}: {render(v, depth - 1, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{end}}}"
    rows = [pad + render(v, depth - 1, indent + 1) for v in value]
    return "[\n" + ",\n".join(rows) + f"\n{end}]"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1], in dB, at most 200."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(-10 * np.log10(max(error, 1e-20)))


def distance(a, b) -> float:
    """Norm of the difference over the norm of the reference `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


SAMPLES = 256


def sampled(values: np.ndarray) -> tuple[np.ndarray, dict]:
    """At most SAMPLES numbers of a large output, a fixed odd stride apart, with its shape and statistics."""
    flat = values.astype(np.float32).reshape(-1)
    stride = max(1, -(-flat.size // SAMPLES))
    stride += 1 - stride % 2
    wide = flat.astype(np.float64)
    row = {
        "shape": list(values.shape),
        "stride": stride,
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "max": float(np.abs(wide).max()),
    }
    return flat[::stride], row
