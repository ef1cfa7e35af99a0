"""Requests generated from the server's own OpenAPI document, good ones and bad
ones, and answers checked against it: no 5xx, no crash, no violation."""

import os
import subprocess
import sys
from pathlib import Path

from hypergen import serving

HERE = Path(__file__).parent


def test_the_server_keeps_its_own_description(tmp_path):
    with serving() as server:
        command = [
            str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(HERE / "schemathesis.toml"), "run",
            server.url + "/openapi.json", "--header", f"Authorization: Bearer {server.key}",
        ]
        env = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert server.health()["status"] == "ok"
