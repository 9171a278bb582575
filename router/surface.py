"""Heads on what a request looks like, not on what it says: `surface` reads its numbers and words such as "each" and "percent",
`looks` what it is made of (router/looks.py).

Each is a Gaussian kernel ridge on a dozen numbers, kept where the blend with it is better on rows left out (`blend.pays`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeft.router import kernel
from edgeft.router.draft_features import QUESTION, question
from edgeft.router.features import MAX_CHARACTERS
from edgeft.router.looks import NAMES, looks

WIDTHS = (10.0, 30.0, 100.0)  # of standardised numbers
LANDMARKS = 300  # a few tens of microseconds a decision


def asked(text: str) -> np.ndarray:
    """float64 [len(QUESTION)], compressed by log(1 + |x|)."""
    found = question(text)
    return kernel.compressed(np.array([float(found[name]) for name in QUESTION]))


# Head -> the names of its numbers, and the numbers of a text's beginning: float64 [d].
KINDS: dict[str, tuple[tuple[str, ...], Callable[[str], np.ndarray]]] = {
    "looks": (NAMES, lambda text: np.array(looks(text))),
    "surface": (QUESTION, asked),
}


def numbers(kind: str, text: str) -> np.ndarray:
    """float64 [d] of a request's beginning."""
    return KINDS[kind][1](text[:MAX_CHARACTERS])


def of(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Head -> its numbers of all texts, float64 [n, d]."""
    return {kind: np.array([numbers(kind, text) for text in texts]) for kind in KINDS}


def fit(
    kind: str, rows: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """(tensors, features block, leave-one-out predictions [n, K]) of a head's numbers [n, d] and targets [n, K]."""
    x, mean, scale = kernel.standardised(rows)
    head = kernel.fit(x, targets, WIDTHS, LANDMARKS)
    tensors = {
        f"{kind}.mean": mean.astype(np.float32), f"{kind}.scale": scale.astype(np.float32),
        f"{kind}.landmarks": head.landmarks, f"{kind}.weights": head.weights.astype(np.float32),
        f"{kind}.bias": head.bias.astype(np.float32),
    }  # fmt: skip
    return tensors, {"names": list(KINDS[kind][0]), "width": head.width}, head.left_out


def outputs(kind: str, tensors: Mapping[str, Any], width: float, rows: np.ndarray) -> np.ndarray:
    """The head's outputs [n, K] of its numbers [n, d]."""
    x = kernel.scaled(rows, tensors[f"{kind}.mean"], tensors[f"{kind}.scale"])
    found: np.ndarray = (
        kernel.gram(x, tensors[f"{kind}.landmarks"], width, tensors.get(f"{kind}.landmarks.squared"))
        @ tensors[f"{kind}.weights"]
        + tensors[f"{kind}.bias"]
    )
    return found
