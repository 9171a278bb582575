"""What a text is made of: its length, how long and how rare its words are, its digits and signs, and the answers it offers.

Says nothing of what the words mean, so that a few hundred rows are enough to learn from. A question that offers answers ("A. …", "1) …", one a
line) is judged by them too: how many, how long and how alike they are, and whether they are numbers.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from operator import mul

WORD = re.compile(r"\w+")
OFFERED = re.compile(r"^[ \t]*\(?(?:[A-Ja-j]|\d)[.):][ \t]+(.*)$", re.MULTILINE)
MOST_OFFERED = 10
LONG, SHORT = 10, 3  # characters of a word
NUMERIC = 0.3  # share of digits from which an offered answer is a number
SIGNS = b"\\^_{}=$+*/<>|"
DIGITS = b"0123456789"
CAPITALS = bytes(range(ord("A"), ord("Z") + 1))
NAMES = (
    "log_stem", "longest_sentence", "word_length", "word_length_spread", "long_words", "short_words", "capitals", "capital_words",
    "different_words", "digits", "signs", "offered", "offered_length", "offered_spread", "offered_numbers", "offered_in_stem",
    "offered_alike",
)  # fmt: skip


def looks(text: str) -> list[float]:
    """The numbers of a text, in the order of NAMES; some 30 to 200 µs (5th to 95th percentile of MMLU's, one EPYC core)."""
    offered = list(OFFERED.finditer(text))[:MOST_OFFERED] if "\n" in text else []
    if len(offered) < 2:
        offered = []
    stem = text[: offered[0].start()] if offered else text
    words = WORD.findall(text)
    sizes, count = sorted(map(len, words)), len(words) or 1
    mean, spread = _mean_and_spread(sizes)
    raw = text.encode(errors="replace")
    characters = len(raw) or 1
    return [
        math.log1p(len(stem)), math.sqrt(max(map(len, stem.split(".")))), mean, spread,
        (len(sizes) - bisect_left(sizes, LONG)) / count, bisect_right(sizes, SHORT) / count,
        _held(raw, CAPITALS) / characters, sum(map(str.isupper, words)) / count,
        len(set(map(str.lower, words))) / count, _held(raw, DIGITS) / characters, _held(raw, SIGNS) / characters,
        *_offers(stem, [m.group(1) for m in offered]),
    ]  # fmt: skip


def _mean_and_spread(sizes: list[int]) -> tuple[float, float]:
    """Mean and standard deviation; zeros of nothing."""
    count = len(sizes) or 1
    mean = sum(sizes) / count
    return mean, math.sqrt(max(0.0, sum(map(mul, sizes, sizes)) / count - mean * mean))


def _held(raw: bytes, some: bytes) -> int:
    """How many of these bytes there are."""
    return len(raw) - len(raw.translate(None, some))


def _offers(stem: str, answers: list[str]) -> list[float]:
    """The last six of NAMES: zeros where nothing is offered."""
    if not answers:
        return [0.0] * 6
    n = len(answers)
    mean, spread = _mean_and_spread(list(map(len, answers)))
    numbers = sum(_held(a.encode(errors="replace"), DIGITS) >= NUMERIC * max(1, len(a)) for a in answers)
    words = [set(WORD.findall(answer.lower())) for answer in answers]
    asked = set(WORD.findall(stem.lower()))
    inside = sum(len(w & asked) / (len(w) or 1) for w in words) / n
    alike = len(set.intersection(*words)) / (len(set.union(*words)) or 1)
    return [float(n), math.log1p(mean), math.log1p(spread), numbers / n, inside, alike]
