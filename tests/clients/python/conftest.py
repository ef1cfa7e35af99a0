"""Fixtures: one server for the tests that need nothing special of theirs."""

import pytest
from hypergen import serving
from openai import OpenAI


@pytest.fixture(scope="session")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    return OpenAI(api_key=server.key, base_url=server.url + "/v1", max_retries=0, timeout=300)
