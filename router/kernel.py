"""Ridge regression with a Gaussian kernel on at most a few hundred landmarks (Nyström; Williams and Seeger 2000).

    f(x) = bias + sum_j weights_j * exp(-|x - landmark_j|^2 / width)

Width and strength are those of the least exact leave-one-out error, the landmarks taken as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeft.router import ridge

LANDMARKS = 1000
STRENGTHS = tuple(float(v) for v in np.logspace(-1, 2.5, 15))
LIMIT = 4.0  # deviations from the mean
JITTER = 1e-4  # added to the landmarks' own kernel: equal rows may be drawn


@dataclass(frozen=True)
class Kernel:
    """A fitted head with `outputs` columns."""

    landmarks: np.ndarray  # float32 [m, dimensions]
    weights: np.ndarray  # float64 [m, outputs]
    bias: np.ndarray  # float64 [outputs]
    width: float
    loo_mse: list[float]
    left_out: np.ndarray  # float64 [n, outputs]: each row's prediction by the fit without it


def fit(
    x: np.ndarray, y: np.ndarray, widths: Sequence[float], most: int = LANDMARKS, seed: int = 0
) -> Kernel:
    """Fit rows x [n, dimensions] to y [n, outputs]; one width for all outputs, by their summed error, a strength for each."""
    chosen = np.random.default_rng(seed).choice(len(x), min(most, len(x)), replace=False)
    landmarks = np.ascontiguousarray(x[np.sort(chosen)], np.float32)
    best: tuple[float, Kernel] | None = None
    for width in widths:
        values, vectors = np.linalg.eigh(gram(landmarks, landmarks, width) + JITTER * np.eye(len(landmarks)))
        root = vectors / np.sqrt(np.clip(values, 1e-8, None))
        fitted = ridge.fit_all(gram(x, landmarks, width) @ root, y, STRENGTHS)
        total = sum(f.loo_mse / max(f.constant_mse, 1e-12) for f in fitted)
        if best is None or total < best[0]:
            made = Kernel(
                landmarks, root @ np.column_stack([f.weights for f in fitted]), np.array([f.bias for f in fitted]), float(width),
                [f.loo_mse for f in fitted], np.column_stack([f.left_out for f in fitted]),
            )  # fmt: skip
            best = (total, made)
    assert best is not None
    return best[1]


def compressed(counts: np.ndarray) -> np.ndarray:
    """Counts as sign(x) * log(1 + |x|): a text has one number or thirty."""
    found: np.ndarray = np.sign(counts) * np.log1p(np.abs(counts))
    return found


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of mean 0 and deviation 1, clipped to LIMIT; mean; scale). A column without spread becomes 0."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale < 1e-9, 1.0, scale)
    return scaled(x, mean, scale), mean, scale


def scaled(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows by a mean and a scale that were fitted, clipped to LIMIT deviations."""
    found: np.ndarray = np.clip((x - mean) / scale, -LIMIT, LIMIT)
    return found


def gram(x: np.ndarray, landmarks: np.ndarray, width: float, lengths: np.ndarray | None = None) -> np.ndarray:
    """The kernel of rows x [n, d] and landmarks [m, d]: float64 [n, m]. `lengths` [m]: the landmarks' squared, where they are known."""
    x = np.asarray(x, np.float32)
    if lengths is None:
        lengths = squared(landmarks)
    squares = (x**2).sum(1)[:, None] + lengths[None] - 2 * x @ landmarks.T
    return np.exp(-np.clip(squares, 0, None) / np.float32(width)).astype(np.float64)


def squared(x: np.ndarray) -> np.ndarray:
    """Squared lengths of rows [n, d]: [n]."""
    found: np.ndarray = (x**2).sum(1)
    return found


def predict(head: Kernel, x: np.ndarray) -> np.ndarray:
    """float64 [n, outputs]."""
    return gram(x, head.landmarks, head.width) @ head.weights + head.bias
