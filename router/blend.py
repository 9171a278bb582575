"""Several heads' predictions as one: per output the non-negative weights of least squares on leave-one-out predictions, drawn towards
equal ones.

A head's prediction explains a few hundredths of what a request gains, so that weights fitted on some hundred rows are mostly chance, and equal
ones are hard to beat (Clemen 1989; shrinking towards them: Diebold and Pauly 1990). With thousands of rows the data decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SPREAD = 0.2  # standard deviation of the weights round equal ones, before the rows are seen
FREE = 1e6  # as SPREAD: nothing is drawn anywhere
Z = 0.5  # standard errors


def fit(left_out: Sequence[np.ndarray], targets: np.ndarray, spread: float = SPREAD) -> dict[str, np.ndarray]:
    """The tensors `blend` [heads, K] and `blend.means` [K] of the heads' leave-one-out predictions, each [n, K], and targets [n, K]."""
    means = targets.mean(0)
    weights = [
        nonnegative([p[:, i] - means[i] for p in left_out], targets[:, i] - means[i], spread)
        for i in range(targets.shape[1])
    ]
    return {"blend": np.column_stack(weights).astype(np.float32), "blend.means": means.astype(np.float32)}


def mix(tensors: Mapping[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Blended outputs [n, K] of the heads' outputs, each [n, K], in the order that they were fitted in."""
    means = tensors["blend.means"]
    found: np.ndarray = means + sum(
        weight * (part - means) for weight, part in zip(tensors["blend"], parts, strict=True)
    )
    return found


def pays(left_out: Sequence[np.ndarray], more: np.ndarray, targets: np.ndarray) -> bool:
    """Does the blend with one head more have a smaller left-out error of the gains (columns from 1), by Z standard errors over the rows?

    Columns count by their own spread, so that each candidate weighs the same. The weights compared are not drawn towards equal ones: one
    head more would lower the others' share, which looks like a gain where they say too much.
    """
    gains = targets[:, 1:]
    spread = np.maximum(gains.var(0), 1e-12)
    without, with_it = (
        (((mix(fit(parts, targets, FREE), parts)[:, 1:] - gains) ** 2) / spread).mean(1)
        for parts in (list(left_out), [*left_out, more])
    )
    saved = without - with_it
    return bool(saved.mean() > Z * saved.std(ddof=1) / np.sqrt(len(saved)) > 0)


def nonnegative(predictions: Sequence[np.ndarray], target: np.ndarray, spread: float = SPREAD) -> np.ndarray:
    """The non-negative weights w of centred predictions that make sum (target - sum_k w_k prediction_k)^2 + var(target) / spread^2 *
    sum_k (w_k - 1/K)^2 least: the best of all subsets whose weights are positive."""
    x = np.column_stack(predictions)
    heads = x.shape[1]
    penalty = float(target.var()) / spread**2
    square = x.T @ x + penalty * np.eye(heads)
    along = x.T @ target + penalty / heads
    best, found = 0.0, np.zeros(heads)
    for size in range(1, heads + 1):
        for subset in itertools.combinations(range(heads), size):
            weights = np.zeros(heads)
            weights[list(subset)] = np.linalg.lstsq(
                square[np.ix_(subset, subset)], along[list(subset)], rcond=None
            )[0]
            error = float(weights @ square @ weights - 2 * along @ weights)
            if (weights >= 0).all() and error < best - 1e-12:
                best, found = error, weights
    return found
