"""Requests that differ share forward passes, join at any step, and get the
pictures that they would get alone."""

from concurrent.futures import ThreadPoolExecutor

from hypergen import serving

LONG = {"prompt": "red apple", "seed": 1, "num_inference_steps": 50, "sampler": "dpmpp_2m", "guidance_scale": 7.5}
SHORT = {"prompt": "a fox in a long sentence", "seed": 2, "num_inference_steps": 4, "sampler": "euler_a", "guidance_scale": 1}
PASSES = "hypergen_batch_size_count"
ALONE = 'hypergen_batch_size_bucket{le="1.0"}'


def draw(server, body):
    answer = server.post(size="auto", response_format="b64_json", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def test_requests_of_4_and_50_steps_share_passes_and_keep_their_bytes():
    with serving("--max-batch-size", "1") as server:
        alone = [draw(server, LONG), draw(server, SHORT)]
        assert server.metric(PASSES) == server.metric(ALONE) == 54
    with serving("--max-batch-size", "2") as server, ThreadPoolExecutor() as clients:
        long = clients.submit(draw, server, LONG)
        server.until("the long one is being drawn", lambda health: health["in_progress"] == 1)
        short = clients.submit(draw, server, SHORT)
        assert short.result() == alone[1]
        assert not long.done(), "4 steps waited for 50"
        assert long.result() == alone[0]
        assert (server.metric(PASSES), server.metric(ALONE)) == (50, 46)
