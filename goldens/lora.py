"""LoRA files of every format and the pictures that diffusers and PEFT draw with them.

A file's tensors are a formula of their names (`center + spread * uniform`), so the fixture holds names and shapes alone. Three references:

* `diffusers`: the pipeline's own `load_lora_weights` and `set_adapters`. Loading an adapter into a text encoder sets its base weights anew
  (transformers 5 takes them for missing), so they are put back before anything is drawn;
* `peft`: PEFT's own layers injected into the networks, for what diffusers does not read (LoHa, LoKr, a bare PEFT file);
* `hand`: weights merged by the definition, for what neither reads (LyCORIS's taps apart, `dora_scale`, GLoRA, differences, the oldest names and ComfyUI's).
"""

import json
import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from checkpoints import BY_NAME, FIXTURES, build_scheduler
from fixture import psnr, write_json, write_tensors
from formula import uniform

SCALES = [0.3, 1.0, 2.0]
STABLE = 90.0
SIZE, STEPS, SEED, PROMPT, NEGATIVE = 32, 2, 5, "a red fox in the snow", "fog"


@dataclass
class File:
    """One LoRA file: its tensors as (center, spread, shape) by key, and what lies in its header or beside it."""

    tensors: dict[str, list] = field(default_factory=dict)
    dtype: str = "float32"
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict | None = None

    def put(self, key: str, shape, spread: float, center: float = 0.0) -> None:
        self.tensors[key] = [float(np.float32(center)), float(np.float32(spread)), *shape]

    def write(self, path: Path, name: str) -> Path:
        tensors = {}
        for key, (center, spread, *shape) in self.tensors.items():
            values = np.float32(center) + np.float32(spread) * uniform(f"{name}/{key}", math.prod(shape))
            tensors[key] = torch.from_numpy(values.reshape(shape)).to(getattr(torch, self.dtype))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt", **self.metadata})
        if self.config:
            (path.parent / "adapter_config.json").write_text(json.dumps(self.config))
        return path


def modules(pipe, part: str, wanted) -> dict[str, torch.nn.Module]:
    """Layers of a part by name, those whose name `wanted` takes."""
    layers = getattr(pipe, part).named_modules()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in layers if isinstance(m, kinds) and wanted(n)}


def norms(pipe, part: str, wanted) -> dict[str, torch.nn.Module]:
    """Normalisations of a part by name, in the same way."""
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    return {n: m for n, m in getattr(pipe, part).named_modules() if isinstance(m, kinds) and wanted(n)}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# One transformer on the way down, one in the middle and one on the way up.
PLACES = ("down_blocks.1.attentions.0.", "mid_block.attentions.0.", "up_blocks.1.attentions.1.")


def attention(name: str) -> bool:
    return name.startswith(PLACES) and name.endswith(ATTENTION) and "transformer_blocks.1" not in name


def projections(name: str) -> bool:
    return attention(name) and name.endswith(ATTENTION[:4])


def one_place(name: str) -> bool:
    """For formats that differ from others in their names alone."""
    return projections(name) and name.startswith(PLACES[0])


def convolutions(name: str) -> bool:
    ends = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv")
    places = ("down_blocks.0.", "down_blocks.1.", "up_blocks.1.", "mid_block.resnets.0.")
    whole = ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2")
    return name in whole or (name.startswith(places) and name.endswith(ends) and ".1.resnets.0" not in name)


def layer_0(name: str) -> bool:
    return "layers.0." in name and name.endswith(TEXT)


def text_attention(name: str) -> bool:
    return "layers.0." in name and name.endswith(TEXT[:4])


# Names of the original code, for the blocks used here: the inverse of diffusers' own conversion, tried on each candidate.
def original(name: str, layers: int) -> str:
    """A UNet module's name in the original code."""
    whole = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "conv_norm_out": "out.0",
        "time_embedding.linear_1": "time_embed.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in whole:
        return whole[name]
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    inner |= {"norm1": "in_layers.0", "norm2": "out_layers.0"}
    parts = name.split(".")
    if parts[0] == "mid_block":
        block, rest = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}", parts[3:]
    else:
        level, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        side = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        number = level * (layers + 1) + index + (parts[0] == "down_blocks")
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{level * (layers + 1) + layers}.2.conv"
        block = f"{side}.{number}.{1 if kind == 'attentions' else 0}"
    return ".".join([block] + [inner.get(".".join(rest), ".".join(rest))])


def spread_of(shape) -> float:
    return math.sqrt(3.0 / math.prod(shape[1:]))


def shapes(layer, rank: int):
    """down and up of a layer."""
    if isinstance(layer, torch.nn.Conv2d):
        k = layer.kernel_size
        return [rank, layer.in_channels, *k], [layer.out_channels, rank, 1, 1]
    return [rank, layer.in_features], [layer.out_features, rank]


GAIN = 0.6


def pair(file: File, layer, down: str, up: str, rank: int, gain: float = GAIN) -> None:
    d, u = shapes(layer, rank)
    file.put(down, d, spread_of(d))
    file.put(up, u, spread_of(u) * gain)


def parts_of(pipe) -> list[str]:
    return ["unet", "text_encoder"] + (["text_encoder_2"] if hasattr(pipe, "text_encoder_2") else [])


def kohya_name(pipe, part: str, name: str) -> str:
    if part == "unet":
        name = original(name, pipe.unet.config.layers_per_block) if len(parts_of(pipe)) == 3 else name
        return "lora_unet_" + name.replace(".", "_")
    prefix = {2: "lora_te_"}.get(len(parts_of(pipe)), "lora_te1_" if part == "text_encoder" else "lora_te2_")
    return prefix + "text_model_" + name.removeprefix("text_model.").replace(".", "_")


def kohya(pipe, unet=attention, text=layer_0, magnitude: str | None = None, dtype="float32", ranks=(4, 3), text_rank=2, alphas=(2.0,)) -> File:
    file = File(dtype=dtype)
    for part in parts_of(pipe):
        for i, (name, layer) in enumerate(modules(pipe, part, unet if part == "unet" else text).items()):
            base = kohya_name(pipe, part, name)
            rank = ranks[i % len(ranks)] if part == "unet" else text_rank
            pair(file, layer, base + ".lora_down.weight", base + ".lora_up.weight", rank)
            file.put(base + ".alpha", [], 0.0, alphas[i % len(alphas)])
            if magnitude:
                out = layer.weight.shape[0]
                shape = {"outputs": [out, *[1] * (layer.weight.dim() - 1)], "inputs": [1, layer.weight.shape[1]]}[magnitude]
                file.put(base + ".dora_scale", shape, 0.25, 1.1 if magnitude == "outputs" else 1.0)
    return file


def diffusers_new(pipe) -> File:
    file = File()
    for part in parts_of(pipe):
        for name, layer in modules(pipe, part, projections if part == "unet" else text_attention).items():
            kind = "lora" if part == "unet" else "lora_linear_layer"
            name = name if part == "unet" else "text_model." + name.removeprefix("text_model.")
            pair(file, layer, f"{part}.{name}.{kind}.down.weight", f"{part}.{name}.{kind}.up.weight", 4)
    return file


OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def diffusers_old(pipe, prefix: bool = True) -> File:
    file = File()
    for part in parts_of(pipe) if prefix else ["unet"]:
        for name, layer in modules(pipe, part, projections if part == "unet" else text_attention).items():
            outer, last = name.removesuffix(".0").rsplit(".", 1)
            if part == "unet":
                base = f"{outer}.processor.{last}_lora"
            else:
                base = f"text_model.{outer.removeprefix('text_model.')}.{OLD_TEXT[last]}_lora"
            base = f"{part}.{base}" if prefix else base
            pair(file, layer, f"{base}.down.weight", f"{base}.up.weight", 4)
    return file


def diffusers_peft(pipe) -> File:
    """What `save_lora_adapter` writes today: PEFT's names, the settings in the header, ranks and alphas by pattern."""
    file, settings = File(), {}
    for part in parts_of(pipe):
        found = modules(pipe, part, projections if part == "unet" else text_attention)
        special = "to_k" if part == "unet" else "k_proj"
        for name, layer in found.items():
            base = f"{part}.{name}"
            pair(file, layer, f"{base}.lora_A.weight", f"{base}.lora_B.weight", 2 if name.endswith(special) else 4)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={n: 2 for n in found if n.endswith(special)},
            alpha_pattern={n: 5 for n in found if n.endswith(special)},
            target_modules=list(found),
        ).to_dict()
        kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")
        settings |= {f"{part}.{k}": config[k] for k in kept}
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    file.metadata["lora_adapter_metadata"] = json.dumps(settings, sort_keys=True)
    return file


def peft_lora(pipe, **extra) -> File:
    file = File(config=dict(peft_type="LORA", r=4, lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"attn2.to_k": 3, "to_v": 8}, **extra))
    # PEFT takes a bias of the left factor only where the layer has one.
    biased = lambda n: attention(n) and n.endswith(ATTENTION[3:])
    for name, layer in modules(pipe, "unet", biased if extra.get("lora_bias") else attention).items():
        base = f"base_model.model.{name}"
        pair(file, layer, f"{base}.lora_A.weight", f"{base}.lora_B.weight", 2 if name.endswith("to_k") else 4)
        if extra.get("lora_bias"):
            file.put(f"{base}.lora_B.bias", [layer.weight.shape[0]], 0.3)
        if extra.get("use_dora"):
            conv = layer.weight.dim() == 4
            out = layer.weight.shape[0]
            file.put(f"{base}.lora_magnitude_vector", [1, out, 1, 1] if conv else [out], 0.25, 1.1)
    return file


def peft_loha(pipe) -> File:
    file = File(config=dict(peft_type="LOHA", r=3, alpha=5))
    for name, layer in modules(pipe, "unet", projections).items():
        d, u = shapes(layer, 3)
        for i in (1, 2):
            file.put(f"base_model.model.{name}.hada_w{i}_a", u, 1.0)
            file.put(f"base_model.model.{name}.hada_w{i}_b", d, 1.0 if i == 1 else spread_of(d))
    return file


def peft_lokr(pipe) -> File:
    file = File(config=dict(peft_type="LOKR", r=3, alpha=4, decompose_factor=4))
    model = inject_adapter_in_model(LoKrConfig(r=3, alpha=4, decompose_factor=4, target_modules=list(modules(pipe, "unet", projections))), BY_NAME[pipe.name].pipeline().unet)
    for key, value in model.state_dict().items():
        if ".lokr_" in key:
            shape = list(value.shape)
            gain = 1.0 if "_w1" in key else spread_of(shape)
            file.put("base_model.model." + key.replace(".default", ""), shape, gain)
    return file


def lycoris(pipe, kind: str) -> File:
    """LoHa, LoKr and LoRA with taps apart, under kohya's names: linear layers and convolutions."""
    file = File()
    wanted = lambda n: projections(n) or (convolutions(n) and n.endswith(("conv1", "conv2", "conv", "conv_shortcut")))
    for i, (name, layer) in enumerate(modules(pipe, "unet", wanted).items()):
        base, rank = kohya_name(pipe, "unet", name), 3
        conv = layer.weight.dim() == 4
        out, inputs, *taps = layer.weight.shape
        count = math.prod(taps)
        big = conv and taps != [1, 1]
        if kind == "mid":
            if not big:
                pair(file, layer, base + ".lora_down.weight", base + ".lora_up.weight", rank)
            else:
                file.put(base + ".lora_down.weight", [rank, inputs, 1, 1], math.sqrt(3 / inputs))
                file.put(base + ".lora_mid.weight", [4, rank, *taps], math.sqrt(3 / rank / count))
                file.put(base + ".lora_up.weight", [out, 4, 1, 1], math.sqrt(3 / 4) * GAIN)
        elif kind == "loha":
            tucker = big and i % 2 == 0
            for j in (1, 2):
                small = math.sqrt(3 / (inputs * count)) if j == 2 else 1.0
                if tucker:
                    file.put(f"{base}.hada_t{j}", [rank, rank, *taps], 0.7)
                    file.put(f"{base}.hada_w{j}_a", [rank, out], 0.8)
                    file.put(f"{base}.hada_w{j}_b", [rank, inputs], small)
                else:
                    file.put(f"{base}.hada_w{j}_a", [out, rank], 0.8)
                    file.put(f"{base}.hada_w{j}_b", [rank, inputs * count], small)
        else:
            o, p = (4, 8) if i % 3 else (2, 4)
            spread = math.sqrt(3 / (inputs * count))
            if i % 2:
                file.put(base + ".lokr_w1", [o, p], 1.0)
            else:
                file.put(base + ".lokr_w1_a", [o, rank], 1.0)
                file.put(base + ".lokr_w1_b", [rank, p], 0.8)
            height, width = out // o, inputs // p
            if inputs % p or out % o:
                raise ValueError(name)
            if i % 4 == 1:
                file.put(base + ".lokr_w2", [height, width, *taps], spread * 1.5)
            elif big and i % 4 == 2:
                file.put(base + ".lokr_t2", [rank, rank, *taps], 1.0)
                file.put(base + ".lokr_w2_a", [rank, height], 0.8)
                file.put(base + ".lokr_w2_b", [rank, width], spread)
            else:
                file.put(base + ".lokr_w2_a", [height, rank], 1.0)
                file.put(base + ".lokr_w2_b", [rank, width * count], spread)
        file.put(base + ".alpha", [], 0.0, [2.0, 3.0][i % 2])
    return file


def dotted(pipe, style: str) -> File:
    """Dots instead of underscores: OneTrainer's names, or those of the original code and ComfyUI's text encoders."""
    file = File()
    parts = {
        "onetrainer": {"unet": "lora_unet.", "text_encoder": "lora_te1.", "text_encoder_2": "lora_te2."},
        "comfy": {
            "unet": "diffusion_model.",
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
        },
    }[style]
    for part in parts_of(pipe):
        for name, layer in modules(pipe, part, one_place if part == "unet" else text_attention).items():
            if part == "unet" and style == "comfy":
                name = original(name, pipe.unet.config.layers_per_block)
            elif part != "unet":
                name = "text_model." + name.removeprefix("text_model.")
            base = parts[part] + name
            pair(file, layer, base + ".lora_down.weight", base + ".lora_up.weight", 3)
            file.put(base + ".alpha", [], 0.0, 2.0)
    return file


def dora_convolutions(pipe, axis: str) -> File:
    file = File()
    wanted = lambda n: convolutions(n) and n.endswith(("conv1", "conv_in", "conv_shortcut"))
    for name, layer in modules(pipe, "unet", wanted).items():
        base = kohya_name(pipe, "unet", name)
        pair(file, layer, base + ".lora_down.weight", base + ".lora_up.weight", 3)
        file.put(base + ".alpha", [], 0.0, 2.0)
        out, inputs = layer.weight.shape[:2]
        shape = [out, 1, 1, 1] if axis == "outputs" else [1, inputs, 1, 1]
        file.put(base + ".dora_scale", shape, 0.25, 1.1)
    return file


def differences(pipe) -> File:
    """What LyCORIS's `full` and `train_norm` write: differences of weights and biases, and of normalisations."""
    file = File()
    block = lambda n: n.startswith(("down_blocks.1.", "conv_norm_out")) and "transformer_blocks.1" not in n
    ends = ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj")
    wanted = lambda n: n == "conv_in" or (block(n) and n.endswith(ends))
    for part in parts_of(pipe):
        for i, (name, layer) in enumerate(modules(pipe, part, wanted if part == "unet" else layer_0).items()):
            base = kohya_name(pipe, part, name)
            # Some change their bias alone.
            if layer.bias is None or i % 5 != 1:
                file.put(base + ".diff", list(layer.weight.shape), spread_of(layer.weight.shape) * 0.4)
            if layer.bias is not None:
                file.put(base + ".diff_b", list(layer.bias.shape), 0.3)
        # kohya's script to extract differences writes `.diff` for normalisations too.
        for i, (name, layer) in enumerate(norms(pipe, part, block if part == "unet" else lambda n: "layers.1" not in n).items()):
            base, ends = kohya_name(pipe, part, name), (".diff", ".diff_b") if i % 4 == 3 else (".w_norm", ".b_norm")
            file.put(base + ends[0], list(layer.weight.shape), 0.3)
            if i % 3:
                file.put(base + ends[1], list(layer.bias.shape), 0.2)
    return file


def glora(pipe, first: bool) -> File:
    """GLoRA, in the order of factors of LyCORIS's first version (matrices alone) or of today's."""
    file = File()
    place = lambda n: n.startswith("down_blocks.1.")
    wanted = lambda n: place(n) and (projections(n) or (not first and convolutions(n) and n.endswith(("conv1", "conv_shortcut"))))
    for name, layer in modules(pipe, "unet", wanted).items():
        base, rank = kohya_name(pipe, "unet", name), 3
        out, inputs, *taps = layer.weight.shape
        ones = [1] * len(taps)
        left, right = lambda n: [n, rank, *ones], [rank, inputs, *ones]
        kernel = [rank, inputs, *taps]
        shapes = {"a2": left(inputs), "a1": right, "b2": left(out), "b1": kernel}
        if not first:
            shapes = {"a1": left(inputs), "a2": right, "b1": left(out), "b2": kernel}
        for factor, shape in shapes.items():
            gain = 0.5 if shape[0] != rank or factor.startswith("a") else 1.0
            file.put(f"{base}.{factor}.weight", shape, spread_of(shape) * gain)
        file.put(base + ".alpha", [], 0.0, 2.0)
    return file


WORD, VECTORS = "foxxy", 3


def bundle(pipe) -> File:
    """A kohya file with an embedding: three vectors for a word of the prompt, under the name that each family has for them."""
    file = kohya(pipe, unet=one_place, text=text_attention)
    names = {"text_encoder": "string_to_param.*"}
    if len(parts_of(pipe)) == 3:
        names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    for part, name in names.items():
        table = getattr(pipe, part).get_input_embeddings().weight
        file.put(f"bundle_emb.{WORD}.{name}", [VECTORS, table.shape[1]], 3 * float(table.detach().std()))
    return file


# --- references ---------------------------------------------------------------------------------------------------------------


def by_diffusers(pipe, files: list[tuple[Path, float]], dtype) -> None:
    clean = {part: {k: v.clone() for k, v in getattr(pipe, part).state_dict().items()} for part in parts_of(pipe)}
    for i, (path, _) in enumerate(files):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{i}")
    for part, state in clean.items():
        own = getattr(pipe, part).state_dict()
        for key, value in own.items():
            plain = key.replace(".base_layer.", ".")
            if plain in state:
                value.copy_(state[plain])
    pipe.set_adapters([f"a{i}" for i in range(len(files))], [scale for _, scale in files])
    pipe.to(dtype)


def by_peft(pipe, files: list[tuple[Path, float]], dtype) -> None:
    [(path, scale)] = files
    config = json.loads((path.parent / "adapter_config.json").read_text())
    cls = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}[config.pop("peft_type")]
    state = {k.removeprefix("base_model.model."): v.float() for k, v in load_file(path).items()}
    targets = sorted({k.split(".lora_")[0].split(".hada_")[0].split(".lokr_")[0] for k in state})
    inject_adapter_in_model(cls(target_modules=targets, **config), pipe.unet)
    found = set_peft_model_state_dict(pipe.unet, state)
    assert not found.unexpected_keys, found.unexpected_keys
    for module in pipe.unet.modules():
        if hasattr(module, "set_scale") and hasattr(module, "scaling"):
            module.set_scale("default", scale)
    pipe.to(dtype)


def by_hand(pipe, files: list[tuple[Path, float]], dtype) -> None:
    pipe.to(dtype)
    layers = {}
    for part in parts_of(pipe):
        for name, layer in (modules(pipe, part, lambda _: True) | norms(pipe, part, lambda _: True)).items():
            layers |= {alias: layer for alias in aliases(pipe, part, name)}
    for path, scale in files:
        state = {k: v.to(torch.float64) for k, v in load_file(path).items()}
        add_words(pipe, {k: state.pop(k) for k in list(state) if k.startswith("bundle_emb.")})
        grouped: dict[str, dict] = {}
        for key, value in state.items():
            base, role = re.fullmatch(ROLE, key).groups()
            grouped.setdefault(base, {})[role] = value
        for base, t in grouped.items():
            layer = layers[base]
            bias = t.get("diff_b", t.get("b_norm"))
            if bias is not None:
                layer.bias.data = (layer.bias.data.to(torch.float64) + scale * bias).to(dtype)
            if set(t) <= {"diff_b", "b_norm"}:
                continue
            weight = layer.weight.data.to(torch.float64)
            alpha = t["alpha"].item() if "alpha" in t else None
            delta, rank = change(t, weight)
            delta = delta.reshape(weight.shape) * (alpha / rank if alpha is not None and rank else 1.0)
            if "dora_scale" in t:
                wide = weight + delta
                axis = 1 if t["dora_scale"].shape[0] == 1 else 0
                norm = wide.transpose(0, axis).flatten(1).norm(dim=1).reshape(t["dora_scale"].shape)
                lengths = (t["dora_scale"] / norm).reshape(norm.shape + (1,) * (wide.dim() - norm.dim()))
                delta = wide * lengths - weight
            layer.weight.data = (weight + scale * delta).to(dtype)


# A key's module and what the tensor is to it.
ROLE = r"(.*?)\.((?:lora_)?(?:down|up|mid)\.weight|alpha|dora_scale|hada_\w+|lokr_\w+|[ab][12]\.weight|diff|diff_b|w_norm|b_norm)"


def aliases(pipe, part: str, name: str) -> list[str]:
    """Names under which files know a layer."""
    if part != "unet":
        plain = "text_model." + name.removeprefix("text_model.")
        short, comfy = {"text_encoder": ("te1", "clip_l"), "text_encoder_2": ("te2", "clip_g")}[part]
        return [kohya_name(pipe, part, name), f"lora_{short}.{plain}", f"text_encoders.{comfy}.transformer.{plain}"]
    outer, last = name.removesuffix(".0").rsplit(".", 1) if "." in name else (name, "")
    names = [f"lora_unet.{name}", f"{outer}.processor.{last}_lora"]
    try:
        names += [kohya_name(pipe, part, name), "diffusion_model." + original(name, pipe.unet.config.layers_per_block)]
    except (KeyError, ValueError, IndexError):
        pass
    return names


def add_words(pipe, vectors: dict[str, torch.Tensor]) -> None:
    """New tokens for a word of the prompt, with these vectors, as textual inversions of several vectors have them."""
    for key, values in vectors.items():
        part = {"clip_g": "text_encoder_2"}.get(key.rsplit(".", 1)[1], "text_encoder")
        tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
        table = getattr(pipe, part).get_input_embeddings()
        first = len(tokenizer)
        assert first == table.weight.shape[0]
        tokenizer.add_tokens([f"{WORD}{i}" for i in range(len(values))])
        table.weight.data = torch.cat([table.weight.data, values.to(table.weight.dtype)])


def prompt_of(files: list[tuple[Path, float]]) -> tuple[str, str]:
    """The prompt for these files, as people write it, and as the reference reads it."""
    if any(k.startswith("bundle_emb.") for path, _ in files for k in load_file(path)):
        tokens = " ".join(f"{WORD}{i}" for i in range(VECTORS))
        return f"a red {WORD}, in the snow", f"a red {tokens}, in the snow"
    return PROMPT, PROMPT


def change(t: dict, weight: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """The change by its definition, and its rank."""
    shape = weight.shape
    get = lambda *names: next((t[n] for n in names if n in t), None)
    if (difference := get("diff", "w_norm")) is not None:
        return difference, None
    if "a1.weight" in t:
        a1, a2, b1, b2 = (t[f"{f}.weight"].flatten(1) for f in ("a1", "a2", "b1", "b2"))
        if a1.shape[0] < a1.shape[1]:
            a1, a2, b1, b2 = a2, a1, b2, b1
        return torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(shape), a1.shape[1]
    down, up = get("lora_down.weight", "down.weight"), get("lora_up.weight", "up.weight")
    if down is not None:
        rank = down.shape[0]
        if "lora_mid.weight" in t:
            return torch.einsum("oi,ijkl,jc->ockl", up[:, :, 0, 0], t["lora_mid.weight"], down[:, :, 0, 0]), rank
        return up.reshape(up.shape[0], -1) @ down.reshape(rank, -1), rank
    if "hada_w1_a" in t:
        sides = []
        for j in "12":
            a, b, taps = t[f"hada_w{j}_a"], t[f"hada_w{j}_b"], t.get(f"hada_t{j}")
            sides.append(a @ b if taps is None else torch.einsum("ijkl,io,jc->ockl", taps, a, b))
        return sides[0] * sides[1], t["hada_w1_b"].shape[0]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("ijkl,io,jc->ockl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
        w2 = w2.reshape(w2.shape[0], shape[1] // w1.shape[1], *shape[2:])
    rank = next((t[n].shape[0] for n in ("lokr_w2_b", "lokr_w1_b") if n in t), None)
    w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - 2))
    return torch.kron(w1, w2.contiguous()), rank


REFERENCES = {"diffusers": by_diffusers, "peft": by_peft, "hand": by_hand}

# --- cases --------------------------------------------------------------------------------------------------------------------

BUILDERS = {
    "kohya": (lambda p: kohya(p), "diffusers"),
    # diffusers takes one alpha for all attention layers of a kohya file, so alphas that differ are merged by the definition.
    "kohya_alphas": (lambda p: kohya(p, alphas=(2.0, 4.0, 1.0)), "hand"),
    "kohya_half": (lambda p: kohya(p, dtype="float16", ranks=(4,), unet=projections), "diffusers"),
    "locon": (lambda p: kohya(p, unet=convolutions, text=lambda n: False), "diffusers"),
    "diffusers": (diffusers_new, "diffusers"),
    "diffusers_old": (diffusers_old, "diffusers"),
    "attn_procs": (lambda p: diffusers_old(p, prefix=False), "hand"),
    "diffusers_peft": (diffusers_peft, "diffusers"),
    "peft": (peft_lora, "peft"),
    "peft_rslora": (lambda p: peft_lora(p, use_rslora=True), "peft"),
    "peft_dora": (lambda p: peft_lora(p, use_dora=True), "peft"),
    # diffusers leaves DoRA's lengths in a kohya file out, with a warning.
    "dora": (lambda p: kohya(p, unet=projections, text=lambda n: False, magnitude="outputs"), "hand"),
    "dora_inputs": (lambda p: kohya(p, unet=lambda n: projections(n), text=lambda n: False, magnitude="inputs"), "hand"),
    "mid": (lambda p: lycoris(p, "mid"), "hand"),
    "loha": (lambda p: lycoris(p, "loha"), "hand"),
    "lokr": (lambda p: lycoris(p, "lokr"), "hand"),
    "peft_loha": (peft_loha, "peft"),
    "peft_bias": (lambda p: peft_lora(p, lora_bias=True), "peft"),
    "dora_conv": (lambda p: dora_convolutions(p, "outputs"), "hand"),
    "dora_conv_inputs": (lambda p: dora_convolutions(p, "inputs"), "hand"),
    "differences": (differences, "hand"),
    "glora": (lambda p: glora(p, first=False), "hand"),
    "glora_first": (lambda p: glora(p, first=True), "hand"),
    "onetrainer": (lambda p: dotted(p, "onetrainer"), "hand"),
    "comfy": (lambda p: dotted(p, "comfy"), "hand"),
    "bundle": (bundle, "hand"),
    "peft_lokr": (peft_lokr, "peft"),
}
# SDXL where its names or its shapes make a difference.
XL = ("kohya", "locon", "diffusers", "diffusers_peft", "peft", "dora", "loha", "lokr", "differences", "onetrainer", "comfy", "bundle")
# Where a scale makes no other difference than it does elsewhere, one picture is enough.
FEW = {"peft_bias": [0.3], "glora": [0.5], "glora_first": [1.0], "onetrainer": [1.0], "comfy": [1.0], "bundle": [0.3], "differences": [0.3]}
# As good as nothing, where lengths are scaled with the rest: the picture without is then the right one.
TINY = 0.001
# Lengths are what a scale is most easily forgotten with.
FEW |= {"dora_conv": [TINY, 0.5], "dora_conv_inputs": [TINY, 0.5]}
MORE = {"dora": [TINY, 0.5], "dora_inputs": [TINY, 0.5], "peft_dora": [0.5]}


def fresh(checkpoint: str):
    pipe = BY_NAME[checkpoint].pipeline()
    pipe.name = checkpoint
    return pipe


def draw(checkpoint: str, reference: str, files: list[tuple[Path, float]], dtype) -> dict[str, np.ndarray]:
    pipe = fresh(checkpoint)
    prompt = prompt_of(files)[1]
    if files:
        with torch.no_grad():
            REFERENCES[reference](pipe, files, dtype)
    else:
        pipe.to(dtype)
    pipe.scheduler = build_scheduler(BY_NAME[checkpoint].scheduler, "euler")
    noise = torch.randn
    torch.randn = lambda *a, dtype=None, **k: noise(*a, dtype=torch.float32, **k).to(dtype or torch.float32)
    try:
        with torch.inference_mode():
            image = pipe(
                prompt,
                negative_prompt=NEGATIVE,
                width=SIZE,
                height=SIZE,
                num_inference_steps=STEPS,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(SEED),
                output_type="np",
            ).images[0]
    finally:
        torch.randn = noise
    return {"floats": np.asarray(image, np.float64), "picture": np.asarray(pipe.image_processor.numpy_to_pil(image[None])[0])}


def make(scratch: Path) -> None:
    files, cases, tensors = {}, {}, {}
    lowest = math.inf
    plain = {c: draw(c, "", [], torch.float32) for c in ("sd1", "sdxl")}
    paths = {}
    for checkpoint in ("sd1", "sdxl"):
        for name, (build, reference) in BUILDERS.items():
            if checkpoint == "sdxl" and name not in XL:
                continue
            key = f"{checkpoint}_{name}"
            file = build(fresh(checkpoint))
            files[key] = {k: v for k, v in vars(file).items() if v}
            stem = "adapter_model" if file.config else name
            paths[key] = file.write(scratch / key / f"{stem}.safetensors", key)
            for scale in FEW.get(name, SCALES + MORE.get(name, [])):
                cases[f"{key}_{scale}"] = (checkpoint, reference, [(key, scale)])
        first = [(f"{checkpoint}_kohya", 0.7), (f"{checkpoint}_diffusers_peft", 0.5)]
        cases[f"{checkpoint}_two"] = (checkpoint, "diffusers", first)
    rows = {}
    for name, (checkpoint, reference, used) in cases.items():
        given = [(paths[key], scale) for key, scale in used]
        single = draw(checkpoint, reference, given, torch.float32)
        double = draw(checkpoint, reference, given, torch.float64)
        stable = psnr(single["floats"], double["floats"])
        effect = psnr(single["floats"], plain[checkpoint]["floats"])
        print(f"{name}: float64 {stable:.1f} dB, without {effect:.1f} dB, std {single['floats'].std():.2f}", flush=True)
        assert stable >= STABLE, name
        tiny = all(scale == TINY for _, scale in used) and "peft" not in name
        assert tiny or effect < 45, f"{name}: nearly the picture without"
        assert single["floats"].std() > 0.05, name
        rows[name] = {"checkpoint": checkpoint, "loras": used}
        if (prompt := prompt_of(given)[0]) != PROMPT:
            rows[name]["prompt"] = prompt
        tensors[name] = single["picture"]
        lowest = min(lowest, stable)
    settings = dict(size=SIZE, steps=STEPS, seed=SEED, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=3.0, sampler="euler")
    write_json(FIXTURES / "lora.json", {"settings": settings, "cases": rows, "files": files}, 2)
    write_tensors(FIXTURES / "lora.safetensors", tensors)
    print(f"float32 agrees with float64 at {lowest:.1f} dB and more")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
