"""Ridge regression in closed form, its strength chosen by leaving one row out.

    minimise |y - b - X w|^2 + strength |w|^2        the bias b is not penalised

One eigendecomposition, of the smaller of X X' (dual) and X' X (primal), serves every strength. The
leave-one-out residual is exact: (y_i - f(x_i)) / (1 - H_ii), H the matrix that maps y to the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STRENGTHS = tuple(float(s) for s in np.logspace(-2, 3, 21))


@dataclass(frozen=True)
class Ridge:
    """A fitted line: prediction = x @ weights + bias."""

    weights: np.ndarray  # float64 [dimensions]
    bias: float
    strength: float
    loo_mse: float  # mean squared error of the left-out rows
    constant_mse: float  # the same of the mean alone, to compare with
    left_out: np.ndarray  # float64 [n]: each row's prediction by the fit without it


def fit(x: np.ndarray, y: np.ndarray, strengths: tuple[float, ...] = STRENGTHS) -> Ridge:
    """Fit rows x [n, dimensions], n >= 2, to y [n]; the strength with the least leave-one-out error wins."""
    return fit_all(x, y[:, None], strengths)[0]


def fit_all(x: np.ndarray, y: np.ndarray, strengths: tuple[float, ...] = STRENGTHS) -> list[Ridge]:
    """Fit each column of y [n, outputs] with a strength of its own; the decomposition is shared."""
    n = len(y)
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred, target = x - x_mean, y - y_mean
    dual = n < x.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if dual else centred.T @ centred)
    values = np.clip(values, 0.0, None)
    keep = values > 1e-10 * max(1.0, float(values[-1]))
    values, vectors = values[keep], vectors[:, keep]
    # Rows in the eigenbasis: left [n, rank] orthonormal, right = X' left [dimensions, rank].
    left = vectors if dual else centred @ vectors / np.sqrt(values)
    along = left.T @ target
    squared = left**2
    best: list[Any] = [None] * y.shape[1]
    for strength in strengths:
        shrink = values / (values + strength)
        fitted = left @ (shrink[:, None] * along)
        leverage = 1.0 / n + squared @ shrink
        residuals = (target - fitted) / np.clip(1.0 - leverage, 1e-9, None)[:, None]
        for column, error in enumerate(np.mean(residuals**2, axis=0)):
            if best[column] is None or error < best[column][0]:
                best[column] = (float(error), strength, y[:, column] - residuals[:, column])
    found = []
    for column, (error, strength, left_out) in enumerate(best):
        weights = centred.T @ (left @ (along[:, column] / (values + strength)))
        constant = float(np.mean((target[:, column] * n / (n - 1)) ** 2))
        bias = float(y_mean[column] - x_mean @ weights)
        found.append(Ridge(weights, bias, strength, error, constant, left_out))
    return found
