"""One rival in a process of its own: builds its network once, then times it whenever it is asked.

It is started by `run` with its task as JSON in the first argument. It says `{"ready": ...}` on standard output once built and warm, and answers every
line `{"passes": N}` with `{"samples": [seconds, ...]}`. It measures nothing of HyperGen.
"""

import dataclasses
import io
import json
import os
import resource
import sys
import time
from pathlib import Path

# The channel to `run`: libraries print what they like, even while they are imported, so they get standard error instead.
CHANNEL = sys.stdout
if __name__ == "__main__":
    CHANNEL = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fidelity"))
import shapes  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def shrink(task: dict) -> None:
    """Networks of a few megabytes under the same names: they show whether everything runs, and nothing about speed."""
    shapes.UNET_1.update(block_out_channels=(32, 64, 64, 64))
    shapes.UNET_XL.update(block_out_channels=(32, 64, 64), attention_head_dim=[1, 2, 2], transformer_layers_per_block=[1, 1, 1])
    for vae in (shapes.VAE, shapes.VAE_XL):
        vae.update(block_out_channels=(32, 32, 32, 32))
    for text in (shapes.CLIP_L, shapes.CLIP_G):
        text.update(num_hidden_layers=2)
    task["side"] = 16


def network(build, prefix: str, task: dict) -> torch.nn.Module:
    """A network of random weights in the task's number type and layout."""
    with torch.device("meta"):
        module = build().to(DTYPES[task["dtype"]])
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    shapes.fill(module, prefix)
    return module.to(memory_format=torch.channels_last) if task.get("channels_last") else module


def unet_of(task: dict) -> torch.nn.Module:
    return network(lambda: UNet2DConditionModel(**(shapes.UNET_XL if task["xl"] else shapes.UNET_1)), "unet", task)


def vae_of(task: dict) -> torch.nn.Module:
    return network(lambda: AutoencoderKL(**(shapes.VAE_XL if task["xl"] else shapes.VAE)), "vae", task)


def latents(task: dict, batch: int) -> torch.Tensor:
    """Noise of `side` x `side` latent pixels in the network's layout."""
    x = torch.randn(batch, 4, task["side"], task["side"], dtype=DTYPES[task["dtype"]])
    return x.contiguous(memory_format=torch.channels_last) if task.get("channels_last") else x


def conditions(task: dict, batch: int) -> tuple[torch.Tensor, dict | None]:
    """Random text embeddings, and what SDXL's networks take beside them."""
    dtype = DTYPES[task["dtype"]]
    text = torch.randn(batch, 77, 2048 if task["xl"] else 768, dtype=dtype)
    added = {"text_embeds": torch.randn(batch, 1280, dtype=dtype), "time_ids": torch.full((batch, 6), 512.0, dtype=dtype)}
    return text, added if task["xl"] else None


def png_of(picture) -> bytes:
    """PNG bytes of a `1, 3, height, width` array of -1 to 1, by Pillow as diffusers does it."""
    from PIL import Image

    pixels = ((torch.as_tensor(picture).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def diffusers_unet(task: dict):
    unet = unet_of(task)
    if task.get("compile"):
        from torch._inductor import config as inductor

        inductor.freezing = True
        unet = torch.compile(unet)
    x, t = latents(task, 2), torch.tensor(500)
    text, added = conditions(task, 2)
    return lambda: unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)


def diffusers_vae(task: dict):
    vae, z = vae_of(task), latents(task, 1)
    return lambda: vae.decode(z, return_dict=False)


def diffusers_turbo(task: dict):
    """Both text encoders, one pass, decoding and the PNG. Token numbers are given: tokenising takes no time that counts."""
    encoders = []
    for i, (text, cls) in enumerate(((shapes.CLIP_L, CLIPTextModel), (shapes.CLIP_G, CLIPTextModelWithProjection))):
        config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, eos_token_id=2, bos_token_id=0, pad_token_id=1, **text)
        # Built in memory rather than on the meta device, because its buffers hold position numbers.
        encoder = cls(config).to(DTYPES[task["dtype"]]).eval()
        shapes.fill(encoder, "text_encoder_2" if i else "text_encoder")
        encoders.append(encoder)
    unet, vae = unet_of(task), vae_of(task)
    tokens, t = torch.randint(0, 49000, (1, 77)), torch.tensor(999)
    _, added = conditions(task, 1)

    def draw() -> bytes:
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        text = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        noise = latents(task, 1)
        predicted = unet(noise, t, text, added_cond_kwargs={**added, "text_embeds": outputs[1].text_embeds}, return_dict=False)[0]
        return png_of(vae.decode(noise - predicted, return_dict=False)[0])

    return draw


class PlainUnet(torch.nn.Module):
    """A UNet whose arguments are tensors only, as the converter wants them."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, text, embeds=None, ids=None):
        added = None if embeds is None else {"text_embeds": embeds, "time_ids": ids}
        return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


class PlainDecoder(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z, return_dict=False)[0]


def convert(module: torch.nn.Module, inputs: tuple, file: Path) -> None:
    """Writes the module for static shapes. OpenVINO stores float16 weights by default, and computes in what the hint says."""
    import openvino

    with torch.no_grad():
        graph = openvino.convert_model(module, example_input=inputs, input=[openvino.PartialShape(list(i.shape)) for i in inputs])
    file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(graph, file, compress_to_fp16=True)


def openvino_inputs(task: dict, part: str) -> tuple:
    task = {**task, "dtype": "float32", "channels_last": False}
    if part == "vae":
        return (latents(task, 1),)
    text, added = conditions(task, task["batch"])
    return (latents(task, task["batch"]), torch.tensor(500), text, *(added or {}).values())


def openvino_convert(task: dict) -> None:
    """A process of its own does this, so that the float32 weights are gone before anything is timed."""
    plain = {**task, "dtype": "float32", "channels_last": False}
    for part in task["parts"]:
        module = PlainDecoder(vae_of(plain)) if part == "vae" else PlainUnet(unet_of(plain))
        convert(module.eval(), openvino_inputs(task, part), Path(task["folder"]) / f"{part}.xml")
        del module


def openvino_parts(task: dict):
    """UNet, decoder, or one after the other and the PNG. The text encoders are not included, to OpenVINO's advantage."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[task["dtype"]], "PERFORMANCE_HINT": "LATENCY",
             "INFERENCE_NUM_THREADS": task["threads"]}
    core, requests = openvino.Core(), {}
    for part in task["parts"]:
        requests[part] = core.compile_model(str(Path(task["folder"]) / f"{part}.xml"), "CPU", hints).create_infer_request()
    inputs = {part: [i.numpy() for i in openvino_inputs(task, part)] for part in task["parts"]}
    if task["parts"] != ["unet", "vae"]:
        part = task["parts"][0]
        return lambda: requests[part].infer(inputs[part])

    def draw() -> bytes:
        predicted = requests["unet"].infer(inputs["unet"])[0]
        return png_of(requests["vae"].infer([inputs["unet"][0] - predicted])[0])

    return draw


def write_sdxl(task: dict) -> None:
    """An SDXL folder of random float16 weights, the type in which such models are published."""
    family = shapes.BY_NAME["sdxl"]
    # `shapes` builds in the default type; a family holds its own copies of what `shrink` may have changed.
    family = dataclasses.replace(family, unet=shapes.UNET_XL, vae=shapes.VAE_XL, text=(shapes.CLIP_L, shapes.CLIP_G))
    torch.set_default_dtype(torch.float16)
    print(shapes.write(family, Path(task["folder"])))


def load(task: dict) -> dict:
    """diffusers' own loading with its defaults, once: the peak of memory belongs to a fresh process."""
    from diffusers import StableDiffusionXLPipeline

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    pipeline = StableDiffusionXLPipeline.from_pretrained(task["folder"], torch_dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    assert pipeline.unet.dtype == torch.bfloat16
    return {"load_s": seconds, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "rss_before_bytes": before}


TIMED = {"diffusers_unet": diffusers_unet, "diffusers_vae": diffusers_vae, "diffusers_turbo": diffusers_turbo, "openvino": openvino_parts}
ONCE = {"openvino_convert": openvino_convert, "write_sdxl": write_sdxl, "load": load}


def say(message: dict) -> None:
    CHANNEL.write(json.dumps(message) + "\n")


def serve(work) -> None:
    for line in sys.stdin:
        samples = []
        for _ in range(json.loads(line)["passes"]):
            start = time.perf_counter()
            work()
            samples.append(time.perf_counter() - start)
        say({"samples": samples})


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(task["threads"])
    if task.get("tiny"):
        shrink(task)
    kind = task["kind"]
    if kind in ONCE:
        say(ONCE[kind](task) or {"done": True})
        return
    start = time.perf_counter()
    with torch.inference_mode():
        work = TIMED[kind](task)
        for _ in range(task.get("warm", 2)):
            work()
        say({"ready": True, "build_s": time.perf_counter() - start, "capability": torch.backends.cpu.get_cpu_capability()})
        serve(work)


if __name__ == "__main__":
    main()
