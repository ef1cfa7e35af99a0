"""A running server for tests: starts the program, waits until it is ready,
knows its address, stops it. It is not a client; the tests bring those."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import requests

PROGRAM = os.environ.get("HYPERGEN_PROGRAM", "target/release/hypergen")
KEY = "sk-hypergen-123456"
# Longer than anything takes on a busy machine; what waits longer has failed.
PATIENCE = 300


class Server:
    """A server process and what it has logged."""

    def __init__(self, *args, key=KEY):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HYPERGEN_")}
        if key:
            env["HYPERGEN_API_KEY"] = key
        command = [PROGRAM, "serve", "--port", "0", "--log-format", "json", *args]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.key = key
        self.log = []
        self.ready = threading.Event()
        self.address = None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if not self.ready.wait(PATIENCE) or self.address is None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "\n".join(self.log))
        self.url = f"http://{self.address}"

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if not self.ready.is_set():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if event.get("message") == "ready":
                    self.address = event["address"]
                    self.ready.set()
        self.ready.set()

    @property
    def headers(self):
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path):
        return requests.get(self.url + path, headers=self.headers, timeout=PATIENCE)

    def post(self, **body):
        """Asks for pictures."""
        url = self.url + "/v1/images/generations"
        return requests.post(url, json=body, headers=self.headers, timeout=PATIENCE)

    def health(self):
        return self.get("/health").json()

    def metric(self, name):
        """The value of a metric by its name and labels as they are written; 0 where it is not there yet."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def until(self, what, condition):
        """Returns once condition(health) holds."""
        start = time.monotonic()
        while not condition(self.health()):
            assert time.monotonic() - start < PATIENCE, f"waited in vain: {what}"
            time.sleep(0.01)

    def stop(self, signum=signal.SIGTERM):
        """Tells it to stop and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code


@contextmanager
def serving(*args, key=KEY):
    """A server that is gone afterwards, and that must end well."""
    server = Server(*args, key=key)
    try:
        yield server
    except BaseException:
        server.process.kill()
        server.process.wait()
        print("\n".join(server.log[-20:]))
        raise
    assert server.stop() == 0, "\n".join(server.log[-50:])
