"""What two questions must share before one's answer may serve the other, whatever an embedding says.

Numbers, negation, names and codes, and the order of what is said: a sentence and its reversal have the same words and nearly the
same embedding. Each guard gives None where it lets the pair pass, else what differs.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from functools import lru_cache

COUNTED = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBER_WORDS = {word: str(value) for value, word in enumerate(COUNTED)} | {
    "thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000", "million": "1000000",
    "half": "0.5", "once": "1", "twice": "2", "dozen": "12",
}  # fmt: skip
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
NEGATION = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|neither|nor|without|cannot|except|unless|hardly|barely|lacks?|fails?|"
    r"(?:un|dis|de)(?:able[ds]?|allow(?:ed)?|install(?:ed)?|subscribe[ds]?|activate[ds]?))\b|n['’]t\b",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W_]+(?:['’\-.][^\W_]+)*", re.UNICODE)
OPPOSITES = [
    {"increase", "decrease"}, {"enable", "disable"}, {"before", "after"}, {"more", "less", "fewer"}, {"buy", "sell"}, {"min", "max"},
    {"minimum", "maximum"}, {"above", "below"}, {"add", "remove"}, {"start", "stop"}, {"open", "close"}, {"first", "last"},
    {"import", "export"}, {"encode", "decode"}, {"encrypt", "decrypt"}, {"up", "down"}, {"left", "right"}, {"send", "receive"},
    {"from", "to"}, {"best", "worst"}, {"fast", "slow"}, {"high", "low"}, {"true", "false"}, {"all", "some", "none"}, {"with", "without"},
    {"pros", "cons"}, {"allow", "deny"}, {"include", "exclude"}, {"upload", "download"}, {"ascending", "descending"},
]  # fmt: skip
STOP = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "for", "from", "by", "with", "and", "or", "is", "are",
    "was", "were", "be", "been", "being", "it", "its", "this", "that", "these", "those", "as", "do", "does",
    "did", "can", "could", "will", "would", "should", "may", "might", "i", "you", "he", "she", "we", "they",
    "me", "my", "your", "our", "their", "what", "which", "who", "how", "when", "where", "why", "there", "here",
    "s", "has", "have", "had", "into", "about", "than", "then", "so", "such", "also", "very", "please",
))  # fmt: skip


def differs(one: str, two: str) -> str | None:
    """The first guard that does not let the pair pass, or None."""
    a, b = read(one), read(two)
    if a.numbers != b.numbers:
        return "numbers"
    if a.negations % 2 != b.negations % 2:
        return "negation"
    if any(
        pair & a.words and pair & b.words and pair & a.words != pair & b.words
        for pair in map(frozenset, OPPOSITES[:8] + OPPOSITES[9:])
    ):
        return "opposites"
    if a.names - b.all_forms or b.names - a.all_forms:
        return "names"
    return "order" if _reordered(a.content, b.content) else None


class Read:
    """What the guards see of one text."""

    def __init__(self, text: str) -> None:
        words = WORD.findall(text)
        lower = [w.lower() for w in words]
        self.numbers = Counter(_number(n) for n in NUMBER.findall(text)) + Counter(
            NUMBER_WORDS[w] for w in lower if w in NUMBER_WORDS
        )
        self.negations = len(NEGATION.findall(text))
        self.words = frozenset(lower)
        self.content = [stem(w) for w in lower if w not in STOP and not w.isdigit()]
        starts = {m.end() for m in re.finditer(r"(?:^|[.!?:]\s+)", text)}
        named = (m for m in WORD.finditer(text) if any(c.isupper() for c in m[0]))
        # A capital at the start of a sentence says nothing, unless more of the word is in capitals or digits stand in it.
        self.names = frozenset(
            stem(m[0].lower()) for m in named
            if m[0] != "I" and m[0].lower() not in STOP and (m.start() not in starts or not m[0][1:].islower())
        )  # fmt: skip
        # Hugging Face and HuggingFace, JS and js: a name may be written apart or together.
        joined = [stem(a + b) for a, b in itertools.pairwise(lower)]
        parts = [stem(p) for w in lower for p in re.split(r"['’\-.]", w)]
        self.all_forms = frozenset([*(stem(w) for w in lower), *joined, *parts])


@lru_cache(maxsize=4096)
def read(text: str) -> Read:
    """What the guards see of a text; kept for the next comparison."""
    return Read(text)


def stem(word: str) -> str:
    """A word without its commonest endings: enough for plural and tense."""
    word = re.sub(r"['’]s?$", "", word)
    for ending in ("ingly", "edly", "ing", "ies", "ed", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _number(text: str) -> str:
    plain = (
        text.replace(",", "")
        if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", text)
        else text.replace(",", ".")
    )
    return plain.rstrip("0").rstrip(".") if plain.count(".") == 1 else plain.lstrip("0") or "0"


def _reordered(one: list[str], two: list[str]) -> bool:
    """True where two common words have changed places, whatever else stands between them."""
    a, b = Counter(one), Counter(two)
    common = {w for w in a if a[w] == b[w] == 1}
    place = {w: i for i, w in enumerate(two)}
    order = [place[w] for w in one if w in common]
    return order != sorted(order)
