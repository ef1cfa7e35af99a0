"""The specification's examples, word for word from examples/. Only the address
is another one: a test cannot count on port 8000 being free."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, server, folder, after=""):
    """Runs an example in a folder and returns what it printed."""
    text = (EXAMPLES / name).read_text()
    assert text.count("http://localhost:8000") >= 1
    path = folder / name
    path.write_text(text.replace("http://localhost:8000", server.url) + after)
    command = [sys.executable, str(path)] if path.suffix == ".py" else ["bash", str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(data):
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def test_basic_request(server, tmp_path):
    body = json.loads(run("basic.sh", server, tmp_path))
    assert isinstance(body["created"], int)
    (data,) = body["data"]
    assert data["revised_prompt"] == "A cat holding a sign that says Hello World"
    assert data["b64_json"].startswith("iVBORw0KGgoAAAANSUhEUgAA")
    image = picture(data["b64_json"])
    assert (image.format, image.size, image.mode) == ("PNG", (1024, 1024), "RGB")


def test_advanced_request_with_all_parameters(server, tmp_path):
    body = json.loads(run("advanced.sh", server, tmp_path))
    assert [data["seed"] for data in body["data"]] == [42, 43]
    for data in body["data"]:
        assert "url" not in data
        image = picture(data["b64_json"])
        assert image.size == (1024, 768)
        parameters = image.text["parameters"]
        assert parameters.startswith("A futuristic cityscape at sunset")
        assert "Negative prompt: blurry, low quality, distorted, watermark" in parameters
        assert re.search(rf"Steps: 50, .*CFG scale: 7.5, Seed: {data['seed']}, Size: 1024x768", parameters)


def test_openai_python_client(server, tmp_path):
    url = run("openai_client.py", server, tmp_path).strip()
    assert url.startswith(server.url + "/images/")
    answer = requests.get(url, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (1024, 1024)


def test_batch_generation(server, tmp_path):
    run("batch.py", server, tmp_path)
    pictures = [Image.open(tmp_path / f"landscape_{i}.png") for i in range(4)]
    assert [image.size for image in pictures] == [(1024, 1024)] * 4
    assert len({image.tobytes() for image in pictures}) == 4, "variations differ"


def test_reproducible_generation(server, tmp_path):
    after = """
one, two = (r.json()["data"][0]["b64_json"] for r in (response1, response2))
print(one == two, len(one))
"""
    same, length = run("reproducible.py", server, tmp_path, after).split()
    assert same == "True" and int(length) > 1000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Your detailed prompt here", "size": "1024x1024", "num_inference_steps": 40, "guidance_scale": 7.5},
        {"prompt": "Your prompt here", "size": "1024x1024", "num_inference_steps": 4, "guidance_scale": 1.0},
        {"prompt": "Your detailed prompt here", "size": "512x512", "num_inference_steps": 30, "guidance_scale": 7.5},
    ],
)
def test_model_specific_recommendations(server, body):
    answer = server.post(**body)
    assert answer.status_code == 200
    image = picture(answer.json()["data"][0]["b64_json"])
    assert "{}x{}".format(*image.size) == body["size"]


@pytest.mark.parametrize("size", ["512x512", "768x768", "1024x1024", "1024x768", "768x1024", "1920x1080", "2048x2048", "520x72"])
def test_every_size_that_is_named(server, size):
    answer = server.post(prompt="a red apple", size=size, num_inference_steps=2, response_format="b64_json")
    image = picture(answer.json()["data"][0]["b64_json"])
    assert "{}x{}".format(*image.size) == size


def test_400(server):
    answer = server.post(prompt="a red apple", size="1000*1000")
    assert answer.status_code == 400
    assert answer.json()["detail"] == "Invalid size format: 1000*1000. Use format like '1024x1024'"
    for bad in ({"size": "100x100"}, {"n": 0}, {"n": 11}, {"n": "two"}, {"guidance_scale": "strong"}):
        answer = server.post(**{"prompt": "a red apple", **bad})
        assert answer.status_code == 400, bad
        assert answer.json()["error"]["param"] in bad


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-hypergen-123456"}])
def test_401(server, headers):
    url = server.url + "/v1/images/generations"
    answer = requests.post(url, json={"prompt": "a red apple"}, headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.json()["detail"] == "Invalid API key"


def test_500(server):
    answer = server.post(prompt="a red apple", lora_path="/path/to/custom_lora.safetensors")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "internal_error"


def test_queue_is_visible(server):
    health = server.health()
    assert health["status"] == "ok"
    assert (health["queue_size"], health["max_queue_size"]) == (0, 100)
