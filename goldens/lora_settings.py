"""LoRA files whose strength is said by patterns, as the savers of diffusers and PEFT write them, and the pictures that those draw with them.

Made as `lora.py` makes its own, apart from them so that either can be made anew alone.
"""

import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig

from checkpoints import FIXTURES
from fixture import psnr, write_json, write_tensors
from lora import NEGATIVE, PROMPT, REFERENCES, SEED, SIZE, STABLE, STEPS, File, attention, draw, fresh, modules, pair, text_attention

# Of several patterns that match, the first in the file counts; some match nothing, and one is no end of a name.
UNET = {
    "^down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": 8,
    r"down_blocks\.\d+\..*\.ff\.net\.2": 1,
    r"attn[12]\.to_(k|v)": 2,
    "to_k": 9,
    "^attn1.to_q": 50,
    "o_q": 50,
    "mid_block.*": 3,
    r"mid_block\..*to_q": 50,
}
RANKS = {"^(up|mid).*to_out.0": 2, "to_v": 2, r"up_blocks\.1\..*": 4}
TEXT = {"layers.0.self_attn.q_proj": 5, ".*_proj": 2}


def rank_of(name: str, ranks: dict) -> int:
    from peft.utils.other import get_pattern_key

    return ranks.get(get_pattern_key(ranks.keys(), name), 4)


def filled(pipe, parts: dict, kinds=("lora_A", "lora_B"), prefix="{part}.") -> File:
    """A file for some parts, each with the modules that `parts` wants and their ranks by pattern."""
    file = File()
    for part, (wanted, ranks) in parts.items():
        for name, layer in modules(pipe, part, wanted).items():
            base = prefix.format(part=part) + name
            pair(file, layer, f"{base}.{kinds[0]}.weight", f"{base}.{kinds[1]}.weight", rank_of(name, ranks))
    return file


def config(pipe, part: str, wanted, ranks: dict, alphas: dict, **extra) -> dict:
    """All fields of PEFT's configuration, in its own order; the patterns in theirs."""
    found = LoraConfig(
        r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern=alphas, target_modules=list(modules(pipe, part, wanted)), **extra
    ).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in found.items()}


def save_lora_weights(pipe) -> File:
    """`pipe.save_lora_weights` with both metadata arguments, without sorting the patterns."""
    file = filled(pipe, {"unet": (attention, RANKS), "text_encoder": (text_attention, {})})
    both = {f"unet.{k}": v for k, v in config(pipe, "unet", attention, RANKS, UNET).items()}
    both |= {f"text_encoder.{k}": v for k, v in config(pipe, "text_encoder", text_attention, {}, TEXT).items()}
    file.metadata["lora_adapter_metadata"] = json.dumps(both)
    return file


def save_lora_weights_converted(pipe) -> File:
    """As diffusers' training scripts call it: older tensor names, the settings of the UNet alone, rank-stabilised."""
    file = filled(pipe, {"unet": (attention, RANKS)}, kinds=("lora.down", "lora.up"))
    settings = config(pipe, "unet", attention, RANKS, UNET, use_rslora=True)
    file.metadata["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in settings.items()}, indent=2, sort_keys=True)
    return file


def save_lora_adapter(pipe) -> File:
    """`pipe.unet.save_lora_adapter`: no prefix anywhere."""
    file = filled(pipe, {"unet": (attention, {})}, prefix="")
    file.metadata["lora_adapter_metadata"] = json.dumps(config(pipe, "unet", attention, {}, {r".*\.to_k": 3}), indent=2, sort_keys=True)
    return file


def save_pretrained(pipe) -> File:
    """`PeftModel.save_pretrained`: the settings beside the file, sorted."""
    file = filled(pipe, {"unet": (attention, RANKS)}, prefix="base_model.model.")
    alphas = dict(sorted(UNET.items()))
    file.config = config(pipe, "unet", attention, dict(sorted(RANKS.items())), alphas)
    file.config = {k: file.config[k] for k in ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    return file


def by_adapter(pipe, files, dtype) -> None:
    """The network's own loader, for files without a prefix."""
    [(path, scale)] = files
    pipe.unet.load_lora_adapter(path.parent, weight_name=path.name, prefix=None, adapter_name="alone")
    pipe.unet.set_adapters(["alone"], [scale])
    pipe.to(dtype)


BUILDERS = {
    "save_lora_weights": (save_lora_weights, "diffusers"),
    "save_lora_weights_converted": (save_lora_weights_converted, "diffusers"),
    "save_lora_adapter": (save_lora_adapter, "adapter"),
    "save_pretrained": (save_pretrained, "peft"),
}


def make(scratch: Path) -> None:
    REFERENCES["adapter"] = by_adapter
    files, cases, tensors = {}, {}, {}
    plain = draw("sd1", "", [], torch.float32)
    for name, (build, reference) in BUILDERS.items():
        key = f"sd1_{name}"
        file = build(fresh("sd1"))
        files[key] = {k: v for k, v in vars(file).items() if v}
        path = file.write(scratch / key / "adapter_model.safetensors", key)
        single, double = (draw("sd1", reference, [(path, 1.0)], dtype) for dtype in (torch.float32, torch.float64))
        stable, changed = psnr(single["floats"], double["floats"]), psnr(single["floats"], plain["floats"])
        assert stable >= STABLE and changed < 40, (name, stable, changed)
        print(f"{key}: float64 {stable:.1f} dB, unlike the base at {changed:.1f} dB", flush=True)
        cases[key] = {"checkpoint": "sd1", "loras": [[key, 1.0]]}
        tensors[key] = single["picture"]
    settings = {
        "size": SIZE,
        "steps": STEPS,
        "seed": SEED,
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": 3.0,
        "sampler": "euler",
    }
    write_json(FIXTURES / "lora_settings.json", {"settings": settings, "cases": cases, "files": files}, 3)
    write_tensors(FIXTURES / "lora_settings.safetensors", tensors)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
