"""Ten thousand requests that nobody should send: truncated, huge, of wrong
types, in no encoding, slow. None is answered with a 5xx, and it serves on."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

from hypergen import serving

REQUESTS = 10_000
GOOD = {"prompt": "x", "n": 1, "size": "64x64", "quality": "hd", "response_format": "url", "negative_prompt": "y",
        "num_inference_steps": 1, "guidance_scale": 7.5, "seed": 1, "lora_scale": 1.0, "output_format": "png",
        "output_compression": 50, "sampler": "ddim", "model": "m"}
WRONG = [None, True, False, 0, -1, 11, 1.5, 1e308, -0.0, 2**64, 2**70, "", "x", "\x00", "é" * 1000, [], [1], {}, {"a": []},
         "NaN", "1024", "8x", "x8", "100x100", "4104x8", "99999999999999999999x8"]
HEAD = ("POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-hypergen-123456\r\n"
        "Content-Type: application/json\r\n")


def bad_type(rng):
    """One wrong value: certain to be refused."""
    certain = {"prompt": [1, True, [], {}, ""], "n": [0, 11, 1.5, "x", True, [], 2**70], "size": ["8x", 5, [], "100x100"],
               "seed": [-1, 2**64, 0.5, "1", True], "guidance_scale": [0, 21, "x", True, []],
               "num_inference_steps": [0, 151, {}, "5"], "output_format": ["gif", 1], "quality": ["best", 0]}
    field = rng.choice(list(certain))
    return json.dumps({**GOOD, field: rng.choice(certain[field])}).encode()


def truncated(rng):
    body = json.dumps(GOOD).encode()
    return body[: rng.randrange(len(body))]


def bytes_changed(rng):
    body = bytearray(json.dumps(GOOD).encode())
    body[rng.randrange(9)] = rng.choice(b"\xff\xfe\x00\xc3}")
    return bytes(body)


def noise(rng):
    return rng.randbytes(rng.randrange(200))


def deep(rng):
    return (b"[" if rng.random() < 0.5 else b'{"a":') * rng.randrange(1, 20_000)


def huge(rng):
    return b'{"prompt": "' + b"x" * (1_200_000 + rng.randrange(1000)) + b'"}'


def exchange(address, data, half=False, cut=None):
    """Sends bytes on a connection of their own; the status, or None where the server only closes."""
    with socket.create_connection(address, timeout=120) as connection:
        try:
            if cut:
                connection.sendall(data[:cut])
                return None
            connection.sendall(data)
            if half:
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            # The server had heard enough: reset, or no longer connected.
            return None
    if not answer:
        return None
    assert answer.startswith(b"HTTP/1.1 "), answer[:50]
    return int(answer.split()[1])


def one(address, number):
    rng = random.Random(number)
    kinds = [bad_type, truncated, bytes_changed, noise, deep]
    body = (huge if number % 200 == 0 else rng.choice(kinds))(rng)
    way = rng.random()
    head = HEAD.encode()
    if way < 0.70:
        data = head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        status = exchange(address, data)
        assert status in (400, 413), (status, body[:200])
    elif way < 0.80:
        # Chunks, some of which are none.
        size = rng.choice([b"%x" % len(body), b"%x" % (len(body) + 7), b"zz", b"-1", b"ffffffffffffffffff"])
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + body + b"\r\n0\r\n\r\n"
        status = exchange(address, data, half=True)
    elif way < 0.90:
        # A body that ends before its length says.
        data = head + b"Content-Length: %d\r\n\r\n" % (len(body) + 1 + rng.randrange(1000)) + body
        status = exchange(address, data, half=True)
    elif way < 0.95:
        data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        status = exchange(address, data, cut=rng.randrange(1, len(data)))
    else:
        # Heads that are none.
        data = bytearray(head + b"\r\n")
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        status = exchange(address, bytes(data), half=True)
    return status


def test_ten_thousand_malformed_requests():
    with serving("--read-timeout", "10s") as server:
        host, port = server.address.rsplit(":", 1)
        address = (host, int(port))
        # Some that only stall, all the while.
        stalled = [socket.create_connection(address) for _ in range(50)]
        for i, connection in enumerate(stalled):
            connection.sendall((HEAD + "Content-Length: 1000\r\n\r\n{").encode()[: 30 + 5 * i])
        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(lambda number: one(address, number), range(REQUESTS)))
        counts = {status: statuses.count(status) for status in set(statuses)}
        print(counts)
        assert all(status is None or status < 500 for status in statuses), counts
        assert counts[400] > REQUESTS / 2
        for connection in stalled:
            connection.close()
        assert server.post(prompt="x", size="auto", num_inference_steps=1).status_code == 200
        health = server.health()
        assert (health["status"], health["queue_size"], health["in_progress"]) == ("ok", 0, 0)
        for line in server.get("/metrics").text.splitlines():
            assert not (line.startswith("hypergen_requests_total") and 'status="5' in line), line
