"""Are two artefacts different on the same rows? Paired tests, corrected for how many are made.

Right and wrong: exact McNemar. Means (KLD, scores): paired bootstrap over rows. Several comparisons: Holm 1979.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from edgeft.bench.stats import RESAMPLES, mcnemar

ALPHA = 0.05
Z_ALPHA, Z_POWER = 1.959964, 0.841621  # two-sided 5 %, power 80 %


def pairs(items: list[dict[str, Any]], ids: list[str]) -> list[dict[str, Any]]:
    """Every two models on the rows that both answered: lost, gained, difference in points with its interval, p and Holm's p.

    `smallest_shown`: the difference in points that this n would have shown in 4 of 5 cases.
    """
    right = {(i["model_id"], i["item_id"]): i["correct"] for i in items if i["correct"] is not None}
    rows = {m: {item for model, item in right if model == m} for m in ids}
    found = []
    for a, b in itertools.combinations(ids, 2):
        shared = sorted(rows[a] & rows[b])
        if shared:
            left = np.array([right[a, r] for r in shared], dtype=float)
            found.append(
                {"a": a, "b": b, **compare(left, np.array([right[b, r] for r in shared], dtype=float))}
            )
    for entry, p in zip(found, holm([f["mcnemar_p"] for f in found]), strict=True):
        entry["p_holm"], entry["different"] = p, p < ALPHA
    return found


def compare(a: Any, b: Any) -> dict[str, Any]:
    """Right (1) and wrong (0) of two models on the same rows; differences are b - a, in points."""
    lost, gained = int((a > b).sum()), int((b > a).sum())
    low, high = bootstrap_mean(b - a)
    return {
        "n": len(a),
        "lost": lost,
        "gained": gained,
        "points": 100 * float((b - a).mean()),
        "points_ci95": [100 * low, 100 * high],
        "mcnemar_p": mcnemar(lost, gained),
        "smallest_shown_points": 100 * smallest_shown(lost + gained, len(a)),
    }


def smallest_shown(discordant: int, n: int) -> float:
    """The difference of two shares that McNemar's test at 5 % shows with power 0.8 for these rows.

    (z + z') sqrt(d / n), with d the share of rows on which they differ (Connor 1987, to first order); where none differs,
    the upper 95 % bound of d, 3 / n, stands for it.
    """
    share = discordant / n if discordant else min(1.0, 3 / n)
    return min(1.0, (Z_ALPHA + Z_POWER) * math.sqrt(share / n))


def bootstrap_mean(values: Any, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of a mean of paired differences."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
