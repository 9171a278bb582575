"""Near-duplicates by MinHash of word triples (Broder 1997): a policy keeps signatures of its fitting rows, never their texts."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from edgeft.router.features import WORD

HASHES = 32
ALIKE = 0.8  # estimated share of common triples from which two texts count as one
SEEDS = np.arange(1, HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def signature(text: str) -> np.ndarray:
    """uint32 [HASHES]; the share of equal places of two signatures estimates the Jaccard similarity of their triples."""
    words = [word.encode(errors="replace") for word in WORD.findall(text.lower())]
    count = max(1, len(words) - 2)
    triples = np.array([crc32(b" ".join(words[i : i + 3])) for i in range(count)], np.uint64)
    return (_mixed(triples[:, None] + SEEDS).min(0) >> np.uint64(32)).astype(np.uint32)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): a hash that keeps no order, which a plain a * x + b nearly does."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [len(texts), HASHES]."""
    return np.array([signature(text) for text in texts], np.uint32).reshape(len(texts), HASHES)


def near(texts: Sequence[str], seen: np.ndarray, alike: float = ALIKE) -> np.ndarray:
    """bool [len(texts)]: which texts are near-duplicates of a row whose signature is in `seen` [n, HASHES]."""
    least = alike * HASHES
    return np.array(
        [len(seen) > 0 and int((seen == own).sum(1).max()) >= least for own in signatures(texts)], bool
    )
