"""OpenAI's own tests of its Python client, against this server: what they ask for, and
what they check of the answers, is not ours to choose."""

import os
import re
import subprocess
import sys
from pathlib import Path

from hypergen import serving

# `tests/clients/run` puts the client's source archive here.
OWN = Path(__file__).parent / ".openai"
# The second overload is the stream, which this server refuses until it has one.
WHICH = "generate and not overload_2"


def test_openais_own_tests_of_generation_pass():
    assert (OWN / "tests/api_resources/test_images.py").exists(), f"no tests in {OWN}: tests/clients/run fetches them"
    # Their key has spaces, so the server has none. What is drawn does not matter.
    with serving("--default-steps", "2", key=None) as server:
        env = {**os.environ, "TEST_API_BASE_URL": server.url + "/v1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-k", WHICH]
        done = subprocess.run(
            [*command, "tests/api_resources/test_images.py"], cwd=OWN, env=env, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stdout + done.stderr
    # Four tests, each with two clients that wait and three that do not.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout
