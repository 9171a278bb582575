"""A request's text as a sparse vector: hashed words and word pairs.

Knows nothing of models or scores. The same text gives the same vector in every process and on every
machine (integers modulo 2^64, not Python's salted hash).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIMENSIONS = 4096
MAX_CHARACTERS = 2000  # the beginning decides; bounds the time of a decision
SPEC: dict[str, Any] = {
    "kind": "hashed-ngrams",
    "version": 2,
    "dimensions": DIMENSIONS,
    "ngrams": [1, 2],
    "hash": "polynomial of the UTF-8 bytes modulo 2^64, top bit as sign, the next 12 as column",
    "counts": "1 + log(net count of a column), rows of length 1",
    "max_characters": MAX_CHARACTERS,
}
WORD = re.compile(r"\w+")
WORDS_ALONE = bytes(c if c < 128 and (chr(c).isalnum() or c == ord("_")) else 0 for c in range(256))
MOST_BYTES = 4 * MAX_CHARACTERS + 2  # in UTF-8, with a zero before and behind
BASE, FACTOR = 0x9E3779B97F4A7C15, np.uint64(0xD6E8FEB86659FD93)  # odd, of no other meaning
POWERS = np.multiply.accumulate(np.array([1, *[BASE] * (MOST_BYTES - 1)], np.uint64))
INVERSE = np.multiply.accumulate(np.array([1, *[pow(BASE, -1, 1 << 64)] * (MOST_BYTES - 1)], np.uint64))
HALF, KEPT = np.uint64(32), np.uint64(51)  # bits that are folded in, bits that are dropped
# By net count, negative ones from the end; of so many characters no column holds more words and pairs. [0] is never asked for.
_LOGS = 1.0 + np.log(np.arange(1, MAX_CHARACTERS + 1))
LOG_COUNTS = np.concatenate(([0.0], _LOGS, -_LOGS[::-1]))


def arrays(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(columns, ascending int64 [n]; values, float64 [n], of length 1); both empty where the text has no word."""
    counts = np.bincount(hashes(text), minlength=2 * DIMENSIONS)
    plus, minus = counts[:DIMENSIONS], counts[DIMENSIONS:]
    columns = (plus != minus).nonzero()[0]
    found = LOG_COUNTS[plus.take(columns) - minus.take(columns)]
    return columns, found / math.sqrt(found @ found) if len(found) else found


def hashes(text: str) -> np.ndarray:
    """int64 [2n - 1] below 2 DIMENSIONS: of the n words of a text in their order, then of its pairs; empty without words.

    A word of bytes b has p = sum b_j BASE^j mod 2^64 and m = p xor (p >> 32); it hashes to m FACTOR, the pair (a, b) to
    (m_a FACTOR + m_b) FACTOR, of which the top 13 bits are kept. All words at once: sums of the text's bytes times BASE^place, over
    each word, times BASE^-start.
    """
    codes = np.frombuffer(spaced(text), np.uint8)
    inside = codes.astype(bool)
    edges = (inside[1:] != inside[:-1]).nonzero()[0]
    if not len(edges):
        return edges
    mixed = np.add.reduceat(codes[1:] * POWERS[: len(codes) - 1], edges)[::2]
    mixed *= INVERSE.take(edges[::2])
    mixed ^= mixed >> HALF
    n = len(mixed)
    found = np.empty(2 * n - 1, np.uint64)
    words, pairs = found[:n], found[n:]
    np.multiply(mixed, FACTOR, out=words)
    np.add(words[:-1], mixed[1:], out=pairs)
    pairs *= FACTOR
    found >>= KEPT
    return found.view(np.int64)


def spaced(text: str) -> bytes:
    """The words of a text's beginning, lower case in UTF-8, one zero or more before, between and behind them."""
    start = text[:MAX_CHARACTERS].lower()
    if start.isascii():
        return b"\0%b\0" % start.encode().translate(WORDS_ALONE)
    return "\0".join(("", *WORD.findall(start), "")).encode()


def vector(text: str) -> dict[int, float]:
    """Column -> value, of length 1 (or empty, where the text has no word)."""
    columns, values = arrays(text)
    return dict(zip(columns.tolist(), values.tolist(), strict=True))


def matrix(texts: Sequence[str]) -> np.ndarray:
    """The vectors of several texts, float64 [len(texts), DIMENSIONS]."""
    rows = np.zeros((len(texts), DIMENSIONS))
    for row, text in zip(rows, texts, strict=True):
        columns, values = arrays(text)
        row[columns] = values
    return rows


def request_text(request: str | Sequence[Mapping[str, Any]]) -> str:
    """What the router looks at: the text itself, or that of the last user message."""
    if isinstance(request, str):
        return request
    for message in reversed(request):
        if message.get("role") == "user":
            return content_text(message.get("content"))
    return ""


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or OpenAI's list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
