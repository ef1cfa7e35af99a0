"""Single networks and single blocks: what diffusers and transformers compute for inputs that are a formula.

When a whole pipeline differs, these say where. An output of more than a few hundred numbers is kept as every so-manieth number with
its mean, deviation and maximum.
"""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding

from checkpoints import BY_NAME, CHECKPOINTS, FIXTURES, GAINS
from fixture import SAMPLES, distance, sampled, write_json, write_tensors
from formula import canonical, fill, gain_of, signal

# The prompts cross the vocabulary's corners: nothing, padding by "!", an end token in the middle, a text that is cut.
PROMPTS = ["", "hello! red apple", "Crème <|endoftext|> brûlée 🍮", "cat face, " * 40]

# UNets that no tiny checkpoint has: other middles, other lists, and the guidance embedding of LCM models.
VARIANTS = {
    "no_mid": dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=[1, 2],
        transformer_layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
        flip_sin_to_cos=False,
        freq_shift=1,
        conv_out_kernel=1,
    ),
    "plain_mid": dict(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=[2, 8],
        norm_num_groups=4,
        norm_eps=1e-4,
        time_cond_proj_dim=20,
        use_linear_projection=True,
        in_channels=9,
        out_channels=8,
        conv_in_kernel=5,
    ),
    # A level without attention at the coarse end, and one level only at the fine end.
    "one_level": dict(
        block_out_channels=(24,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=3,
        norm_num_groups=8,
        time_embedding_dim=40,
    ),
}

# name, checkpoint or variant, batch, height, width, timestep
UNETS = [
    ("unet_sd1_8x8", "sd1", 1, 8, 8, 999.0),
    ("unet_sd1_9x7", "sd1", 2, 9, 7, 1.0),
    ("unet_sd1_13x12", "sd1", 1, 13, 12, 500.5),
    ("unet_sd1_1x1", "sd1", 1, 1, 1, 0.0),
    ("unet_sd2_7x10", "sd2", 1, 7, 10, 321.0),
    ("unet_sdxl_9x7", "sdxl", 2, 9, 7, 801.0),
    ("unet_sdxl_5x16", "sdxl", 1, 5, 16, 37.25),
    ("unet_no_mid", "no_mid", 1, 7, 6, 250.0),
    ("unet_plain_mid", "plain_mid", 1, 5, 6, 259.0),
    ("unet_one_level", "one_level", 1, 3, 5, 19.0),
]

# name, checkpoint, path of the module, channels, height, width. What else it takes follows from its class.
MODULES = [
    ("resnet", "sd1", "unet/down_blocks.0.resnets.0", 32, 9, 7),
    ("resnet_shortcut", "sd1", "unet/up_blocks.2.resnets.0", 96, 9, 7),
    ("resnet_vae", "sd1", "vae/decoder.up_blocks.2.resnets.0", 32, 5, 3),
    ("transformer_conv", "sd1", "unet/down_blocks.1.attentions.1", 64, 5, 4),
    ("transformer_linear", "sd2", "unet/down_blocks.1.attentions.0", 64, 5, 4),
    ("transformer_deep", "sdxl", "unet/mid_block.attentions.0", 64, 3, 3),
    ("downsample_unet", "sd1", "unet/down_blocks.0.downsamplers.0", 32, 9, 7),
    ("downsample_vae", "sd1", "vae/encoder.down_blocks.0.downsamplers.0", 16, 9, 7),
    ("upsample_twice", "sd1", "unet/up_blocks.0.upsamplers.0", 64, 3, 2),
    ("upsample_to_odd", "sd1", "unet/up_blocks.1.upsamplers.0", 64, 5, 4),
]
# The picture that `upsample_to_odd` has to fit: a skip connection's size.
ODD = (9, 7)


class Fixture:
    """Collects rows and numbers; checks each output against float64 on the way."""

    def __init__(self):
        self.rows, self.tensors, self.variants = {}, {}, {}

    def add(self, name: str, single: torch.Tensor, double: torch.Tensor, **row) -> None:
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        error = distance(single, double)
        assert error < 1e-5, f"{name}: float32 is {error} from float64"
        self.tensors[name], statistics = sampled(single.numpy())
        self.rows[name] = {**row, **statistics}


def inputs(name: str, **shapes) -> dict[str, torch.Tensor]:
    """Formula inputs, each named after its block and itself."""
    return {key: signal(f"blocks/{name}/{key}", list(shape)) for key, shape in shapes.items()}


def text_encoders(fixture: Fixture, name: str, pipe) -> None:
    for suffix in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}", None), getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is None:
            continue
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        outputs = {}
        for dtype in (torch.float32, torch.float64):
            out = encoder.to(dtype)(ids, output_hidden_states=True)
            outputs[dtype] = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
            if suffix:
                outputs[dtype]["pooled"] = out.text_embeds
        encoder.to(torch.float32)
        for kind, single in outputs[torch.float32].items():
            row = dict(checkpoint=name, part=f"text_encoder{suffix}", output=kind, ids=ids.tolist())
            fixture.add(f"text_{name}{suffix}_{kind}", single, outputs[torch.float64][kind], **row)


def variant(fixture: Fixture, name: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(sample_size=8, **VARIANTS[name]).eval()
    fill(unet, f"unet_{name}", GAINS)
    config = {k: v for k, v in dict(unet.config).items() if k != "_use_default_values"}
    tensors = {
        key: [gain_of(canonical(f"unet_{name}", key), GAINS), *value.shape]
        for key, value in sorted(unet.state_dict().items())
    }
    fixture.variants[name] = {"config": config, "tensors": tensors}
    return unet


def whole_unet(fixture: Fixture, name: str, which: str, unet, batch: int, h: int, w: int, timestep: float) -> None:
    c = unet.config
    shapes = dict(sample=[batch, c.in_channels, h, w], text=[batch, 77, c.cross_attention_dim])
    row = dict(unet=which, batch=batch, height=h, width=w, timestep=timestep)
    if c.addition_embed_type:
        shapes["pooled"] = [batch, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim]
        row["time_ids"] = [[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w], [512, 768, 16, 32, 1024, 1024]][:batch]
    if c.time_cond_proj_dim:
        row["guidance"] = 8.0
    x = inputs(name, **shapes)
    outputs = []
    for dtype in (torch.float32, torch.float64):
        added = condition = None
        if "pooled" in x:
            added = {"text_embeds": x["pooled"].to(dtype), "time_ids": torch.tensor(row["time_ids"], dtype=dtype)}
        if "guidance" in row:
            told = torch.tensor([row["guidance"] - 1.0] * batch)
            embed = StableDiffusionPipeline.get_guidance_scale_embedding
            condition = embed(None, told, embedding_dim=c.time_cond_proj_dim).to(dtype)
        out = unet.to(dtype)(
            x["sample"].to(dtype),
            torch.tensor(timestep),
            encoder_hidden_states=x["text"].to(dtype),
            added_cond_kwargs=added,
            timestep_cond=condition,
        )
        outputs.append(out.sample)
    unet.to(torch.float32)
    fixture.add(name, *outputs, **row)


def autoencoder(fixture: Fixture, name: str, vae) -> None:
    for h, w in ((4, 4), (9, 7)):
        x = inputs(f"decoder_{name}_{h}x{w}", latents=[1, 4, h, w])["latents"]
        outputs = [vae.to(d).decode(x.to(d)).sample for d in (torch.float32, torch.float64)]
        fixture.add(f"decoder_{name}_{h}x{w}", *outputs, checkpoint=name, height=h, width=w)
    for h, w in ((32, 32), (72, 56)):
        x = inputs(f"encoder_{name}_{h}x{w}", picture=[1, 3, h, w])["picture"]
        outputs = [vae.to(d).encode(x.to(d)).latent_dist.parameters for d in (torch.float32, torch.float64)]
        fixture.add(f"encoder_{name}_{h}x{w}", *outputs, checkpoint=name, height=h, width=w)
    vae.to(torch.float32)


def module(fixture: Fixture, name: str, pipes: dict, checkpoint: str, path: str, c: int, h: int, w: int) -> None:
    part, _, inner = path.partition("/")
    network = getattr(pipes[checkpoint], part)
    block = network.get_submodule(inner)
    kind = type(block).__name__
    shapes = dict(hidden=[2, c, h, w])
    if kind == "ResnetBlock2D" and block.time_emb_proj is not None:
        shapes["time"] = [2, block.time_emb_proj.in_features]
    if kind == "Transformer2DModel":
        shapes["text"] = [2, 11, network.config.cross_attention_dim]
    x = inputs(name, **shapes)
    outputs = []
    for dtype in (torch.float32, torch.float64):
        block.to(dtype)
        hidden, rest = x["hidden"].to(dtype), {k: v.to(dtype) for k, v in x.items() if k != "hidden"}
        if kind == "ResnetBlock2D":
            out = block(hidden, rest.get("time"))
        elif kind == "Transformer2DModel":
            out = block(hidden, encoder_hidden_states=rest["text"], return_dict=False)[0]
        elif kind == "Upsample2D":
            out = block(hidden, ODD if name.endswith("odd") else None)
        else:
            out = block(hidden)
        outputs.append(out)
    block.to(torch.float32)
    row = dict(checkpoint=checkpoint, module=path, kind=kind, inputs={k: list(v.shape) for k, v in x.items()})
    fixture.add(name, *outputs, **row)


def time_embeddings(fixture: Fixture) -> None:
    t = [0.0, 1.0, 37.25, 500.5, 999.0]
    for dim, flip, shift in ((32, True, 0), (320, True, 0), (33, False, 1)):
        out = get_timestep_embedding(torch.tensor(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        name = f"time_{dim}"
        flat, row = sampled(out.numpy())
        fixture.tensors[name] = flat
        fixture.rows[name] = dict(timesteps=t, dim=dim, flip_sin_to_cos=flip, freq_shift=shift, **row)


@torch.inference_mode()
def make() -> None:
    fixture = Fixture()
    pipes = {c.name: c.pipeline() for c in CHECKPOINTS}
    for name, pipe in pipes.items():
        text_encoders(fixture, name, pipe)
    for row in MODULES:
        module(fixture, row[0], pipes, *row[1:])
    variants = {name: variant(fixture, name) for name in VARIANTS}
    for name, which, *sizes in UNETS:
        unet = pipes[which].unet if which in BY_NAME else variants[which]
        whole_unet(fixture, name, which, unet, *sizes)
    for name in ("sd1", "sd2"):
        autoencoder(fixture, name, pipes[name].vae)
    time_embeddings(fixture)
    content = {"samples": SAMPLES, "odd": ODD, "unets": fixture.variants, "blocks": fixture.rows}
    write_json(FIXTURES / "blocks.json", content, 3)
    write_tensors(FIXTURES / "blocks.safetensors", fixture.tensors)
    spread = [(k, round(v["std"], 2), round(v["max"], 1)) for k, v in fixture.rows.items()]
    print("blocks (deviation, maximum):", *spread)
    assert all(np.isfinite(v).all() for v in fixture.tensors.values())


if __name__ == "__main__":
    make()
