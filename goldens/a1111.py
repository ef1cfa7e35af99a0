"""The A1111 prompt syntax over transformers' text encoders: an implementation of its published rules that shares nothing with ours.

Text becomes characters, each with its weight; runs of one weight are tokenized; tokens are packed into chunks; each chunk is encoded by
itself, its states multiplied by the weights, and its mean restored (A1111's emphasis "Original").
"""

import re

import torch

BREAK = object()
BREAK_WORD = re.compile(r"\s*\bBREAK\b\s*")
WEIGHT = re.compile(r":\s*([+-]?[0-9.]+)\s*\)")
# How far back a full chunk may end for the sake of a comma.
BACKTRACK = 20


def parse(prompt: str) -> list:
    """[text, weight] pairs and BREAKs."""
    characters: list = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float) -> bool:
        for i in reversed(range(len(opened))):
            if opened[i][0] == bracket:
                for k in range(opened.pop(i)[1], len(weights)):
                    weights[k] *= factor
                return True
        return False

    def emit(text) -> None:
        characters.extend(text)
        weights.extend([1.0] * len(text))

    at = 0
    while at < len(prompt):
        c = prompt[at]
        number = WEIGHT.match(prompt, at)
        word = BREAK_WORD.match(prompt, at)
        if c == "\\":
            if at + 1 < len(prompt) and prompt[at + 1] in "()[]\\":
                emit(prompt[at + 1])
                at += 1
        elif word:
            emit([BREAK])
            at = word.end() - 1
        elif c in "([":
            opened.append((c, len(weights)))
        elif number and close("(", float(number[1])):
            at = number.end() - 1
        elif c == ")" and close("(", 1.1) or c == "]" and close("[", 1 / 1.1):
            pass
        else:
            emit(c)
        at += 1
    while opened:
        bracket = opened[-1][0]
        close(bracket, 1.1 if bracket == "(" else 1 / 1.1)
    parts: list = []
    for c, weight in zip(characters, weights):
        if c is BREAK:
            parts.append(BREAK)
        elif parts and parts[-1] is not BREAK and parts[-1][1] == weight:
            parts[-1][0] += c
        else:
            parts.append([c, weight])
    return parts


def chunks(prompt: str, tokenizer, length: int) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of each chunk: begin, `length - 2` tokens, end, padding."""
    room = length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    sections: list[list[tuple[int, float]]] = [[]]
    for part in parse(prompt):
        if part is BREAK:
            sections.append([])
        else:
            ids = tokenizer(part[0], add_special_tokens=False, truncation=False).input_ids
            sections[-1].extend((i, part[1]) for i in ids)
    if len(sections) > 1 and not sections[-1]:
        sections.pop()
    packed = []
    for section in sections:
        while len(section) > room:
            cut = room
            if section[room][0] != comma:
                commas = [i for i in range(room) if section[i][0] == comma]
                if commas and room - commas[-1] <= BACKTRACK:
                    cut = commas[-1] + 1
            packed.append(section[:cut])
            section = section[cut:]
        packed.append(section)
    result = []
    for section in packed:
        ids = [tokenizer.bos_token_id] + [i for i, _ in section] + [tokenizer.eos_token_id]
        weights = [1.0] + [w for _, w in section] + [1.0]
        result.append((
            ids + [tokenizer.pad_token_id] * (length - len(ids)),
            weights + [1.0] * (length - len(ids)),
        ))
    return result


def encode(prompt: str, tokenizer, encoder, xl: bool, skip: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """States of each chunk, [length, width], and the first chunk's pooled text."""
    states, pooled = [], None
    dtype = next(encoder.parameters()).dtype
    for ids, weights in chunks(prompt, tokenizer, tokenizer.model_max_length):
        out = encoder(torch.tensor([ids]), output_hidden_states=True)
        if xl:
            hidden = out.hidden_states[-(skip + 2)]
        elif skip:
            hidden = encoder.final_layer_norm(out.hidden_states[-(skip + 1)])
        else:
            hidden = out.last_hidden_state
        scale = torch.tensor(weights, dtype=dtype)[None, :, None]
        weighted = hidden * scale
        weighted = weighted * (hidden.mean() / weighted.mean())
        states.append(weighted[0])
        if pooled is None and xl and hasattr(out, "text_embeds"):
            pooled = out.text_embeds
    return states, pooled


def both_encoders(pipe, prompt: str, skip: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Chunks of all text encoders side by side."""
    xl = hasattr(pipe, "text_encoder_2")
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if xl:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    encoded = [encode(prompt, *pair, xl, skip) for pair in pairs]
    return [torch.cat(rows, -1) for rows in zip(*(states for states, _ in encoded))], encoded[-1][1]


def arguments(pipe, prompt: str, negative: str | None, skip: int) -> dict:
    """What to call a pipeline with in place of its prompts."""
    with torch.inference_mode():
        positive, pooled = both_encoders(pipe, prompt, skip)
        other, other_pooled = both_encoders(pipe, negative or "", skip)
        empty, _ = both_encoders(pipe, "", skip)
        zeros = pooled is not None and negative is None and pipe.config.force_zeros_for_empty_prompt
        count = max(len(positive), len(other))
        positive = torch.cat(positive + empty * (count - len(positive)))[None]
        other = torch.cat(other + empty * (count - len(other)))[None]
        result = {
            "prompt_embeds": positive,
            "negative_prompt_embeds": torch.zeros_like(other) if zeros else other,
        }
        if pooled is not None:
            result["pooled_prompt_embeds"] = pooled
            result["negative_pooled_prompt_embeds"] = torch.zeros_like(other_pooled) if zeros else other_pooled
    return result
