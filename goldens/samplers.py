"""Writes the goldens of the samplers: full loops of diffusers' own schedulers.

Run with the versions of `goldens/requirements.txt`:

    python goldens/samplers.py

A loop is what a pipeline does: noise from a seeded CPU generator, times the
scheduler's initial sigma; for each timestep the scaled input, the network, the step.
Around it stands a smooth function in place of a network (`network` below, and its
twin in `tests/samplers.rs`), so that a golden is a few numbers and not a checkpoint.

Where diffusers raises, or ends in numbers that are none, the golden says so.
"""

import json
import logging
import math
import warnings
from inspect import signature
from pathlib import Path

import diffusers
import torch

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

OUT = Path(__file__).resolve().parent.parent / "crates/hypergen-diffusion/tests/fixtures/samplers.json"
SHAPE = (1, 4, 4, 4)
STEPS = [1, 4, 20, 50]
# Step counts around which orders and rounding change.
EDGE_STEPS = [2, 3, 7, 14, 15, 61, 150]

# What each name means: a class and the arguments over the file's fields.
SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_2s_a": ("DPMSolverSinglestepScheduler", SDE),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
# Names that come with `_karras`, `_exponential` and `_beta`. Spacing matters to the ramps
# of the first only: the others' go over the whole of training.
GROWING = ["euler", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_sde"]
KEEPING = ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_2s_a", "unipc", "deis"]
# Classes that look alpha up by timestep. In 61 trailing steps, numpy's rounding adds a
# timestep of -1, for which they read the table's noisy end and spoil the picture.
BY_TABLE = ["ddim", "pndm", "ddpm"]
RAMPS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}

BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02},
}
SPACINGS = ["leading", "linspace", "trailing"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def file(beta="scaled_linear", spacing="leading", prediction="epsilon", **fields):
    """A scheduler's file as published checkpoints have it."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        **BETAS[beta],
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        **fields,
    }


def bump(x):
    """Smooth and bounded, and of operations that every language rounds alike."""
    return x / (1.0 + x * x)


def network(x, t, prediction):
    """Stands in for a network: the same numbers, to the bit, in two languages."""
    phase = ((torch.arange(x.numel()) * 5) % 13).float().reshape(x.shape) * 0.3 - 1.8
    u = t / 1000
    if prediction == "epsilon":
        return (0.1 + 0.85 * u) * x + 0.3 * bump(2.0 * x + phase)
    if prediction == "v_prediction":
        return 0.8 * bump(1.5 * x + phase) - (0.3 - 0.3 * u) * x
    return (1.0 - 0.9 * u) * x + 0.4 * bump(x + phase)


class Path:
    """Increments of a Brownian path over sigma, drawn from the picture's generator.

    `DPMSolverSDEScheduler` has the tree of another library draw them, from a seed of its own.
    The process is the same: a step asks for the increment to its middle, then for the
    one to its end.
    """

    def __init__(self, generator):
        self.generator = generator
        self.start = None

    def __call__(self, sigma, end):
        if self.start is None:
            self.start, self.middle = sigma, end
            self.first = torch.randn(SHAPE, generator=self.generator)
            self.second = torch.randn(SHAPE, generator=self.generator)
            return self.first
        half, rest = self.start - self.middle, self.middle - end
        self.start = None
        return (half.sqrt() * self.first + rest.sqrt() * self.second) / (half + rest).sqrt()


def loop(name, config, steps, seed):
    """The timesteps that the network sees, the initial scale and the final latents."""
    if name is None:
        cls, over = getattr(diffusers, config["_class_name"]), {}
    else:
        base, _, ramp = name.rpartition("_")
        if ramp in RAMPS:
            cls, over = SAMPLERS[base]
            over = {**over, **{k: False for r in RAMPS.values() for k in r if k in config}, **RAMPS[ramp]}
        else:
            cls, over = SAMPLERS[name]
        cls = getattr(diffusers, cls)
    scheduler = cls.from_config({**config, **over})
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    extra = {}
    if "generator" in signature(scheduler.step).parameters:
        extra["generator"] = generator
    if "eta" in signature(scheduler.step).parameters:
        # What pipelines pass unless they are told otherwise.
        extra["eta"] = 0.0
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Path(generator)
    seen = []
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), float(t), config.get("prediction_type", "epsilon"))
        seen.append(round(float(t), 4))
        x = scheduler.step(out, t, x, **extra).prev_sample
    return seen, float(scheduler.init_noise_sigma), x.flatten()


def cases():
    """Name, file and steps of every golden."""
    for name in SAMPLERS:
        for beta in BETAS:
            for spacing in SPACINGS:
                for prediction in PREDICTIONS:
                    for steps in STEPS:
                        yield name, file(beta, spacing, prediction), steps
    for name in GROWING + KEEPING:
        for ramp in RAMPS:
            for spacing in SPACINGS if name in GROWING else SPACINGS[:1]:
                for prediction in PREDICTIONS:
                    for steps in STEPS:
                        yield f"{name}_{ramp}", file("scaled_linear", spacing, prediction), steps
            for beta in ("linear", "cosine"):
                yield f"{name}_{ramp}", file(beta), 20
            yield f"{name}_{ramp}", file(sigma_min=0.05, sigma_max=9.0, final_sigmas_type="sigma_min"), 20
    for name in SAMPLERS:
        for steps in EDGE_STEPS:
            for spacing in SPACINGS:
                if steps == 61 and spacing == "trailing" and name in BY_TABLE:
                    continue
                yield name, file(spacing=spacing), steps
        # Zero terminal signal-to-noise ratio.
        for prediction in ("v_prediction", "epsilon"):
            for spacing in SPACINGS:
                for steps in STEPS:
                    yield name, file("scaled_linear", spacing, prediction, rescale_betas_zero_snr=True), steps
        for beta in BETAS:
            yield name, file(beta, "trailing", "v_prediction", rescale_betas_zero_snr=True), 20
        # A file that says next to nothing: the class's defaults.
        for steps in (4, 20):
            yield name, {"_class_name": "DDIMScheduler"}, steps
            yield None, {"_class_name": SAMPLERS[name][0]}, steps
        trained = [0.0001 + 0.0002 * i for i in range(50)]
        for spacing in SPACINGS:
            fields = {"trained_betas": trained, "num_train_timesteps": 50, "steps_offset": 0}
            yield name, file(spacing=spacing, **fields), 12
    yield from special()


def special():
    """Fields that single classes have."""
    for spacing in SPACINGS:
        for prediction in PREDICTIONS:
            for fields in (
                {"clip_sample": True, "clip_sample_range": 0.7},
                {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
                {"set_alpha_to_one": True, "steps_offset": 0},
            ):
                for name in ("ddim", "heun", "dpmpp_2m", "dpmpp_2s", "unipc", "deis", "ddpm", "lcm", "tcd"):
                    yield name, file(spacing=spacing, prediction=prediction, **fields), 20
            for steps in (4, 5, 20):
                yield "pndm", file(spacing=spacing, prediction=prediction, skip_prk_steps=False), steps
            yield "pndm", file(spacing=spacing, prediction=prediction, set_alpha_to_one=True), 20
    yield "pndm", file(skip_prk_steps=False), 3
    for fields in (
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    ):
        for prediction in PREDICTIONS:
            for steps in (4, 20):
                yield "euler", file(prediction=prediction, **fields), steps
                yield None, {**file(prediction=prediction, **fields), "_class_name": "EulerDiscreteScheduler"}, steps
    yield "euler", file(prediction="original_sample"), 20
    # Fields of a file outlive the name of another sampler.
    yield "dpmpp_2m", file(use_karras_sigmas=True, sigma_min=0.05), 20
    yield "dpmpp_2m_exponential", file(use_karras_sigmas=True), 20
    yield "dpmpp_2m", file(solver_type="logrho"), 20
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"):
        for order in (1, 2, 3):
            for kind in ("midpoint", "heun"):
                for end in ("zero", "sigma_min"):
                    fields = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
                    fields["final_sigmas_type"] = end
                    for steps in (4, 20):
                        config = file(prediction="v_prediction", _class_name="DPMSolverMultistepScheduler", **fields)
                        yield None, config, steps
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"):
        for order in (1, 2, 3):
            for kind in ("midpoint", "heun"):
                for end in ("zero", "sigma_min"):
                    for lower in (True, False):
                        fields = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
                        fields |= {"final_sigmas_type": end, "lower_order_final": lower}
                        yield "dpmpp_2s", file(prediction="v_prediction", **fields), 11
                        yield "dpmpp_2s", file(prediction="v_prediction", **fields), 12
    for order in (1, 2, 3):
        for kind in ("bh1", "bh2"):
            for end in ("zero", "sigma_min"):
                for lower in (True, False):
                    for fields in ({}, {"predict_x0": False}, {"disable_corrector": [0, 2, 3]}):
                        fields = {**fields, "solver_order": order, "solver_type": kind}
                        fields |= {"final_sigmas_type": end, "lower_order_final": lower}
                        yield "unipc", file(prediction="v_prediction", **fields), 12
        for lower in (True, False):
            for steps in (4, 12, 20):
                fields = {"solver_order": order, "lower_order_final": lower}
                yield "deis", file(prediction="v_prediction", **fields), steps
    for variance in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned"):
        yield "ddpm", file(variance_type=variance), 20
    for schedule in ("laplace", "sigmoid", "exp"):
        for name in ("ddpm", "heun"):
            yield name, file(beta_schedule=schedule, clip_sample=True), 20
    for fields in ({"original_inference_steps": 100}, {"original_inference_steps": 30}, {"timestep_scaling": 3.0}):
        for name in ("lcm", "tcd"):
            for steps in (3, 8, 31):
                yield name, file(prediction="v_prediction", **fields), steps
    for prediction in PREDICTIONS:
        for fields in (
            {"use_lu_lambdas": True},
            {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False},
            {"lambda_min_clipped": -2.0},
            {"lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
            {"thresholding": True, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        ):
            for steps in (4, 20):
                yield "dpmpp_2m", file(prediction=prediction, **fields), steps


def number(value):
    """Six digits are enough for a tolerance of 1e-5."""
    return float(f"{float(value):.6g}")


def golden(cases, base={}):
    """The goldens of some cases, a text of JSON. Of a file, what is not as in `base` is written down."""
    configs, timesteps, rows = [], [], []

    places = {}

    def index(of, item):
        key = (id(of), json.dumps(item))
        if key not in places:
            places[key] = len(of)
            of.append(item)
        return places[key]

    for count, (name, config, steps) in enumerate(dict.fromkeys((n, json.dumps(c), s) for n, c, s in cases)):
        seed = 1000 + count
        written = {k: v for k, v in json.loads(config).items() if k not in base or base[k] != v}
        row = [name, index(configs, written), steps, seed]
        try:
            seen, scale, x = loop(name, json.loads(config), steps, seed)
            finite = bool(torch.isfinite(x).all())
        except Exception as error:  # noqa: BLE001: whatever it is, it is the golden.
            row.append(type(error).__name__)
        else:
            if finite:
                weights = torch.arange(x.numel(), dtype=torch.float64) % 7 - 3
                x = x.double()
                row += [index(timesteps, seen), number(scale), number(x.square().mean().sqrt())]
                row += [number((x * weights).mean()), [number(v) for v in x[[0, 21, 42, 63]]]]
            else:
                row.append("NaN")
        rows.append(row)

    def lines(items):
        return ",\n".join(json.dumps(i, separators=(",", ":")) for i in items)

    failed = sum(isinstance(r[4], str) for r in rows)
    print(f"{len(rows)} goldens, {failed} of them failures")
    shared = f'"base":{json.dumps(base, separators=(",", ":"))},\n' if base else ""
    return (
        f'{{"diffusers":"{diffusers.__version__}","torch":"{torch.__version__.split("+")[0]}",\n'
        f'{shared}"configs":[\n{lines(configs)}\n],\n"timesteps":[\n{lines(timesteps)}\n],\n"cases":[\n{lines(rows)}\n]}}\n'
    )


def main():
    torch.set_num_threads(1)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(golden(cases()))


if __name__ == "__main__":
    main()
