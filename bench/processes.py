"""Several processes of one artefact: how far they lie apart, and what can be said of the artefact beyond them.

A process keeps its noise (memory layout, placement) for its life, so no number of samples of one shows how far the next one
lies. What is told of several is the mean over processes of the logarithm of each one's median, with an error by a hierarchical
bootstrap: processes are drawn, then rounds within each (Davison and Hinkley 1997, 3.8). A bootstrap of few is too narrow, so
its deviation is taken times sqrt(n/(n-1)) and held against Student's t with n-1 degrees, n the processes. Drawing rounds as
well counts their noise twice, and errs on the wide side where processes are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from edgeft.bench import significance
from edgeft.bench.significance import ALPHA, RESAMPLES, LogRatio, Rounds, medians, t_quantile

FEWEST_PROCESSES = 3  # with two, t is 12.7: rounds are resampled as if of one process, and that is said

Processes = list[Rounds]  # rounds by process, samples by round, all above zero


def split(rounds: Rounds, labels: Sequence[Any]) -> Processes:
    """Rounds by the process that each is of, in the order in which processes come."""
    found: dict[Any, Rounds] = {}
    for samples, label in zip(rounds, labels, strict=True):
        found.setdefault(label, []).append(samples)
    return list(found.values())


def variance(processes: Processes, scale: Callable[[Any], Any], chance: np.random.Generator) -> float:
    """Of the mean over processes of scale(median): by the hierarchical bootstrap, made right for few processes."""
    n = len(processes)
    inner = [
        scale(medians(rounds, chance.integers(0, len(rounds), (RESAMPLES * n, len(rounds)))))
        for rounds in processes
    ]
    picks = chance.integers(0, n, (RESAMPLES, n))
    drawn = np.take_along_axis(np.reshape(inner, (n, RESAMPLES, n)), picks[None], axis=0)[0]
    return float(drawn.mean(axis=1).var()) * n / (n - 1)


def interval(processes: Processes) -> list[float]:
    """The 95 % interval of an artefact's median over three or more processes; the median over all samples lies in it."""
    middle = float(np.mean([_log_median(rounds) for rounds in processes]))
    error = math.sqrt(variance(processes, np.log, np.random.default_rng(0)))
    half = t_quantile(1 - ALPHA / 2, len(processes) - 1) * error
    seen = float(np.median(list(chain(*chain(*processes)))))
    return [min(math.exp(middle - half), seen), max(math.exp(middle + half), seen)]


def log_ratio(a: Processes, b: Processes, paired: bool, seed: int = 0) -> LogRatio:
    """`significance.log_ratio` where both sides have three processes or more; else of all their rounds, as if of one process.

    Paired (round i of process k of both was taken together): the mean over processes of the median of the rounds' own ln
    ratios. Not paired: the difference of the sides' means, with Welch's degrees of freedom.
    """
    if not several(a, b):
        return significance.log_ratio(list(chain(*a)), list(chain(*b)), paired, seed)
    chance = np.random.default_rng(seed)
    if paired:
        ratios = [
            [[math.log(np.median(y) / np.median(x))] for x, y in zip(left, right, strict=True)]
            for left, right in zip(a, b, strict=True)
        ]
        value = float(np.mean([np.median(rounds) for rounds in ratios]))
        return LogRatio(value, math.sqrt(variance(ratios, np.asarray, chance)), len(ratios) - 1)
    means = [float(np.mean([_log_median(rounds) for rounds in side])) for side in (a, b)]
    parts = [variance(side, np.log, chance) for side in (a, b)]
    weighed = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    freedom = int(sum(parts) ** 2 / weighed) if weighed else len(a) + len(b) - 2
    return LogRatio(means[1] - means[0], math.sqrt(sum(parts)), max(1, freedom))


def several(*sides: Processes) -> bool:
    """Has every side enough processes to tell how far they lie apart?"""
    return min(map(len, sides)) >= FEWEST_PROCESSES


def _log_median(rounds: Rounds) -> float:
    return math.log(float(np.median(list(chain(*rounds)))))
