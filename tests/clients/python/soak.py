"""Many clients for a long time: nobody's request is lost, nobody gets another's
picture or two, the queue keeps its bound, and memory stays flat.

python soak.py --clients 64 --seconds 600   (HYPERGEN_PROGRAM names the program)

Some clients leave in mid-generation, at random. The last line is one JSON
object with all that was counted."""

import argparse
import asyncio
import base64
import hashlib
import json
import random
import statistics
import time

from hypergen import serving
from openai import APIConnectionError, APIStatusError, AsyncOpenAI


class Counts:
    def __init__(self):
        self.sent = self.answered = self.left = self.full = 0
        self.lost, self.wrong = [], []
        self.hashes = {}
        self.seconds = []


async def client_loop(server, number, until, counts):
    """One client: asks again and again, and leaves now and then."""
    rng = random.Random(number)
    async with AsyncOpenAI(api_key=server.key, base_url=server.url + "/v1", max_retries=0, timeout=600) as client:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            seed, steps = rng.randrange(8), rng.choice([1, 2, 4])
            prompt = f"client {number}, turn {turn}" if rng.random() < 0.5 else "red apple"
            form = rng.choice(["b64_json", "b64_json", "url"])
            request = client.images.generate(
                prompt=prompt, size="auto", response_format=form, n=rng.choice([1, 1, 1, 2]),
                extra_body={"seed": seed, "num_inference_steps": steps},
            )
            counts.sent += 1
            start = time.monotonic()
            try:
                patience = rng.random() * 2 if rng.random() < 0.1 else None
                answer = await asyncio.wait_for(request, patience)
            except (TimeoutError, asyncio.TimeoutError):
                counts.left += 1
                continue
            except APIStatusError as error:
                if error.status_code == 429:
                    counts.full += 1
                    await asyncio.sleep(min(float(error.response.headers["retry-after"]), 2) * rng.random())
                else:
                    counts.lost.append(f"{error.status_code} {error.message}")
                continue
            except APIConnectionError as error:
                counts.lost.append(repr(error))
                continue
            counts.answered += 1
            counts.seconds.append(time.monotonic() - start)
            check(counts, answer, prompt, seed, steps, form)


def check(counts, answer, prompt, seed, steps, form):
    for i, data in enumerate(answer.data):
        if data.revised_prompt != prompt or data.seed != seed + i:
            counts.wrong.append(f"asked for {prompt} {seed + i}, got {data.revised_prompt} {data.seed}")
        if form == "b64_json" and prompt == "red apple":
            digest = hashlib.sha256(base64.b64decode(data.b64_json)).hexdigest()
            if counts.hashes.setdefault((seed + i, steps), digest) != digest:
                counts.wrong.append(f"another picture for seed {seed + i}, {steps} steps")


async def watch(server, until, bound, samples):
    while time.monotonic() < until:
        health = await asyncio.to_thread(server.health)
        memory = await asyncio.to_thread(server.metric, "process_resident_memory_bytes")
        samples.append((health["queue_size"], health["in_progress"], memory))
        assert health["queue_size"] <= bound, health
        await asyncio.sleep(1)


async def soak(server, clients, seconds, bound):
    counts, samples = Counts(), []
    until = time.monotonic() + seconds
    loops = [client_loop(server, number, until, counts) for number in range(clients)]
    await asyncio.gather(watch(server, until, bound, samples), *loops)
    return counts, samples


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-queue-size", type=int, default=48)
    parser.add_argument("--max-batch-size", type=int, default=2)
    args = parser.parse_args()
    options = ["--max-queue-size", str(args.max_queue_size), "--max-batch-size", str(args.max_batch_size),
               "--image-store-size", "1MiB", "--log-level", "warn,hypergen_server=info"]
    with serving(*options) as server:
        counts, samples = asyncio.run(soak(server, args.clients, args.seconds, args.max_queue_size))
        server.until("quiet", lambda health: health["queue_size"] == health["in_progress"] == 0)
        line = 'hypergen_requests_total{route="/v1/images/generations",status="%d"}'
        ok, full, left = (server.metric(line % status) for status in (200, 429, 499))
        failed = [text for text in server.get("/metrics").text.splitlines()
                  if text.startswith("hypergen_requests_total") and 'status="5' in text]
        store = server.metric("hypergen_image_store_bytes")
    memory = [sample[2] for sample in samples]
    # The first quarter fills caches and pools; after it nothing may grow.
    settled = memory[len(memory) // 4 :] or memory
    before, after = settled[: len(settled) // 3] or settled, settled[-(len(settled) // 3) or None :]
    report = {
        "clients": args.clients, "seconds": args.seconds, "sent": counts.sent, "answered": counts.answered,
        "left": counts.left, "full": counts.full, "lost": counts.lost[:5], "wrong": counts.wrong[:5],
        "server_200": ok, "server_429": full, "server_499": left, "server_5xx": failed,
        "queue_max": max(sample[0] for sample in samples), "queue_bound": args.max_queue_size,
        "in_progress_max": max(sample[1] for sample in samples), "image_store_bytes": store,
        "memory_mib": [round(statistics.median(part) / 2**20, 1) for part in (before, after)],
        "memory_max_mib": round(max(memory) / 2**20, 1),
        "answer_seconds_median": round(statistics.median(counts.seconds or [0]), 2),
    }
    print(json.dumps(report))
    assert not counts.lost and not counts.wrong and not failed, "lost or wrong answers"
    assert counts.sent == counts.answered + counts.left + counts.full
    # The server may have answered a client that left as its answer arrived.
    assert counts.answered <= ok <= counts.answered + counts.left, "each is answered once"
    assert counts.full <= full <= counts.full + counts.left, "each is refused once"
    assert ok + full + left <= counts.sent, "nobody is answered twice"
    assert store <= 2**20
    if args.seconds >= 60:
        assert statistics.median(after) < statistics.median(before) * 1.05 + 8 * 2**20, "memory grows"


if __name__ == "__main__":
    main()
