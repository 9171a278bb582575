"""Which requests must not leave the house: patterns, names, tags, tenants. Asked before anything is scored.

The rules read every message, names, tool calls and arguments, and whatever else goes upstream. A text that can't be
read (an image, an unknown part) counts as private where `unreadable` is "private", the default.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from edgeft.router.request import Request

# What each pattern looks for. Numbers are checked (Luhn, mod 97) so that order numbers stay public.
PATTERNS = {
    "email": re.compile(r"[^\s@<>\"'(),;:]{1,64}@[^\s@<>\"'(),;:]{1,190}\.[^\W\d_]{2,24}"),
    "iban": re.compile(r"(?=([A-Z]{2}\d{2}(?:[ \-]?[A-Z0-9]){11,30}))", re.IGNORECASE),
    "card": re.compile(r"\d+(?:[ \-.]\d+)*"),
    "phone": re.compile(
        r"(?:(?<!\d)\+|(?<![\w./\-])(?<!\d:)00)[1-9](?:[ \-./()]{0,2}\d){6,13}(?!\d)"
        r"|(?<![\w./\-])(?<!\d:)\(?0\d{1,4}\)?(?:[ \-./]{1,3}\d{2,}){1,4}(?!\d)"
    ),
}
DEFAULTS: dict[str, Any] = {
    "patterns": [],  # of PATTERNS
    "names": [],  # words or phrases; whole words, any case
    "tags": [],  # a request that carries one of these is private
    "tenants": [],  # all requests of these are private; "*" is everybody
    "unreadable": "private",  # or "public": parts that hold no text, as images
}
INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
MAX_DEPTH = 12


def why_private(rules: Mapping[str, Any], request: Request) -> str | None:
    """The name of the first rule that makes a request private, or None. Never quotes what it saw."""
    if request.private:
        return "the caller says so"
    tenants = rules.get("tenants") or ()
    if "*" in tenants or (request.tenant is not None and request.tenant in tenants):
        return "tenant"
    if tag := next((tag for tag in sorted(request.tags) if tag in (rules.get("tags") or ())), None):
        return f"tag {tag}"
    patterns, names = rules.get("patterns") or (), rules.get("names") or ()
    if not (patterns or names):
        return None
    texts = [plain(text) for text in (*_texts(request.messages), request.extra_text) if text]
    # A number may be cut in two parts of one message.
    texts += [
        plain("".join(_parts(m.get("content"))))
        for m in request.messages
        if isinstance(m.get("content"), list)
    ]
    for name in patterns:
        if any(found(name, text) for text in texts):
            return f"pattern {name}"
    if names:
        asked = _names(tuple(names))
        if any(asked.search(text.casefold()) for text in texts):
            return "name on the list"
    if rules.get("unreadable", "private") == "private" and _unreadable(request.messages):
        return "a part that can't be read"
    return None


def found(name: str, text: str) -> bool:
    """True where a text holds what the pattern looks for."""
    matches = PATTERNS[name].finditer(text)
    if name == "card":
        return any(
            luhn(number) for match in matches for number in _card_lengths(re.split(r"[ \-.]", match[0]))
        )
    if name == "iban":
        return any(iban(part) for match in matches for part in _prefixes(re.sub(r"[ \-]", "", match[1])))
    return next(matches, None) is not None


def _card_lengths(groups: list[str]) -> Iterator[str]:
    """The runs of whole groups of digits that have a card's 13 to 19: other numbers may stand before and behind."""
    for start in range(len(groups)):
        number = ""
        for group in groups[start:]:
            number += group
            if len(number) > 19:
                break
            if len(number) >= 13:
                yield number


def plain(text: str) -> str:
    """A text as the patterns read it: compatibility forms folded, invisible characters gone, spaces plain."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return re.sub(r"[\s\u2010-\u2015\u2212]", lambda m: " " if m[0].isspace() else "-", text)


def luhn(digits: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban(text: str) -> bool:
    """The check digits of an IBAN (ISO 13616): mod 97 of the rearranged number is 1."""
    moved = (text[4:] + text[:4]).upper()
    return moved.isascii() and moved.isalnum() and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _prefixes(text: str) -> Iterator[str]:
    """An IBAN has 15 to 34 characters, and words may follow it without a break."""
    return (text[:length] for length in range(15, min(34, len(text)) + 1))


def _names(names: tuple[str, ...]) -> re.Pattern[str]:
    known = _NAMES.get(names)
    if known is None:
        words = "|".join(
            re.escape(plain(name).casefold()) for name in sorted(names, key=len, reverse=True) if name.strip()
        )
        known = _NAMES[names] = re.compile(rf"(?<!\w)(?:{words})(?!\w)" if words else r"(?!)")
    return known


_NAMES: dict[tuple[str, ...], re.Pattern[str]] = {}


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        yield str(value)
    elif depth > MAX_DEPTH:
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, depth + 1)


def _parts(content: Any) -> Iterator[str]:
    return (p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))


def _unreadable(messages: Any) -> bool:
    """True where a message has a part other than text, or lies deeper than the rules read."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(
            not isinstance(p, Mapping) or p.get("type") != "text" for p in content
        ):
            return True
    return any(_deeper(message, MAX_DEPTH) for message in messages)


def _deeper(value: Any, levels: int) -> bool:
    if levels < 0:
        return True
    if isinstance(value, Mapping):
        return any(_deeper(v, levels - 1) for v in value.values())
    return isinstance(value, list | tuple) and any(_deeper(v, levels - 1) for v in value)
