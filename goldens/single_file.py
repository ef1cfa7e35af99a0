"""Single-file checkpoints in the original key layout: tiny ones, with the constants that no shape tells as in the published models.

The way from diffusers' names to the original ones is written here anew. That it is right is checked by the reference itself: its
`from_single_file` has to find in the file every tensor that went into it, and it draws the golden.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from checkpoints import BY_NAME, FIXTURES, GAINS, VAE, build_scheduler
from fixture import psnr, write_json, write_tensors
from formula import canonical, fill, gain_of, weight
from pipelines import CAFE, FOX, STABLE
from tokens import write_asset, write_folder

VAE = {**VAE, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
CLIP_L = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, projection_dim=64, hidden_act="quick_gelu")
OPEN = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, projection_dim=96, hidden_act="gelu")
UNET = dict(block_out_channels=(64, 64, 128), layers_per_block=2, norm_num_groups=32, sample_size=64)

CHECKPOINTS = [
    replace(
        BY_NAME["sd1"],
        name="single_sd1",
        unet={**BY_NAME["sd1"].unet, **UNET, "cross_attention_dim": 64, "attention_head_dim": 8},
        vae={**VAE, "layers_per_block": 2, "scaling_factor": 0.18215},
        text=[CLIP_L],
    ),
    replace(
        BY_NAME["sd2"],
        name="single_sd2",
        unet={**BY_NAME["sd2"].unet, **UNET, "layers_per_block": 1, "cross_attention_dim": 128, "attention_head_dim": [1, 1, 2]},
        vae={**VAE, "scaling_factor": 0.18215},
        text=[OPEN],
    ),
    replace(
        BY_NAME["sdxl"],
        name="single_sdxl",
        unet={
            **BY_NAME["sdxl"].unet,
            **UNET,
            "cross_attention_dim": 192,
            "attention_head_dim": [1, 1, 2],
            "transformer_layers_per_block": [1, 1, 2],
            "projection_class_embeddings_input_dim": 8 * 6 + 96,
        },
        vae={**VAE, "scaling_factor": 0.13025},
        text=[CLIP_L, OPEN],
    ),
]
FORMS = {"!": {"tokenizer": "older", "tokenizer_2": "listed"}, "<|endoftext|>": {"tokenizer": "older"}}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, unet: dict) -> str:
    """The original name of a tensor of the UNet, after its prefix."""
    stem, leaf = key.rsplit(".", 1)
    if stem in FIXED:
        return f"{FIXED[stem]}.{leaf}"
    parts, layers = key.split("."), unet["layers_per_block"]
    if parts[0] == "mid_block":
        kind, index, *rest = parts[1:]
        if kind == "attentions":
            return ".".join(["middle_block.1", *rest])
        return ".".join(["middle_block", "02"[int(index)], RESNET[rest[0]], *rest[1:]])
    side, level, kind, index, *rest = parts
    down = side == "down_blocks"
    block = int(level) * (layers + 1) + int(index) + down
    place = f"{'input' if down else 'output'}_blocks.{block}"
    match kind:
        case "resnets":
            return ".".join([place, "0", RESNET[rest[0]], *rest[1:]])
        case "attentions":
            return ".".join([place, "1", *rest])
        case "downsamplers":
            return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{leaf}"
        case "upsamplers":
            attention = unet["up_block_types"][int(level)].startswith("CrossAttn")
            return f"output_blocks.{(int(level) + 1) * (layers + 1) - 1}.{2 if attention else 1}.conv.{leaf}"
    raise ValueError(key)


def vae_name(key: str, levels: int) -> str:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv") or parts[1] in ("conv_in", "conv_out"):
        return key
    half, part, *rest = parts
    if part == "conv_norm_out":
        return f"{half}.norm_out.{rest[0]}"
    if part == "mid_block" and rest[0] == "attentions":
        return f"{half}.mid.attn_1.{VAE_ATTENTION['.'.join(rest[2:-1])]}.{rest[-1]}"
    if part == "mid_block":
        inner = ".".join(rest[2:])
        return f"{half}.mid.block_{int(rest[1]) + 1}.{inner}"
    level = int(rest[0]) if half == "encoder" else levels - 1 - int(rest[0])
    side = "down" if half == "encoder" else "up"
    if rest[1] == "resnets":
        return f"{half}.{side}.{level}.block.{rest[2]}.{'.'.join(rest[3:]).replace('conv_shortcut', 'nin_shortcut')}"
    return f"{half}.{side}.{level}.{side}sample.conv.{rest[-1]}"


def open_clip_name(key: str) -> str:
    key = key.removeprefix("text_model.")
    for old, new in (
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.token_embedding", "token_embedding"),
        ("final_layer_norm", "ln_final"),
        ("text_projection.weight", "text_projection"),
        ("encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        key = key.replace(old, new)
    return key


def layout(checkpoint, tensors: dict[str, list[int]]) -> dict[str, list]:
    """What the file holds: [how, component's tensors...] by original name. `how` is copy, image (a 1x1 convolution of a matrix), stack
    (rows one after the other), turn (rows and columns exchanged), or noise, followed by a shape: not to be read."""
    rows = {}
    two = len(checkpoint.text) == 2
    second = checkpoint.name.endswith("sd2")
    for name, shape in tensors.items():
        part, key = name.split("/")
        match part:
            case "unet":
                rows["model.diffusion_model." + unet_name(key, checkpoint.unet)] = ["copy", name]
            case "vae":
                old = vae_name(key, 4)
                matrix = ".mid.attn_1." in old and len(shape) == 2
                rows["first_stage_model." + old] = ["image" if matrix else "copy", name]
            case "text_encoder" if not second:
                prefix = "conditioner.embedders.0." if two else "cond_stage_model."
                rows[f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}"] = ["copy", name]
            case _:
                prefix = "conditioner.embedders.1.model." if two else "cond_stage_model.model."
                stem, leaf = key.rsplit(".", 1)
                if stem.endswith("q_proj"):
                    three = [f"{part}/{stem.replace('q_proj', p + '_proj')}.{leaf}" for p in "qkv"]
                    rows[prefix + open_clip_name(stem.removesuffix(".q_proj")) + ".in_proj_" + leaf] = ["stack", *three]
                elif not stem.endswith(("k_proj", "v_proj")):
                    rows[prefix + open_clip_name(key)] = ["turn" if stem == "text_projection" else "copy", name]
    # What the published files hold beside.
    rows |= {"betas": ["noise", 1000], "alphas_cumprod": ["noise", 1000], "model_ema.decay": ["noise", 1]}
    rows["first_stage_model.loss.logvar"] = ["noise", 1]
    if second:
        # The last of OpenCLIP's layers, number 23 in the true model, by which diffusers knows what not to take.
        last = [r for r in rows if ".resblocks.2." in r]
        for row in last:
            source = rows[row][1]
            shape = list(tensors[source])
            shape[0] *= 3 if rows[row][0] == "stack" else 1
            rows[row.replace(".resblocks.2.", ".resblocks.23.")] = ["noise", *shape]
        rows["cond_stage_model.model.text_projection"] = ["noise", 128, 128]
        rows["cond_stage_model.model.logit_scale"] = ["noise", 1]
    return rows


def write(rows: dict[str, list], state: dict[str, torch.Tensor], path: Path, dtype: torch.dtype, ema: bool) -> None:
    tensors = {}
    for name, (how, *sources) in rows.items():
        match how:
            case "noise":
                tensors[name] = weight(name, sources)
            case "stack":
                tensors[name] = torch.cat([state[s] for s in sources])
            case "turn":
                tensors[name] = state[sources[0]].T.contiguous()
            case "image":
                tensors[name] = state[sources[0]][:, :, None, None]
            case "copy":
                tensors[name] = state[sources[0]]
    if ema:
        # Averages are not what is drawn with: zeros would show.
        for name in [n for n in tensors if n.startswith("model.diffusion_model.")]:
            flat = "model_ema." + name.removeprefix("model.").replace(".", "")
            tensors[flat] = torch.zeros_like(tensors[name])
    tensors = {k: v.to(dtype).contiguous().clone() for k, v in tensors.items()}
    for clip in ("cond_stage_model.transformer.text_model.", "conditioner.embedders.0.transformer.text_model."):
        if any(n.startswith(clip) for n in tensors):
            tensors[clip + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)


def build(checkpoint, scratch: Path, merges: str):
    """The pipeline, its folder as diffusers writes it, and its tensors by name."""
    tokenizers, encoders, configs = [], [], {}
    for i, (text, pad) in enumerate(zip(checkpoint.text, checkpoint.pads)):
        name = "tokenizer" if i == 0 else "tokenizer_2"
        folder = scratch / f"{checkpoint.name}_{name}"
        tokenizers.append(write_folder(folder, merges, pad, FORMS[pad][name]))
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).exists():
                configs[f"{name}/{file}"] = json.loads((folder / file).read_text())
        config = CLIPTextConfig(vocab_size=49408, bos_token_id=0, eos_token_id=2, pad_token_id=1, **text)
        encoders.append((CLIPTextModelWithProjection if i else CLIPTextModel)(config).eval())
    parts = dict(
        vae=AutoencoderKL(**checkpoint.vae).eval(),
        unet=UNet2DConditionModel(**checkpoint.unet).eval(),
        scheduler=build_scheduler(checkpoint.scheduler, None),
    )
    for suffix, tokenizer, encoder in zip(("", "_2"), tokenizers, encoders):
        parts |= {"tokenizer" + suffix: tokenizer, "text_encoder" + suffix: encoder}
    state, shapes, files = {}, {}, {}
    for part, module in parts.items():
        if isinstance(module, torch.nn.Module):
            fill(module, part, checkpoint.gains)
            for key, value in module.state_dict().items():
                state[f"{part}/{key}"], shapes[f"{part}/{key}"] = value, list(value.shape)
    if checkpoint.xl:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    folder = scratch / checkpoint.name
    pipe.save_pretrained(folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(checkpoint.scheduler, indent=2))
    for path in sorted(folder.rglob("*.json")):
        if not path.parent.name.startswith("tokenizer"):
            content = json.loads(path.read_text())
            content.pop("_name_or_path", None)
            files[str(path.relative_to(folder))] = content
    return type(pipe), folder, state, shapes, files | configs


def draw(pipe, scheduler: dict, prompt: str, dtype: torch.dtype) -> dict:
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for kind in ("latent", "np"):
        pipe.scheduler = build_scheduler(scheduler, None)
        with torch.inference_mode():
            found[kind] = pipe(
                prompt,
                negative_prompt="hello!",
                width=56,
                height=40,
                num_inference_steps=3,
                guidance_scale=7.5,
                generator=torch.Generator().manual_seed(90),
                output_type=kind,
            ).images[0]
    return found


def make(scratch: Path) -> None:
    merges = write_asset()
    rows, tensors = {}, {}
    original = torch.randn
    torch.randn = lambda *args, dtype=None, **kwargs: original(*args, dtype=torch.float32, **kwargs).to(dtype or torch.float32)
    for checkpoint in CHECKPOINTS:
        cls, folder, state, shapes, files = build(checkpoint, scratch, merges)
        spec = layout(checkpoint, shapes)
        weights, stems = {}, {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
        for name, shape in shapes.items():
            part, key = name.split("/")
            file = f"{part}/{stems.get(part, 'model')}.safetensors"
            weights.setdefault(file, {})[key] = [gain_of(canonical(part, key), checkpoint.gains), *shape]
        rows[checkpoint.name] = {"files": files, "tensors": weights, "single": spec}
        for case, dtype, ema, prompt in (("float32", torch.float32, True, FOX), ("float16", torch.float16, False, CAFE)):
            path = scratch / f"{checkpoint.name}_{case}.safetensors"
            write(spec, state, path, dtype, ema)
            load = lambda: cls.from_single_file(str(path), config=str(folder), local_files_only=True, dtype=torch.float32)
            pipe = load()
            for name, value in state.items():
                part, key = name.split("/")
                found = getattr(pipe, part).state_dict()[key]
                assert torch.equal(found, value.to(dtype).float()), f"{checkpoint.name}: {name} did not survive the way there and back"
            single, double = (draw(p, checkpoint.scheduler, prompt, d) for p, d in ((pipe, torch.float32), (load(), torch.float64)))
            stable = psnr(single["np"].astype("float64"), double["np"].astype("float64"))
            spread = single["np"].std()
            print(f"{checkpoint.name}, {case}: float64 {stable:.1f} dB, std {spread:.2f}", flush=True)
            assert stable >= STABLE and spread > 0.05
            tensors[f"{checkpoint.name}/{case}/latents"] = single["latent"].numpy()
            tensors[f"{checkpoint.name}/{case}/picture"] = (single["np"] * 255).round().astype("uint8")
    torch.randn = original
    write_json(FIXTURES / "single_file.json", rows, 3)
    write_tensors(FIXTURES / "single_file.safetensors", tensors)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
