"""Weights and inputs that are a formula of their name, so that no fixture has to hold them.

Element i of the tensor called `name` comes from a splitmix64 stream whose seed is the FNV-1a hash of the name. The top 24 bits of
draw i make a number u in [-1, 1), exact in float32; the element is `center + scale * u`, two float32 operations. The Rust tests
(`tests/goldens/formula.rs`) compute the same bits.
"""

import math

import numpy as np
import torch

MASK = (1 << 64) - 1


def fnv1a(text: str) -> int:
    """64-bit FNV-1a of the UTF-8 bytes."""
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def uniform(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), float32."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.int32) - (1 << 23)).astype(np.float32) * np.float32(2.0**-23)


def scale_and_center(name: str, shape: list[int], gain: float) -> tuple[np.float32, np.float32]:
    """Matrices and kernels keep the variance of what passes through them; norms stay near 1, biases near 0."""
    if len(shape) >= 2:
        fan_in = math.prod(shape[1:])
        return np.float32(math.sqrt(3.0 / fan_in) * gain), np.float32(0.0)
    if name.endswith("weight"):
        return np.float32(0.25 * gain), np.float32(1.0)
    return np.float32(0.125 * gain), np.float32(0.0)


def weight(name: str, shape: list[int], gain: float = 1.0) -> torch.Tensor:
    """A checkpoint's tensor; `name` starts with the component's folder: `unet/conv_in.weight`."""
    scale, center = scale_and_center(name, shape, gain)
    values = center + scale * uniform(name, math.prod(shape))
    assert values.dtype == np.float32
    return torch.from_numpy(values.reshape(shape))


def signal(name: str, shape: list[int]) -> torch.Tensor:
    """An input of about unit variance."""
    values = np.float32(math.sqrt(3.0)) * uniform(name, math.prod(shape))
    return torch.from_numpy(values.reshape(shape))


def fill(module: torch.nn.Module, prefix: str, gains: dict[str, float]) -> None:
    """Sets every tensor of `module`. Gains go by the tensor's canonical name or by a suffix of it that starts with `*`."""
    state = module.state_dict()
    for key, old in state.items():
        name = canonical(prefix, key)
        state[key] = weight(name, list(old.shape), gain_of(name, gains))
    module.load_state_dict(state, strict=True)


def canonical(prefix: str, key: str) -> str:
    """The name that seeds a tensor, the same in both generations of files."""
    return f"{prefix}/{key.removeprefix('text_model.')}"


def gain_of(name: str, gains: dict[str, float]) -> float:
    for pattern, gain in gains.items():
        if name == pattern or (pattern.startswith("*") and name.endswith(pattern[1:])):
            return gain
    return 1.0
