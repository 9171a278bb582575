"""Are two artefacts different on the same rows? Paired tests, corrected for how many are made.

Right and wrong: exact McNemar, the difference with a paired bootstrap over rows. Several comparisons: Holm 1979.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from edgeft.bench.significance import ALPHA, holm, mcnemar_could_show, paired_mean
from edgeft.bench.stats import mcnemar


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
    adjusted, _ = holm([f["mcnemar_p"] for f in found])
    for entry, p in zip(found, adjusted, strict=True):
        entry["p_holm"], entry["different"] = p, p < ALPHA
    return found


def compare(a: Any, b: Any) -> dict[str, Any]:
    """Right (1) and wrong (0) of two models on the same rows; differences are b - a, in points."""
    lost, gained = int((a > b).sum()), int((b > a).sum())
    mean, (low, high), _ = paired_mean(b - a)
    shown = mcnemar_could_show(len(a), lost + gained, ALPHA)
    return {
        "n": len(a),
        "lost": lost,
        "gained": gained,
        "points": 100 * mean,
        "points_ci95": [100 * low, 100 * high],
        "mcnemar_p": mcnemar(lost, gained),
        "smallest_shown_points": None if shown is None else 100 * shown,
    }
