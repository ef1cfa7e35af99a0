"""What requests may say beyond diffusers' defaults: the A1111 syntax, skipped layers, rescaled guidance, SDXL's sizes; and a VAE that
float16 cannot compute."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import a1111
from checkpoints import BY_NAME, CHECKPOINTS, EMOJI, FIXTURES
from fixture import distance, write_json, write_tensors
from pipelines import CAFE, FOX, SCHEDULERS, STABLE, Case, load, precision, run
from tokens import write_asset, write_folder


@dataclass
class PromptCase(Case):
    prompt_syntax: str | None = None
    clip_skip: int | None = None
    guidance_rescale: float | None = None
    # (height, width), (top, left), (height, width), as diffusers has them.
    original_size: list[int] | None = None
    crops_coords_top_left: list[int] | None = None
    target_size: list[int] | None = None
    negative_original_size: list[int] | None = None
    negative_crops_coords_top_left: list[int] | None = None
    negative_target_size: list[int] | None = None

    def arguments(self, pipe) -> dict:
        """The pipeline's arguments beside those that every case has."""
        extra = {}
        for name, value in asdict(self).items():
            if name == "guidance_rescale" and value is not None:
                extra[name] = value
            if name.endswith(("_size", "_left")) and value is not None:
                extra[name] = tuple(value)
        if self.prompt_syntax == "a1111":
            extra |= {"prompt": None, "negative_prompt": None}
            extra |= a1111.arguments(pipe, self.prompt, self.negative_prompt, self.clip_skip or 0)
        elif self.clip_skip is not None:
            extra["clip_skip"] = self.clip_skip
        return extra


WEIGHTED = "a ((red)) fox in [deep] (snow:1.4), \\(oil\\) painting (blue:0.3"
HOUSES = "one (hundred:1.3) tiny wooden houses on a green hill, " * 9 + "at [night]"

CASES = [
    PromptCase("sd1_clip_skip_1", "sd1", FOX, "blurry", steps=4, seed=1, clip_skip=1),
    PromptCase("sd1_clip_skip_2", "sd1", CAFE, steps=4, seed=2, clip_skip=2),
    PromptCase("sd1_clip_skip_all", "sd1", FOX, steps=4, seed=2, clip_skip=3),
    PromptCase("sd2_clip_skip_1", "sd2", FOX, "fog!", steps=4, seed=3, clip_skip=1),
    PromptCase("sdxl_clip_skip_1", "sdxl", FOX, "fog!", steps=4, seed=4, clip_skip=1),
    PromptCase("sd1_rescale", "sd1", FOX, "fog", width=72, seed=5, guidance_rescale=0.7),
    PromptCase("sd2_zero_snr_rescale", "sd2", FOX, seed=6, scheduler="zero_snr", guidance_rescale=0.7),
    PromptCase("sdxl_rescale", "sdxl", CAFE, seed=7, guidance_rescale=1.0, sampler="euler_a"),
    PromptCase("sdxl_sizes", "sdxl", FOX, steps=4, seed=8, original_size=[512, 768], crops_coords_top_left=[16, 96],
               target_size=[1024, 640]),
    PromptCase("sdxl_original_size", "sdxl", FOX, "", steps=4, seed=9, original_size=[64, 33]),
    PromptCase("sdxl_negative_sizes", "sdxl", FOX, "fog", steps=4, seed=10, target_size=[1024, 1024],
               negative_original_size=[256, 320], negative_crops_coords_top_left=[8, 24], negative_target_size=[512, 384]),
    PromptCase("sd1_weights", "sd1", WEIGHTED, "(fog:1.5)", 64, 64, steps=4, seed=11, prompt_syntax="a1111"),
    PromptCase("sd1_break", "sd1", "a red fox BREAK oil (painting:1.2)", None, steps=4, seed=12, prompt_syntax="a1111"),
    PromptCase("sd1_long", "sd1", HOUSES, "fog", steps=4, seed=13, prompt_syntax="a1111", sampler="euler_a"),
    PromptCase("sd1_long_negative", "sd1", "cat [face]", HOUSES, steps=4, seed=14, prompt_syntax="a1111", clip_skip=1),
    PromptCase("sd1_no_guidance", "sd1", HOUSES, "fog BREAK", steps=4, seed=15, prompt_syntax="a1111", guidance_scale=1.0),
    PromptCase("sd2_weights", "sd2", "hello! " + WEIGHTED, "", steps=4, seed=16, prompt_syntax="a1111", clip_skip=1),
    PromptCase("sdxl_weights", "sdxl", WEIGHTED, None, steps=4, seed=17, prompt_syntax="a1111"),
    PromptCase("sdxl_long", "sdxl", HOUSES, "(fog!:1.4)", steps=4, seed=18, prompt_syntax="a1111", clip_skip=1),
    PromptCase("sdxl_long_absent_negative", "sdxl", HOUSES, None, steps=4, seed=19, prompt_syntax="a1111"),
    PromptCase("emoji_weights", "emoji", "(rocket:1.3), [blue] background BREAK star", "dog", 128, 128, steps=4, seed=20,
               prompt_syntax="a1111"),
]

# What is read with CLIP's own vocabulary.
READ = [
    "", "BREAK", "a BREAK", "BREAK a", "a BREAK BREAK b", WEIGHTED, HOUSES, HOUSES + " BREAK " + WEIGHTED,
    "a photo of a cat", "hello! (what a day!!:1.3)", "(a (house:1.5) on [a hill)]", "(a [b:1.2) c]", "16:9, (mood: calm)",
    r"\\(a\\) \(b\) c\d", "((((deep))))", "a, " * 25, "a, " * 37 + "b c d", "word " * 75, "word " * 76, "word " * 60 + ", " + "word " * 20,
    "word " * 50 + ", " + "word " * 40, "word " * 75 + ", tail", "(word " * 80, "カフェの(猫 ☕:0.8) naïve",
]

# A power of two, which changes no mantissa, on the decoder's first layer: its normalisations take it out again.
LOUD = 2.0**20


def loud_vae(scratch: Path) -> tuple[dict, dict]:
    """A VAE whose activations pass float16's largest number, and what each number type makes of it."""
    pipe = load(scratch / "sdxl")
    for parameter in pipe.vae.decoder.conv_in.parameters():
        parameter.data *= LOUD
    latents = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 4, 6, 5), np.float32))
    largest = 0.0

    def watch(module, inputs, output):
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, float(output.abs().max()))

    hooks = [m.register_forward_hook(watch) for m in pipe.vae.decoder.modules()]
    outputs = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            vae = pipe.vae.to(dtype)
            # The scaling belongs to the pipeline: latents are divided before they are decoded.
            scaled = (latents / vae.config.scaling_factor).to(dtype)
            outputs[dtype] = vae.decode(scaled, return_dict=False)[0].double().numpy()
            if dtype == torch.float32:
                for hook in hooks:
                    hook.remove()
            pipe.vae.float()
    single = outputs[torch.float32]
    row = {
        "factor": LOUD,
        "largest": largest,
        "float16_finite": bool(np.isfinite(outputs[torch.float16]).all()),
        "float64": distance(single, outputs[torch.float64]),
        "bfloat16": distance(outputs[torch.bfloat16], single),
    }
    assert largest > 65504 and not row["float16_finite"] and row["float64"] < 1e-5, row
    print(f"loud VAE: {row}")
    picture = np.round(np.clip(single[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    return row, {"loud_vae/latents": latents[0].numpy(), "loud_vae/picture": picture}


def make(scratch: Path) -> None:
    for checkpoint in CHECKPOINTS:
        checkpoint.save(scratch / checkpoint.name)
    rows, tensors = {}, {}
    for case in CASES:
        if case.checkpoint == "emoji":
            folder, scheduler = EMOJI, json.loads((EMOJI / "scheduler/scheduler_config.json").read_text())
        else:
            folder, scheduler = scratch / case.checkpoint, BY_NAME[case.checkpoint].scheduler
        scheduler = SCHEDULERS[case.scheduler] if case.scheduler else scheduler
        found = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            pipe = load(folder)
            # Where diffusers 0.42 looks for the last normalisation, and transformers 5 no longer has it.
            if not hasattr(pipe.text_encoder, "text_model"):
                norm = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
                object.__setattr__(pipe.text_encoder, "text_model", norm)
            pipe.to(dtype)
            found[dtype] = run(pipe, case, scheduler, dtype, case.arguments(pipe))
        single, double, brain = found.values()
        row = {k: v for k, v in asdict(case).items() if v is not None or k in Case.__dataclass_fields__}
        row.pop("name")
        row |= precision(single, double, brain)
        rows[case.name] = row
        tensors[f"{case.name}/latents"] = single["latents"].astype(np.float32)
        tensors[f"{case.name}/picture"] = single["picture"]
        print(f"{case.name}: float64 {row['float64']} dB, bfloat16 {row['bfloat16']}", flush=True)
        assert row["float64"] >= STABLE and single["floats"].std() > 0.05, case.name
    loud, more = loud_vae(scratch)
    content = {"schedulers": SCHEDULERS, "layouts": {}, "cases": rows, "loud_vae": loud, "read": read(scratch)}
    write_json(FIXTURES / "prompts.json", content, 2)
    write_tensors(FIXTURES / "prompts.safetensors", tensors | more)


def read(scratch: Path) -> list[dict]:
    """Chunks of awkward prompts, for both paddings; without the padding at their ends."""
    merges = write_asset()
    rows = []
    for pad, name in (("<|endoftext|>", "eos"), ("!", "exclamation")):
        tokenizer = write_folder(scratch / f"read_{name}", merges, pad, "strings")
        for prompt in READ:
            found = []
            for ids, weights in a1111.chunks(prompt, tokenizer, 77):
                end = 77
                while end > 2 and ids[end - 1] == tokenizer.pad_token_id and weights[end - 1] == 1.0:
                    end -= 1
                found.append([ids[:end], [float(np.float32(w)) for w in weights[:end]]])
            rows.append({"padding": name, "pad": tokenizer.pad_token_id, "prompt": prompt, "chunks": found})
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
