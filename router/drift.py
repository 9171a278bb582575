"""Does traffic still look like the calibration rows? Scores, lengths, similarity to the fitting rows and their clusters, by a chi-square test.

Alarms at p below FALSE_ALARMS over all features together, looked at once a window: a certificate is then suspended, not changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 10
WINDOW = 500  # requests a look; fewer than 20 expected a bin say little
FALSE_ALARMS = 0.001  # of a look without drift
FEATURES = ("gain", "log_characters", "similarity")  # in bins
CLUSTER = "cluster"  # counted as it is, where the policy has clusters


def observe(gain: float, characters: int, similarity: float, cluster: int | None = None) -> dict[str, float]:
    """What the alarm keeps of one request: no text."""
    found = {"gain": gain, "log_characters": math.log1p(characters), "similarity": similarity}
    return found if cluster is None else {**found, CLUSTER: cluster}


def reference(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Edges of bins of about equal mass and their shares, from the calibration rows. Ties can make fewer bins."""
    found: dict[str, Any] = {"n": len(rows)}
    for name in FEATURES:
        values = np.array([row[name] for row in rows])
        edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]))
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        found[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    if rows and all(CLUSTER in row for row in rows):
        found[CLUSTER] = {"counts": np.bincount([int(row[CLUSTER]) for row in rows]).tolist()}
    return found


def alarm(known: Mapping[str, Any], window: Sequence[Mapping[str, float]]) -> str | None:
    """Why the window does not look like the reference, or None. Both samples count: Pearson's test of two rows of counts."""
    names = [name for name in (*FEATURES, CLUSTER) if name in known and all(name in row for row in window)]
    for name in names:
        values = [row[name] for row in window]
        places = (
            np.searchsorted(known[name]["edges"], values, side="right")
            if name != CLUSTER
            else np.array(values, int)
        )
        before = np.array(known[name]["counts"], float)
        before = np.pad(
            before, (0, max(0, int(places.max()) + 1 - len(before)))
        )  # a cluster that no row was in
        now = np.bincount(places, minlength=len(before)).astype(float)
        there = before + now > 0
        before, now = before[there], now[there]
        if len(before) < 2:
            continue
        total = before + now
        expected_now, expected_before = total * now.sum() / total.sum(), total * before.sum() / total.sum()
        statistic = float(
            (
                (now - expected_now) ** 2 / expected_now + (before - expected_before) ** 2 / expected_before
            ).sum()
        )
        p = chi_square_tail(statistic, len(before) - 1)
        if p < FALSE_ALARMS / len(names):
            return f"{name} of the last {len(window)} requests (p = {p:.1g})"
    return None


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(chi-square with so many degrees of freedom > statistic): the regularised upper incomplete gamma function by its series."""
    a, x = freedom / 2, statistic / 2
    if x <= 0:
        return 1.0
    if x < a + 1:
        term = total = 1 / a
        k = a
        while abs(term) > 1e-15 * abs(total):
            k += 1
            term *= x / k
            total += term
        return max(0.0, 1 - total * math.exp(-x + a * math.log(x) - math.lgamma(a)))
    # Lentz's continued fraction (Press et al., Numerical Recipes, 6.2).
    b, c = x + 1 - a, 1e300
    d = 1 / b
    h = d
    for i in range(1, 500):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b or 1e-300)
        c = b + step / c or 1e-300
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(-x + a * math.log(x) - math.lgamma(a)) * h
