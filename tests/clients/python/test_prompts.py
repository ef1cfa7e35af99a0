"""Prompts of one character, or a few, over and over: reading them takes as long as
they are, whatever they are made of, and nobody waits for a prompt that is refused."""

import time

import pytest
from hypergen import serving

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "\0", "é", "\u0301", "\u200d", "日", "🦊", "\u2028"]
PIECES = ["<lora:", "(a:", "[a:", "\\(", "BREAK ", "AND", "(:1)", "a,", "<|endoftext|>", "))((", "1.", "<lora:a:1>"]
# The kinds of them that are drawn, which takes a hundred times as long as refusing.
DRAWN = ["x", " ", ",", "(", ")", "[", "\\", "\0", "é", "🦊", "<lora:", "(a:", "[a:", "BREAK ", "))((", "<lora:a:1>"]
SYNTAXES = ["plain", "a1111"]
LONGEST = 32_000
MIB = 1 << 20
# Of three tries the quickest counts: a machine may have other things to do.
TRIES = 3
QUICK = 0.2


@pytest.fixture(scope="module")
def roomy():
    """A server that takes bodies in which a prompt of 1 MiB has room, however it is escaped."""
    with serving("--max-body-size", "16MiB") as running:
        yield running


def seconds(server, status, enough=QUICK, **body):
    """The time to an answer with one of these statuses; the shortest where the first tries take more than is enough."""
    times = [float("inf")]
    while min(times) > enough and len(times) <= TRIES:
        start = time.monotonic()
        answer = server.post(size="auto", num_inference_steps=1, response_format="b64_json", **body)
        times.append(time.monotonic() - start)
        assert answer.status_code in status, (answer.status_code, answer.text[:500])
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"] in ("prompt", "negative_prompt") and len(error["message"]) < 2000, error
    return min(times)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_mebibyte_of_anything_is_refused_at_once(roomy, syntax):
    slow = {}
    for piece in CHARACTERS + PIECES:
        prompt = piece * (MIB // len(piece.encode()))
        taken = seconds(roomy, {400}, prompt=prompt, prompt_syntax=syntax)
        if taken > QUICK:
            slow[piece] = taken
    assert not slow


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_longest_prompt_is_read_at_once(roomy, syntax):
    # What drawing takes is no part of it.
    drawing = seconds(roomy, {200}, enough=0, prompt="x", prompt_syntax=syntax)
    slow = {}
    for piece in DRAWN:
        prompt = piece * (LONGEST // len(piece))
        for name in ("prompt", "negative_prompt"):
            body = {"prompt": "x", "prompt_syntax": syntax, name: prompt}
            # A LoRA that cannot be read is a 500, and this server has none.
            names_a_lora = syntax == "a1111" and piece == "<lora:a:1>" and name == "prompt"
            status = {500} if names_a_lora else {200, 400}
            taken = seconds(roomy, status, enough=drawing + QUICK, **body) - drawing
            if taken > QUICK:
                slow[piece, name] = taken
    assert not slow


def test_the_usual_server_refuses_the_body_itself(server):
    assert seconds(server, {413}, prompt="<" * MIB) < QUICK
