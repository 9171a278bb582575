"""Which of a few groups of alike training texts a text falls into, by its hashed words: what the drift alarm counts.

Spherical k-means (Dhillon and Modha 2001): rows of length 1, the centre with the largest cosine. Centres are kept in 8 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MOST = 8
LEAST_ROWS = 25  # of a cluster, on average
ROUNDS = 20


def fit(x: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Centres int8 [k, D] of rows [n, D] of length 1, k at most MOST; None for rows too few to have two."""
    k = min(MOST, len(x) // LEAST_ROWS)
    if k < 2:
        return None
    centres = _spread_out(x, k, np.random.default_rng(seed))
    for _ in range(ROUNDS):
        own = (x @ centres.T).argmax(1)
        sums = np.stack([x[own == place].sum(0) for place in range(k)])
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    scale = 127 / max(float(np.abs(centres).max()), 1e-12)
    return np.rint(centres * scale).astype(np.int8)


def _spread_out(x: np.ndarray, k: int, chance: Any) -> np.ndarray:
    """k rows, each drawn by how far it is from those before (Arthur and Vassilvitskii 2007)."""
    chosen = [int(chance.integers(len(x)))]
    for _ in range(k - 1):
        away = np.clip(1 - (x @ x[chosen].T).max(1), 0, None)
        total = away.sum()
        chosen.append(int(chance.choice(len(x), p=away / total) if total > 0 else chance.integers(len(x))))
    return x[chosen].copy()


def nearest(centres: np.ndarray, columns: np.ndarray, values: np.ndarray) -> int:
    """The cluster of one text's hashed words; 0 for an empty one."""
    return int((centres[:, columns] @ values).argmax())
