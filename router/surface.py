"""A head on what a request looks like: its length, its sentences, the numbers in it, words such as "each" and "percent".

Gaussian kernel ridge on these, kept where the blend with it is better on rows left out (`blend.pays`): worked questions
have a difficulty that shows in their numbers, most other text has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgeft.router import kernel
from edgeft.router.draft_features import QUESTION, question
from edgeft.router.features import MAX_CHARACTERS

WIDTHS = (10.0, 30.0, 100.0)  # of standardised numbers
LANDMARKS = 300  # a few tens of microseconds a decision


def numbers(text: str) -> np.ndarray:
    """float64 [len(QUESTION)] of a request's beginning, compressed by log(1 + |x|)."""
    found = question(text[:MAX_CHARACTERS])
    row = np.array([float(found[name]) for name in QUESTION])
    return kernel.compressed(row)


def fit(rows: np.ndarray, targets: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """(tensors, features block, leave-one-out predictions [n, K]) of `numbers` [n, d] and targets [n, K]."""
    x, mean, scale = kernel.standardised(rows)
    head = kernel.fit(x, targets, WIDTHS, LANDMARKS)
    tensors = {
        "surface.mean": mean.astype(np.float32), "surface.scale": scale.astype(np.float32),
        "surface.landmarks": head.landmarks, "surface.weights": head.weights.astype(np.float32),
        "surface.bias": head.bias.astype(np.float32),
    }  # fmt: skip
    return (
        tensors,
        {"kind": "kernel on the request's surface", "names": list(QUESTION), "width": head.width},
        head.left_out,
    )


def outputs(tensors: Mapping[str, Any], spec: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
    """The head's outputs [n, K] of `numbers` [n, d]."""
    x = kernel.scaled(rows, tensors["surface.mean"], tensors["surface.scale"])
    found: np.ndarray = (
        kernel.gram(x, tensors["surface.landmarks"], spec["width"]) @ tensors["surface.weights"]
        + tensors["surface.bias"]
    )
    return found


def of(texts: Sequence[str]) -> np.ndarray:
    """`numbers` of texts, float64 [n, d]."""
    return np.array([numbers(text) for text in texts])
