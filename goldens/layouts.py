"""The other forms in which the same checkpoint is published: files of transformers 4, `.fp16.` names, shards, half precision.

Each is made from the folder that diffusers wrote, and diffusers loads it again for the golden, so that what we demand of our loader
is what the reference accepts. The Rust tests write the same folders (`tests/goldens/checkpoint.rs`).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Layout:
    checkpoints: tuple[str, ...]
    # Files as transformers 4 wrote them, and a VAE as diffusers did before 0.12 (which never went with shards).
    transformers4: bool = False
    # What stands before `.safetensors` in the names: `fp16`.
    variant: str | None = None
    # Number type of the stored weights.
    dtype: str = "float32"
    # Number of files for each component's weights.
    shards: int = 1


LAYOUTS = {
    "plain": Layout(("sd1", "sd2", "sdxl")),
    "transformers4": Layout(("sd1", "sd2", "sdxl"), transformers4=True),
    "sharded": Layout(("sd1",), shards=3),
    "float16": Layout(("sd1", "sdxl"), dtype="float16", variant="fp16"),
    "float16_sharded": Layout(("sdxl",), dtype="float16", variant="fp16", shards=2),
    "bfloat16": Layout(("sd1",), dtype="bfloat16"),
}


def token(content: str, kind: bool = False) -> dict:
    """An added token as transformers 4 wrote it in its two files."""
    head = {"__type": "AddedToken"} if kind else {}
    return {**head, "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def transformers4_tokenizer(checkpoint: str, folder: str) -> dict[str, dict]:
    """The JSON files beside vocab.json and merges.txt. Stable Diffusion 2.x names its pad token in `special_tokens_map.json` only, and
    that file wins; SDXL's second tokenizer has the form with `added_tokens_decoder`."""
    pad = "!" if checkpoint == "sd2" or folder == "tokenizer_2" else EOS
    config = {
        "add_prefix_space": False,
        "bos_token": token(BOS, True),
        "do_lower_case": True,
        "eos_token": token(EOS, True),
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": token(EOS, True),
    }
    if folder == "tokenizer_2":
        added = {"0": "!", "4314": BOS, "4315": EOS}
        config |= {
            "added_tokens_decoder": {
                k: {**token(v), "normalized": v != "!", "special": True} for k, v in added.items()
            },
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": pad,
            "unk_token": EOS,
        }
    special = {"bos_token": token(BOS), "eos_token": token(EOS), "pad_token": pad, "unk_token": token(EOS)}
    return {"tokenizer_config.json": config, "special_tokens_map.json": special}


def weight_files(stem: str, variant: str | None, shards: int) -> tuple[list[str], str | None]:
    """Names of the weight files and of the index, as diffusers 0.42 and transformers 5 choose them."""
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        return [f"{stem}{dotted}.safetensors"], None
    names = [f"{stem}{dotted}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    return names, f"{stem}.safetensors.index{dotted}.json"


def older_attention(key: str) -> str:
    """Names in the VAE's attention before diffusers 0.12; most published VAEs still have them."""
    if ".attentions." in key:
        for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
            key = key.replace(new, old)
    return key


def write_layout(plain: Path, folder: Path, name: str) -> None:
    """Writes the checkpoint that lies in `plain` in another form."""
    layout = LAYOUTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder)
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        path.unlink()
        text = path.parent.name.startswith("text_encoder")
        if layout.transformers4 and text:
            prefixed = lambda k: k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}"
            tensors = {prefixed(k): v for k, v in tensors.items()}
        if layout.transformers4 and path.parent.name == "vae":
            tensors = {older_attention(k): v for k, v in tensors.items()}
        dtype = getattr(torch, layout.dtype)
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
        if layout.transformers4 and text:
            # A buffer that older versions stored.
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        files, index = weight_files(path.stem, layout.variant, layout.shards)
        keys = sorted(tensors)
        map = {key: files[i * len(files) // len(keys)] for i, key in enumerate(keys)}
        for file in files:
            part = {k: tensors[k] for k in keys if map[k] == file}
            save_file(part, path.parent / file, metadata={"format": "pt"})
        if index:
            total = sum(v.nbytes for v in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": map}
            (path.parent / index).write_text(json.dumps(content))
    if layout.transformers4:
        checkpoint = plain.name
        for tokenizer in sorted(folder.glob("tokenizer*")):
            written = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
            (tokenizer / "tokenizer.json").unlink()
            (tokenizer / "vocab.json").write_text(json.dumps(written["vocab"], ensure_ascii=False))
            merges = "\n".join(" ".join(m) for m in written["merges"])
            (tokenizer / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
            for file, content in transformers4_tokenizer(checkpoint, tokenizer.name).items():
                (tokenizer / file).write_text(json.dumps(content))
