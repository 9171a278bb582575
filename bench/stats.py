"""The statistics that a report quotes. Samples are kept beside every summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeft.bench import processes as of_processes

RESAMPLES = 2000


def summary(samples: Sequence[float], processes: Sequence[int] | None = None) -> dict[str, Any]:
    """p50, p90, p95, p99, n, the raw samples and a bootstrap 95 % interval of the median; units are the samples'.

    `processes` says which process each sample, above zero, is of: from three on the interval is over them (`edgeft.bench.processes`)
    and `processes` in the result says over how many.
    """
    values = np.asarray(samples, dtype=float)
    found: dict[str, Any] = {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 95, 99)}
    grouped = of_processes.split([[float(v)] for v in values], processes) if processes else []
    if grouped and of_processes.several(grouped):
        found |= {"p50_ci95": of_processes.interval(grouped), "processes": len(grouped)}
    else:
        found["p50_ci95"] = bootstrap(values, np.median)
    return {**found, "n": len(values), "samples": [float(v) for v in values]}


def bootstrap(values: Any, statistic: Any, seed: int = 0) -> list[float]:
    """The 95 % percentile-bootstrap interval of a statistic over the first axis."""
    values = np.asarray(values, dtype=float)
    chance = np.random.default_rng(seed)
    picks = chance.integers(0, len(values), (RESAMPLES, len(values)))
    found = statistic(values[picks], axis=1)
    return [float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))]


def bootstrap_ratio_of_sums(sums: Any, counts: Any, seed: int = 0) -> list[float]:
    """The 95 % bootstrap interval of sum(sums)/sum(counts), resampling rows: positions of a row go together."""
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    found = sums[picks].sum(1) / counts[picks].sum(1)
    return [float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))]


def wilson(right: int, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    if n == 0:
        return [0.0, 1.0]
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that two classifiers right on `only_a` and `only_b` items alone are equally good."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def retention(
    quantized: Any, merged: Any, base: Any, seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """Adapter-gain retention (quantized - base)/(merged - base) of mean scores over the same rows, and its 95 % interval.

    The interval is a bootstrap of the ratio over rows. (None, None) where merged is not better than base; no interval
    where more than 2.5 % of the resamples show no gain, since the ratio then has no bound.
    """
    q, m, b = (np.asarray(scores, dtype=float) for scores in (quantized, merged, base))
    if not len(q) == len(m) == len(b):
        raise ValueError(f"{len(q)}, {len(m)} and {len(b)} scores are not of the same rows")
    if len(m) == 0 or m.mean() <= b.mean():
        return None, None
    value = float((q.mean() - b.mean()) / (m.mean() - b.mean()))
    picks = np.random.default_rng(seed).integers(0, len(m), (RESAMPLES, len(m)))
    gain = (m - b)[picks].mean(1)
    shown = gain > 0
    if (~shown).mean() > 0.025:
        return value, None
    found = (q - b)[picks].mean(1)[shown] / gain[shown]
    return value, [float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))]
