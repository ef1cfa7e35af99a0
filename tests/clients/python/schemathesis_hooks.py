"""Keeps generated requests cheap and possible, without making bad ones good:
only values that are valid already are replaced by other valid ones."""

import re

import schemathesis


def whole(value, low, high):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def cheap(body):
    """Ten pictures of 150 steps say no more than two of four (fewer are too few for some samplers)."""
    body = dict(body)
    if body.get("num_inference_steps") is None or whole(body["num_inference_steps"], 5, 150):
        body["num_inference_steps"] = 4
    if whole(body.get("n"), 3, 10):
        body["n"] = 2
    return body


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    body = cheap(body)
    # Some samplers refuse one step, which the document does not tell.
    if whole(body["num_inference_steps"], 1, 3):
        body["num_inference_steps"] = 4
    # That sides are multiples of 8 is more than the document's pattern says.
    size = body.get("size")
    if size is None or isinstance(size, str) and re.fullmatch(r"[0-9]+x[0-9]+", size):
        body["size"] = "64x72"
    # What no prompt in this syntax may say, the document does not tell.
    if body.get("prompt_syntax") == "a1111":
        for name in ("prompt", "negative_prompt"):
            if isinstance(body.get(name), str) and body[name]:
                body[name] = "(red:1.2) apple"
    # A LoRA that cannot be read is a 500 by the specification; test_examples has it.
    if isinstance(body.get("lora_path"), str) and body["lora_path"]:
        body["lora_path"] = None
    loras = body.get("loras")
    if isinstance(loras, list) and all(isinstance(lora, dict) and isinstance(lora.get("path"), str) for lora in loras):
        body["loras"] = None
    return body


@schemathesis.hook
def before_call(context, case, kwargs):
    # The same in the phases that do not come through map_body. The path of a file that is there cannot be guessed.
    if isinstance(case.body, dict):
        case.body = cheap(case.body)
    loras = case.body.get("loras") if isinstance(case.body, dict) else None
    if isinstance(loras, list) and all(isinstance(lora, dict) and isinstance(lora.get("path"), str) for lora in loras):
        case.body = {**case.body, "loras": []}
