"""Hard negatives for a semantic cache: a sentence changed in one point that its embedding hardly shows.

Each change is made by a rule of its own that knows nothing of the guards: another number, a negation put in or taken out, two parts
that change places. A kind that a sentence has no place for gives None.
"""

from __future__ import annotations

import random
import re

SPELLED = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
AUXILIARY = re.compile(
    r"\b(is|are|was|were|can|could|should|will|would|does|do|has|must|may)\b(?! not\b)", re.IGNORECASE
)
NOT = re.compile(r"\b(?:not|never) ", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][\w\-']*")
FUNCTION = frozenset((
    "the", "a", "an", "of", "in", "on", "to", "for", "and", "or", "is", "are", "it", "that", "this", "with",
    "by", "as", "at", "from", "be", "can", "you",
))  # fmt: skip
KINDS = ("number", "negation", "order")


def negative(text: str, kind: str, chance: random.Random) -> str | None:
    """The text changed by a rule of KINDS, or None."""
    return {"number": other_number, "negation": negated, "order": swapped}[kind](text, chance)


def other_number(text: str, chance: random.Random) -> str | None:
    """One number, in figures or spelled, becomes another."""
    places = list(re.finditer(rf"\d+|\b(?:{'|'.join(SPELLED)})\b", text, re.IGNORECASE))
    if not places:
        return None
    place = chance.choice(places)
    if place[0].isdigit():
        new = str(int(place[0]) + chance.choice([1, 2, 3, 10]))
    else:
        new = chance.choice([w for w in SPELLED if w != place[0].lower()])
    return text[: place.start()] + new + text[place.end() :]


def negated(text: str, chance: random.Random) -> str | None:
    """A negation is taken out where one stands, else put behind an auxiliary."""
    if place := NOT.search(text):
        return text[: place.start()] + text[place.end() :]
    places = list(AUXILIARY.finditer(text))
    if not places:
        return None
    place = chance.choice(places)
    return f"{text[: place.end()]} not{text[place.end() :]}"


def swapped(text: str, chance: random.Random) -> str | None:
    """Two content words at some distance change places."""
    places = [m for m in WORD.finditer(text) if m[0].lower() not in FUNCTION and len(m[0]) > 2]
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 2 :] if a[0].lower() != b[0].lower()]
    if not pairs:
        return None
    a, b = chance.choice(pairs)
    return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
