"""A request's text as a sparse vector: hashed words and word pairs.

Knows nothing of models or scores. The same text gives the same vector in every process and on every
machine (crc32, not Python's salted hash).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

DIMENSIONS = 4096
MAX_CHARACTERS = 2000  # the beginning decides; bounds the time of a decision
SPEC: dict[str, Any] = {
    "kind": "hashed-ngrams",
    "version": 1,
    "dimensions": DIMENSIONS,
    "ngrams": [1, 2],
    "hash": "crc32, top bit as sign",
    "counts": "1 + log(count), rows of length 1",
    "max_characters": MAX_CHARACTERS,
}
WORD = re.compile(r"\w+")
WORDS_ALONE = bytes(c if c < 128 and (chr(c).isalnum() or c == ord("_")) else ord(" ") for c in range(256))
SIGNS = np.array([-1.0, 1.0])  # by a hash's top bit
# By count; a text of so many characters has fewer words and pairs. [0] is never asked for.
LOG_COUNTS = np.concatenate(([0.0], 1.0 + np.log(np.arange(1, MAX_CHARACTERS + 1))))


def arrays(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(columns, ascending int64 [n]; values, float64 [n], of length 1); both empty where the text has no word."""
    start = text[:MAX_CHARACTERS].lower()
    words = _ascii_words(start) if start.isascii() else _words(start)
    if not words:
        return np.zeros(0, np.int64), np.zeros(0)
    singles = list(map(crc32, words))
    # crc32(b" b", crc32(a)) is that of the pair "a b"; no word holds a zero byte.
    spaced = b"\0 ".join(words).split(b"\0")[1:]
    pairs = map(crc32, spaced, singles)
    hashed, counts = _counted(np.frombuffer(array("I", [*singles, *pairs]), np.uint32))
    values = LOG_COUNTS[counts] * SIGNS[hashed >> 31]
    dense = np.bincount(hashed % DIMENSIONS, values, DIMENSIONS)
    columns = (dense != 0).nonzero()[0]
    found = dense.take(columns)
    return columns, found / math.sqrt(found @ found) if len(found) else found


def _counted(hashed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(each value once, ascending; how often it stands there) of at least one value: np.unique in a third of its time."""
    ordered = np.sort(hashed)
    edge = np.empty(len(ordered) + 1, bool)
    edge[0] = edge[-1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=edge[1:-1])
    edges = edge.nonzero()[0]
    return ordered.take(edges[:-1]), edges[1:] - edges[:-1]


def vector(text: str) -> dict[int, float]:
    """Column -> value, of length 1 (or empty, where the text has no word)."""
    columns, values = arrays(text)
    return dict(zip(columns.tolist(), values.tolist(), strict=True))


def _ascii_words(text: str) -> list[bytes]:
    """The same as `_words`, without a regular expression and without encoding each."""
    return text.encode().translate(WORDS_ALONE).split()


def _words(text: str) -> list[bytes]:
    return [word.encode(errors="replace") for word in WORD.findall(text)]


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
