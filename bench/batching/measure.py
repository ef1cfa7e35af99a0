"""What `--max-batch-size` brings under mixed load: long and short requests arrive at
fixed times, and each program answers the same ones, in turns.

    python bench/batching/measure.py --batch 4 NAME=PROGRAM [NAME=PROGRAM ...] [--model FOLDER]

A program may be given several times under different names with its own batch size, as
NAME=PROGRAM@SIZE. It needs nothing but Python. The result, raw times included, is one JSON
file in bench/results/ if --save is given.
"""

import argparse
import datetime
import hashlib
import json
import pathlib
import platform
import socket
import statistics
import subprocess
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


class Server:
    """The program with a queue of its own, until it is closed."""

    def __init__(self, program, batch, model):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [program, "serve", "--port", str(self.port), "--max-batch-size", str(batch)]
        command += ["--model", model] if model else []
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").read()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise SystemExit(f"{program} does not serve") from None
                time.sleep(0.05)

    def draw(self, body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/images/generations", data, {"content-type": "application/json"}
        )
        start = time.monotonic()
        answer = json.load(urllib.request.urlopen(request))
        seconds = time.monotonic() - start
        return seconds, hashlib.sha256(answer["data"][0]["b64_json"].encode()).hexdigest()

    def metric(self, name):
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(name + " "))

    def close(self):
        self.process.terminate()
        self.process.wait()


def mix(args):
    """One long request for every few short ones, spread over the time; (arrival, kind, body)."""
    requests = []
    for i in range(args.requests):
        long = i % args.one_long_in == 0
        requests.append((i * args.every, "long" if long else "short", {
            "prompt": f"red apple {i}", "size": args.size, "seed": i, "response_format": "b64_json",
            "num_inference_steps": args.long if long else args.short,
            "sampler": "dpmpp_2m" if long else "euler",
        }))
    return requests


def run(server, requests):
    """Latency and picture of each request, and the time until the last one had its answer."""
    results = [None] * len(requests)

    def client(index, body):
        results[index] = server.draw(body)

    threads = []
    start = time.monotonic()
    for index, (arrival, _, body) in enumerate(requests):
        time.sleep(max(0, start + arrival - time.monotonic()))
        threads.append(threading.Thread(target=client, args=(index, body)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return results, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="+", metavar="NAME=PROGRAM[@SIZE]")
    parser.add_argument("--batch", type=int, default=4, help="--max-batch-size where a program has no @SIZE")
    parser.add_argument("--model", help="the checkpoint (default: the embedded model)")
    parser.add_argument("--size", default="auto")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--one-long-in", type=int, default=4, help="every which request is a long one")
    parser.add_argument("--long", type=int, default=50, help="steps of a long request")
    parser.add_argument("--short", type=int, default=4, help="steps of a short request")
    parser.add_argument("--every", type=float, default=0.3, help="seconds between two arrivals")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    requests = mix(args)
    runs, pictures = {}, set()
    for round_ in range(args.rounds + 1):
        for program in args.programs:
            name, _, path = program.partition("=")
            path, _, size = path.partition("@")
            server = Server(path, int(size or args.batch), args.model)
            try:
                server.draw({**requests[0][2], "num_inference_steps": 1})
                results, total = run(server, requests)
                passes = server.metric("hypergen_batch_size_count")
            finally:
                server.close()
            pictures.add(tuple(picture for _, picture in results))
            # The first round warms the disk's cache and the processor.
            if round_ > 0:
                runs.setdefault(name, []).append(
                    {"seconds": [seconds for seconds, _ in results], "total": total, "batches": passes}
                )
    kinds = [kind for _, kind, _ in requests]
    summary = {}
    for name, rounds in runs.items():
        def mean(wanted, rounds=rounds):
            means = [
                statistics.mean(s for s, kind in zip(r["seconds"], kinds) if kind in wanted) for r in rounds
            ]
            return round(statistics.median(means), 3)

        summary[name] = {
            "mean_latency": mean({"short", "long"}), "short": mean({"short"}), "long": mean({"long"}),
            "pictures_per_second": round(len(requests) / statistics.median(r["total"] for r in rounds), 3),
        }
    report = {
        "date": datetime.date.today().isoformat(), "processor": processor(), "arguments": vars(args),
        "same_pictures_everywhere": len(pictures) == 1, "summary": summary, "runs": runs,
    }
    print(json.dumps({key: report[key] for key in ("processor", "same_pictures_everywhere", "summary")}, indent=1))
    if args.save:
        slug = "-".join(processor().replace("(", " ").replace(")", " ").split()[:4])
        path = ROOT / "bench" / "results" / f"{report['date']}-batching-{slug}.json"
        report["arguments"]["programs"] = [program.partition("=")[0] for program in args.programs]
        path.write_text(json.dumps(report) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
