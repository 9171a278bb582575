"""Quality against the share or the cost that goes to the stronger model.

    PGR(share) = (Q - Qw) / (Qs - Qw)      CPT(x): the share at which PGR = x      APGR: the area under PGR over the share

The published protocol (arXiv 2406.18665): thresholds at the 11 edges of ten quantiles of the scores, strong where
score >= edge (the last edge: >), np.interp for CPT, trapezoids for the area. Random routing has .50.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pgr_curve(scores: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share to strong, PGR) at the protocol's thresholds, the share rising from 0 to 1.

    Scores are predicted gains [n]. Raises ValueError where strong is not better than weak on these rows.
    """
    gap = strong.mean() - weak.mean()
    if gap <= 0:
        raise ValueError("strong is not better than weak on these rows: PGR is not defined")
    edges = np.unique(
        np.quantile(scores, np.linspace(0, 1, 11))
    )  # equal edges count once, as in pd.qcut(duplicates="drop")
    shares, found = [], []
    for place, edge in enumerate(edges):
        sent = scores > edge if place == len(edges) - 1 else scores >= edge
        shares.append(sent.mean())
        found.append((np.where(sent, strong, weak).mean() - weak.mean()) / gap)
    if len(edges) == 1:  # every score alike: all or nothing
        shares, found = [1.0, 0.0], [1.0, 0.0]
    return np.array(shares[::-1]), np.array(found[::-1])


def apgr(scores: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> float:
    """The area under PGR over the share."""
    share, pgr = pgr_curve(scores, weak, strong)
    return float(np.trapezoid(pgr, share))


def routing_figures(scores: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> dict[str, float]:
    """APGR, CPT50 and CPT80 by the protocol, which takes PGR to be monotone, and of its isotonic fit."""
    share, pgr = pgr_curve(scores, weak, strong)
    rising = isotonic(pgr)
    return {
        "apgr": float(np.trapezoid(pgr, share)),
        "cpt50": float(np.interp(0.5, pgr, share)),
        "cpt80": float(np.interp(0.8, pgr, share)),
        "apgr_isotonic": float(np.trapezoid(rising, share)),
        "cpt50_isotonic": float(np.interp(0.5, rising, share)),
        "cpt80_isotonic": float(np.interp(0.8, rising, share)),
    }


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest in squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * count) / (before[1] + count)
            before[1] += count
    return np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks])


def hull(costs: Sequence[float], qualities: Sequence[float]) -> list[tuple[float, float]]:
    """The non-decreasing upper convex hull of (cost, quality) points, by rising cost."""
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(zip(costs, qualities, strict=True), key=lambda p: (p[0], -p[1])):
        if kept and quality <= kept[-1][1]:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], (cost, quality)):
            kept.pop()
        kept.append((float(cost), float(quality)))
    return kept


def aiq(costs: Sequence[float], qualities: Sequence[float]) -> float | None:
    """Average improvement in quality: the area under the hull divided by the cost range (RouterBench, arXiv 2403.12031);
    None where all costs are one."""
    low, high = min(costs), max(costs)
    if high <= low:
        return None
    points = hull(costs, qualities)
    if points[-1][0] < high:
        points.append((high, points[-1][1]))
    xs, ys = zip(*points, strict=True)
    return float(np.trapezoid(ys, xs) / (high - low))


def _slope(one: tuple[float, float], two: tuple[float, float]) -> float:
    return (two[1] - one[1]) / (two[0] - one[0])


def interval(statistic: Any, n: int, seed: int = 0, resamples: int = 1000) -> list[float] | None:
    """95 % percentile bootstrap of `statistic(row indices)` over n rows; resamples on which it is not defined are left out,
    and None is given where these are more than one in twenty."""
    chance, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        try:
            found.append(statistic(chance.integers(0, n, n)))
        except ValueError:
            continue
    if len(found) < 0.95 * resamples:
        return None
    return np.asarray(np.percentile(found, [2.5, 97.5])).tolist()
