"""The server's own OpenAPI document: it is one, and requests generated from it,
good ones and bad ones, get answers that agree with it: no 5xx, no crash, no violation."""

import os
import subprocess
import sys
from pathlib import Path

from hypergen import serving
from openapi_spec_validator import validate

HERE = Path(__file__).parent


def test_the_description_is_one(server):
    document = server.get("/openapi.json").json()
    validate(document)
    operations = [o for item in document["paths"].values() for o in item.values()]
    assert len({o["operationId"] for o in operations}) == len(operations)


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
