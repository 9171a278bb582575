"""Near-duplicates by MinHash of word triples (Broder 1997): a policy keeps signatures of its fitting rows, never their texts."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from edgeft.router.features import WORD

HASHES = 32
ALIKE = 0.8  # estimated share of common triples from which two texts count as one
PRIME = np.uint64((1 << 61) - 1)
_chance = np.random.default_rng(20240607)
_A = _chance.integers(1, 1 << 29, HASHES, dtype=np.uint64)
_B = _chance.integers(0, 1 << 60, HASHES, dtype=np.uint64)


def signature(text: str) -> np.ndarray:
    """uint32 [HASHES]; the share of equal places of two signatures estimates the Jaccard similarity of their triples."""
    words = [word.encode(errors="replace") for word in WORD.findall(text.lower())]
    count = max(1, len(words) - 2)
    triples = np.array([crc32(b" ".join(words[i : i + 3])) for i in range(count)], np.uint64)
    mixed = (triples[:, None] * _A + _B) % PRIME  # 32 + 29 bits fit in 64
    return (mixed.min(0) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [len(texts), HASHES]."""
    return np.array([signature(text) for text in texts], np.uint32).reshape(len(texts), HASHES)


def near(texts: Sequence[str], seen: np.ndarray, alike: float = ALIKE) -> np.ndarray:
    """bool [len(texts)]: which texts are near-duplicates of a row whose signature is in `seen` [n, HASHES]."""
    least = alike * HASHES
    return np.array(
        [len(seen) > 0 and int((seen == own).sum(1).max()) >= least for own in signatures(texts)], bool
    )
