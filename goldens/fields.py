"""Every field of every configuration at a value that is not its default: what diffusers draws then, or that it is not for us.

The lists below are checked against the signatures of the classes themselves, so that a field which a new version adds fails here. A
field is drawn with (the golden says whether it changes anything), or refused by an error that names it; none is passed over.
"""

import inspect
import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import samplers
from checkpoints import BY_NAME, FIXTURES
from fixture import psnr, write_json, write_tensors
from formula import canonical, fill, gain_of
from pipelines import FOX, STABLE

# A checkpoint's part, the field, its value, and what to expect: "changes" or "same" (the golden), or "refused" with a word of the error
# where that is not the field's name.
CHANGES, SAME, REFUSED = "changes", "same", "refused"

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNET = [
    ("sd1", {"sample_size": [8, 16]}, SAME),
    ("sd1", {"in_channels": 9}, REFUSED, "conv_in.weight"),
    ("sd1", {"out_channels": 8}, REFUSED, "conv_out.weight"),
    ("sd1", {"center_input_sample": True}, REFUSED),
    ("sd1", {"flip_sin_to_cos": False}, CHANGES),
    ("sdxl", {"flip_sin_to_cos": False}, CHANGES),
    ("sd1", {"freq_shift": 1}, CHANGES),
    ("sdxl", {"freq_shift": 1}, CHANGES),
    ("sd1", {"down_block_types": [CROSS, PLAIN, PLAIN]}, CHANGES),
    ("sd1", {"down_block_types": [CROSS, "AttnDownBlock2D", PLAIN]}, REFUSED),
    ("sd1", {"mid_block_type": "UNetMidBlock2D"}, CHANGES),
    ("sd1", {"mid_block_type": None}, CHANGES),
    ("sd1", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, REFUSED),
    ("sd1", {"up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]}, CHANGES),
    ("sd1", {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}, REFUSED),
    ("sd1", {"only_cross_attention": [False] * 3}, SAME),
    ("sd1", {"only_cross_attention": True}, REFUSED),
    ("sd1", {"block_out_channels": [32, 32, 64]}, CHANGES),
    ("sd1", {"layers_per_block": [2, 1, 2]}, CHANGES),
    ("sd1", {"downsample_padding": 0}, REFUSED),
    ("sd1", {"mid_block_scale_factor": 1.4}, CHANGES),
    ("sd1", {"dropout": 0.3}, SAME),
    ("sd1", {"act_fn": "mish"}, REFUSED),
    ("sd1", {"norm_num_groups": 4}, CHANGES),
    ("sd1", {"norm_eps": 0.01}, CHANGES),
    ("sd1", {"cross_attention_dim": [32, 32, 32]}, SAME),
    ("sd1", {"transformer_layers_per_block": [1, 2, 1]}, CHANGES),
    ("sd1", {"reverse_transformer_layers_per_block": [1, 2, 1]}, CHANGES),
    ("sd1", {"encoder_hid_dim": 32}, REFUSED),
    ("sd1", {"encoder_hid_dim_type": "text_proj"}, REFUSED),
    ("sd1", {"attention_head_dim": 4}, CHANGES),
    ("sd1", {"num_attention_heads": 4}, REFUSED),
    ("sd1", {"dual_cross_attention": True}, REFUSED),
    ("sd1", {"use_linear_projection": True}, SAME),
    ("sd1", {"class_embed_type": "timestep"}, REFUSED),
    ("sd1", {"addition_embed_type": "text"}, REFUSED),
    ("sd1", {"addition_time_embed_dim": 16}, SAME),
    ("sd1", {"num_class_embeds": 3}, REFUSED),
    ("sd1", {"upcast_attention": True}, SAME),
    ("sd1", {"resnet_time_scale_shift": "scale_shift"}, REFUSED),
    ("sd1", {"resnet_skip_time_act": True}, SAME),
    ("sd1", {"resnet_out_scale_factor": 1.4}, SAME),
    ("sd1", {"time_embedding_type": "fourier"}, REFUSED),
    ("sd1", {"time_embedding_dim": 64}, CHANGES),
    ("sd1", {"time_embedding_act_fn": "silu"}, REFUSED),
    ("sd1", {"timestep_post_act": "silu"}, REFUSED),
    ("sd1", {"time_cond_proj_dim": 20}, CHANGES),
    ("sd1", {"conv_in_kernel": 5}, CHANGES),
    ("sd1", {"conv_out_kernel": 1}, CHANGES),
    ("sd1", {"projection_class_embeddings_input_dim": 16}, SAME),
    ("sd1", {"attention_type": "gated"}, REFUSED),
    ("sd1", {"class_embeddings_concat": True}, REFUSED),
    ("sd1", {"mid_block_only_cross_attention": True}, SAME),
    ("sd1", {"cross_attention_norm": "layer_norm"}, SAME),
    ("sd1", {"addition_embed_type_num_heads": 32}, SAME),
]
ENCODER, DECODER = "DownEncoderBlock2D", "UpDecoderBlock2D"
VAE = [
    ("sd1", {"in_channels": 4}, SAME),
    ("sd1", {"out_channels": 4}, REFUSED),
    ("sd1", {"down_block_types": [ENCODER, ENCODER, ENCODER, "AttnDownEncoderBlock2D"]}, REFUSED),
    ("sd1", {"up_block_types": [DECODER, DECODER, DECODER, "AttnUpDecoderBlock2D"]}, REFUSED),
    ("sd1", {"up_block_types": [DECODER, DECODER, DECODER]}, REFUSED),
    ("sd1", {"block_out_channels": [16, 16, 16, 32]}, CHANGES),
    ("sd1", {"layers_per_block": 1}, CHANGES),
    ("sd1", {"act_fn": "mish"}, REFUSED),
    ("sd1", {"latent_channels": 16}, REFUSED, "post_quant_conv.weight"),
    ("sd1", {"norm_num_groups": 4}, CHANGES),
    ("sd1", {"sample_size": 32}, SAME),
    ("sd1", {"scaling_factor": 0.5}, CHANGES),
    ("sd1", {"shift_factor": 0.0}, SAME),
    ("sd1", {"shift_factor": 0.1}, REFUSED),
    # SDXL's pipeline takes both or none, the other pipelines none.
    ("sd1", {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [0.5, 1.5, 2.0, 0.7]}, SAME),
    ("sdxl", {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [0.5, 1.5, 2.0, 0.7]}, CHANGES),
    ("sdxl", {"latents_mean": [0.5, -1.0, 2.0, 0.0]}, SAME),
    ("sdxl", {"latents_std": [0.5, 1.5, 2.0, 0.7]}, SAME),
    ("sd1", {"force_upcast": False}, SAME),
    ("sd1", {"use_quant_conv": False}, SAME),
    ("sd1", {"use_post_quant_conv": False}, CHANGES),
    ("sd1", {"mid_block_add_attention": False}, CHANGES),
]
TEXT = [
    ("sd1", {"vocab_size": 4400}, SAME),
    ("sd1", {"hidden_size": 48}, REFUSED, "layer_norm1.weight"),
    ("sd1", {"intermediate_size": 64}, CHANGES),
    ("sd1", {"projection_dim": None}, SAME),
    ("sd1", {"num_hidden_layers": 2}, CHANGES),
    ("sd1", {"num_attention_heads": 2}, CHANGES),
    ("sd1", {"max_position_embeddings": 64}, REFUSED, "64 positions"),
    ("sd1", {"hidden_act": "gelu"}, CHANGES),
    ("sd1", {"hidden_act": "relu"}, REFUSED),
    ("sd1", {"layer_norm_eps": 1.0}, CHANGES),
    ("sd1", {"attention_dropout": 0.5}, SAME),
    ("sd1", {"initializer_range": 0.5}, SAME),
    ("sd1", {"initializer_factor": 2.0}, SAME),
    ("sd1", {"pad_token_id": 7}, SAME),
    ("sd1", {"bos_token_id": 7}, SAME),
    ("sd1", {"eos_token_id": 17}, SAME),
]
# The encoder whose pooled output counts.
TEXT_2 = [
    ("sdxl", {"eos_token_id": 17}, CHANGES),
    ("sdxl", {"projection_dim": None}, REFUSED),
]
SIZE, STEPS, SEED = 24, 2, 90


def check_complete(cls, rows) -> None:
    known = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    if cls is CLIPTextConfig:
        # What it has from the class above it belongs to no model in particular.
        known = set(cls.__annotations__) - {"model_type", "base_config_key"}
    listed = {field for row in rows for field in row[1]}
    assert known == listed, (cls.__name__, known ^ listed)


def changed(part: str, pipe: DiffusionPipeline, fields: dict, gains: dict) -> dict[str, list | None]:
    """Puts a part with other fields into the pipeline: the rows of its tensors that are not as before."""
    old = getattr(pipe, part)
    if part.startswith("text"):
        config = CLIPTextConfig(**{**old.config.to_dict(), **fields})
        new = (CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel)(config)
    else:
        new = type(old).from_config({**{k: v for k, v in old.config.items() if not k.startswith("_")}, **fields})
    new = new.eval()
    fill(new, part, gains)
    setattr(pipe, part, new)

    def rows(module):
        return {k: [gain_of(canonical(part, k), gains), *v.shape] for k, v in module.state_dict().items()}

    before, after = rows(old), rows(new)
    return {k: after.get(k) for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)}


def draw(pipe: DiffusionPipeline, dtype: torch.dtype) -> np.ndarray:
    pipe.to(dtype)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(SEED)
        # Doubles are drawn otherwise: both types begin with the same floats.
        return pipe(
            FOX,
            width=SIZE,
            height=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            latents=torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=generator).to(dtype),
            output_type="np",
        ).images[0]


def networks() -> None:
    check_complete(UNet2DConditionModel, UNET)
    check_complete(AutoencoderKL, VAE)
    check_complete(CLIPTextConfig, TEXT)
    rows, tensors = {}, {}
    plain = {name: draw(BY_NAME[name].pipeline(), torch.float32) for name in ("sd1", "sdxl")}
    for name, picture in plain.items():
        tensors[f"plain/{name}"] = (picture * 255).round().astype("uint8")
    for part, table in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT), ("text_encoder_2", TEXT_2)):
        for checkpoint, fields, expected, *words in table:
            name = f"{checkpoint}/{part}/" + json.dumps(fields)
            row = {"checkpoint": checkpoint, "part": part, "fields": fields, "expected": expected}
            rows[name] = row
            if expected == REFUSED:
                row["word"] = words[0] if words else next(iter(fields))
                continue
            pipe = BY_NAME[checkpoint].pipeline()
            row["tensors"] = changed(part, pipe, fields, BY_NAME[checkpoint].gains)
            single = draw(pipe, torch.float32)
            stable = psnr(single.astype("float64"), draw(pipe, torch.float64))
            distance = psnr(single, plain[checkpoint])
            print(f"{name}: float64 {stable:.1f} dB, from the plain one {distance:.1f} dB", flush=True)
            assert stable >= STABLE and (distance > 90 if expected == SAME else distance < 45), name
            if expected == CHANGES:
                tensors[name] = (single * 255).round().astype("uint8")
    write_json(FIXTURES / "fields.json", rows, 1)
    write_tensors(FIXTURES / "fields.safetensors", tensors)


# A value of each field of a scheduler that is not its default, with what makes it count.
KARRAS = {"use_karras_sigmas": True}
THRESHOLD = {"thresholding": True}
SHORT = {"num_train_timesteps": 20, "trained_betas": [0.001 * i for i in range(1, 21)], "steps_offset": 0}
SCHEDULERS = {
    "num_train_timesteps": {"num_train_timesteps": 800},
    "beta_start": {"beta_start": 0.002},
    "beta_end": {"beta_end": 0.03},
    "beta_schedule": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": SHORT,
    "prediction_type": {"prediction_type": "v_prediction"},
    "clip_sample": {"clip_sample": True},
    "clip_sample_range": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholding": THRESHOLD,
    "dynamic_thresholding_ratio": {**THRESHOLD, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 5.0},
    "sample_max_value": {**THRESHOLD, "sample_max_value": 1.2},
    "timestep_spacing": {"timestep_spacing": "trailing"},
    "rescale_betas_zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "steps_offset": {"steps_offset": 7},
    "set_alpha_to_one": {"set_alpha_to_one": True},
    "skip_prk_steps": {"skip_prk_steps": False},
    "interpolation_type": {"interpolation_type": "log_linear"},
    "use_karras_sigmas": KARRAS,
    "use_exponential_sigmas": {"use_exponential_sigmas": True},
    "use_beta_sigmas": {"use_beta_sigmas": True},
    "sigma_min": {**KARRAS, "sigma_min": 0.1},
    "sigma_max": {**KARRAS, "sigma_max": 9.0},
    "timestep_type": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    "final_sigmas_type": {"final_sigmas_type": "sigma_min"},
    "solver_order": {"solver_order": 3},
    "algorithm_type": {"algorithm_type": "sde-dpmsolver++"},
    "solver_type": {"solver_type": "heun"},
    "lower_order_final": {"lower_order_final": False},
    "euler_at_final": {"euler_at_final": True},
    "use_lu_lambdas": {"use_lu_lambdas": True},
    "use_flow_sigmas": {"use_flow_sigmas": True},
    "flow_shift": {"flow_shift": 3.0},
    "lambda_min_clipped": {"lambda_min_clipped": -2.0},
    "variance_type": {"variance_type": "fixed_large"},
    "use_dynamic_shifting": {"use_dynamic_shifting": True},
    "time_shift_type": {"time_shift_type": "linear"},
    "predict_x0": {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    "disable_corrector": {"disable_corrector": [0, 1]},
    "solver_p": {"solver_p": {"_class_name": "DDIMScheduler"}},
    "shift_terminal": {"shift_terminal": 0.1},
    "original_inference_steps": {"original_inference_steps": 100},
    "timestep_scaling": {"timestep_scaling": 3.0},
    "noise_sampler_seed": {"noise_sampler_seed": 7},
}
# Values that stand for a field's default, or that a class never looks at.
HARMLESS = [
    {"variance_type": None},
    {"variance_type": "fixed_small"},
    {"trained_betas": None},
    {"sigma_min": None, "sigma_max": None},
    {"thresholding": None},
    {"disable_corrector": []},
    {"interpolation_type": "linear", "unknown_field": [1, {"a": None}], "_unknown": "x"},
    {"skip_prk_steps": True, "steps_offset": None, "timestep_spacing": "linspace"},
]


def schedulers() -> None:
    cases = []
    for cls in sorted({cls for cls, _ in samplers.SAMPLERS.values()}):
        fields = set(inspect.signature(getattr(diffusers, cls).__init__).parameters) - {"self"}
        assert fields <= SCHEDULERS.keys(), (cls, fields - SCHEDULERS.keys())
        base = {**samplers.file(), "_class_name": cls}
        cases.append((None, base, 6))
        cases += [(None, {**base, **SCHEDULERS[field]}, 6) for field in SCHEDULERS if field in fields]
        cases += [(None, {**base, **row}, 6) for row in HARMLESS]
    (FIXTURES / "fields_samplers.json").write_text(samplers.golden(cases, samplers.file()))


def make() -> None:
    networks()
    schedulers()


if __name__ == "__main__":
    make()
