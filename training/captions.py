"""Captions as people type them: a subject, sometimes a style, sometimes a background, in several word orders.

A caption without a style means the flat one, without a background a white one; so the shortest prompt has one answer.
"""

import random

from art import Picture

STYLE_OF_PLAIN_CAPTIONS = "flat"
COLOUR_OF_PLAIN_CAPTIONS = "white"


def _article(phrase: str, draw: random.Random) -> str:
    if draw.random() < 0.65:
        return phrase
    return draw.choice(("the ", "an " if phrase[0].lower() in "aeiou" else "a ")) + phrase


def caption(picture: Picture, colour: str, draw: random.Random) -> str:
    """One caption for a picture on a background, drawn from the templates."""
    words = picture.name
    if picture.aliases and draw.random() < 0.5:
        words = draw.choice(picture.aliases)
    named_style = picture.style != STYLE_OF_PLAIN_CAPTIONS or draw.random() < 0.35
    before = named_style and draw.random() < 0.2
    text = _article(f"{picture.style} {words}" if before else words, draw)
    extras = []
    if picture.keywords and draw.random() < 0.15:
        extras += draw.sample(picture.keywords, 1)
    if named_style and not before:
        extras.append(draw.choice(("{} style", "{} style", "{} style", "{}", "in {} style")).format(picture.style))
    if colour != COLOUR_OF_PLAIN_CAPTIONS or draw.random() < 0.25:
        if not extras and draw.random() < 0.5:
            text += draw.choice((" on a {} background", " on {} background", " with a {} background")).format(colour)
        else:
            extras.append(f"{colour} background")
    if len(extras) > 1 and draw.random() < 0.4:
        draw.shuffle(extras)
    parts = [text, *extras]
    if len(parts) > 1 and draw.random() < 0.05:
        draw.shuffle(parts)
    return ", ".join(parts)


def prompt(name: str, style: str, colour: str) -> str:
    """The caption that the evaluation asks with."""
    parts = [name]
    if style != STYLE_OF_PLAIN_CAPTIONS:
        parts.append(f"{style} style")
    if colour != COLOUR_OF_PLAIN_CAPTIONS:
        parts.append(f"{colour} background")
    return ", ".join(parts)
