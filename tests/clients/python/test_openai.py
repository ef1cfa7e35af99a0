"""What people do with OpenAI's Python package besides the examples, and what
its exception classes make of our errors."""

import asyncio
import base64
import io

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

FAST = {"num_inference_steps": 2}


def test_forms(client):
    both = client.images.generate(prompt="red apple", size="auto", extra_body=FAST)
    assert both.data[0].url and both.data[0].b64_json
    link = client.images.generate(prompt="red apple", size="auto", response_format="url", extra_body=FAST)
    assert link.data[0].url and link.data[0].b64_json is None
    data = client.images.generate(prompt="red apple", size="auto", response_format="b64_json", extra_body=FAST)
    assert data.data[0].b64_json and data.data[0].url is None
    assert data.data[0].revised_prompt == "red apple"
    gpt = client.images.generate(model="gpt-image-1", prompt="red apple", size="auto", quality="low", extra_body=FAST)
    assert gpt.data[0].b64_json and gpt.data[0].url is None


def test_every_parameter_of_the_package_is_taken(client):
    answer = client.images.generate(
        prompt="red apple",
        model="dall-e-3",
        n=2,
        size="512x512",
        quality="hd",
        style="vivid",
        background="opaque",
        moderation="low",
        user="someone",
        output_format="jpeg",
        output_compression=70,
        response_format="b64_json",
        extra_body={"negative_prompt": "blue", "seed": 7, "guidance_scale": 3.0, **FAST},
    )
    for i, data in enumerate(answer.data):
        image = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
        assert (image.format, image.size) == ("JPEG", (512, 512))
        assert data.seed == 7 + i


@pytest.mark.parametrize("name, kind", [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_are_read_by_others(client, name, kind):
    answer = client.images.generate(
        prompt="red apple", size="256x256", output_format=name, response_format="b64_json", extra_body=FAST
    )
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    image.load()
    assert (image.format, image.size) == (kind, (256, 256))


def test_seeds_are_exact(client):
    seed = 2**64 - 1
    answer = client.images.generate(prompt="x", size="auto", n=2, extra_body={"seed": seed, **FAST})
    assert [data.seed for data in answer.data] == [seed, 0]


def test_models(client, server):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == server.health()["model"]
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("dall-e-3")
    assert error.value.code == "model_not_found"


def test_errors_are_the_packages_own(client, server):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt="x", n=11)
    assert (error.value.param, error.value.type) == ("n", "invalid_request_error")
    assert "between 1 and 10" in error.value.message
    assert error.value.request_id.startswith("req-")
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="", size="auto")
    with pytest.raises(openai.AuthenticationError) as error:
        OpenAI(api_key="sk-wrong", base_url=server.url + "/v1").images.generate(prompt="x")
    assert error.value.code == "invalid_api_key"
    with pytest.raises(openai.InternalServerError) as error:
        client.images.generate(prompt="x", extra_body={"lora_path": "/no/such.safetensors"})
    assert error.value.type == "internal_error"
    with pytest.raises(openai.NotFoundError):
        client.images.edit(image=b"x", prompt="x")


def test_a_long_prompt_warns(client):
    answer = client.images.with_raw_response.generate(prompt="red apple " * 500, size="auto", extra_body=FAST)
    assert answer.headers["x-hypergen-warning"].isascii()
    assert answer.headers["x-request-id"]


def test_many_at_once_get_their_own(server):
    async def ask():
        async with AsyncOpenAI(api_key=server.key, base_url=server.url + "/v1", max_retries=0, timeout=300) as client:
            requests = [
                client.images.generate(prompt=f"number {i}", size="auto", extra_body={"seed": i % 4, **FAST})
                for i in range(24)
            ]
            return await asyncio.gather(*requests)

    answers = asyncio.run(ask())
    for i, answer in enumerate(answers):
        assert (answer.data[0].revised_prompt, answer.data[0].seed) == (f"number {i}", i % 4)
    alone = server.post(prompt="number 5", size="auto", seed=1, **FAST).json()
    assert answers[5].data[0].b64_json == alone["data"][0]["b64_json"]
