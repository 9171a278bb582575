"""Tests and intervals of a comparison: resampled rounds, Student's t, Holm, and what a sample could have shown.

Samples of one round share the round's noise, so rounds are resampled, not samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 2000
FEWEST_ROUNDS = 3

Rounds = list[list[float]]  # samples by round, all above zero


@dataclass(frozen=True)
class LogRatio:
    """ln(b/a) of medians, its standard error over rounds, and Student's degrees of freedom."""

    value: float
    error: float | None  # None with fewer than three rounds
    freedom: int

    def interval(self, alpha: float = ALPHA) -> list[float] | None:
        """The interval of the ratio b/a at confidence 1 - alpha."""
        if self.error is None:
            return None
        half = t_quantile(1 - alpha / 2, self.freedom) * self.error
        return [math.exp(self.value - half), math.exp(self.value + half)]

    def p(self) -> float | None:
        """Two-sided p that the ratio is 1; the intervals above are this test turned round."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.value == 0)
        return 2 * (1 - t_cdf(abs(self.value) / self.error, self.freedom))

    def could_show(self, alpha: float, floor: float) -> float | None:
        """The smallest |ln ratio| that would be called in 80 % of runs like these: above `floor` and above chance."""
        if self.error is None:
            return None
        reach = max(floor, t_quantile(1 - alpha / 2, self.freedom) * self.error)
        return reach + t_quantile(POWER, self.freedom) * self.error


def log_ratio(a: Rounds, b: Rounds, paired: bool, seed: int = 0) -> LogRatio:
    """Compare two sets of rounds by their medians, rounds resampled 2,000 times.

    Not paired: ln of the ratio of the medians over all samples. Paired (round i of both was taken together): the median
    of the rounds' own ln ratios, which is free of what a round did to both. The standard error is the bootstrap's
    deviation times sqrt(n/(n-1)), as a bootstrap of few rounds is too narrow; Student's t has n-1 degrees a side.
    """
    chance = np.random.default_rng(seed)
    if paired:
        ratios = [[math.log(np.median(y) / np.median(x))] for x, y in zip(a, b, strict=True)]
        value = float(np.median(ratios))
        if len(a) < FEWEST_ROUNDS:
            return LogRatio(value, None, 1)
        return LogRatio(value, math.sqrt(_variance(ratios, chance, np.asarray)), len(a) - 1)
    value = math.log(float(np.median(np.concatenate(b)) / np.median(np.concatenate(a))))
    if min(len(a), len(b)) < FEWEST_ROUNDS:
        return LogRatio(value, None, 1)
    return LogRatio(
        value, math.sqrt(_variance(a, chance, np.log) + _variance(b, chance, np.log)), len(a) + len(b) - 2
    )


def _variance(rounds: Rounds, chance: np.random.Generator, scale: Any) -> float:
    """The bootstrap's variance of the median on a scale, made right for few rounds."""
    picks = chance.integers(0, len(rounds), (RESAMPLES, len(rounds)))
    return float(scale(medians(rounds, picks)).var()) * len(rounds) / (len(rounds) - 1)


def medians(rounds: Rounds, picks: Any) -> Any:
    """The median over the samples of each draw of rounds; `picks` [draws, rounds a draw] are places in `rounds`."""
    longest = max(len(r) for r in rounds)
    padded = np.full((len(rounds), longest), np.nan)
    for index, samples in enumerate(rounds):
        padded[index, : len(samples)] = samples
    drawn = padded[picks].reshape(len(picks), -1)
    return np.nanmedian(drawn, axis=1) if np.isnan(padded).any() else np.median(drawn, axis=1)


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t: with t = sqrt(v) tan(u) its density is cos(u)^(v-1), integrated by Simpson's rule."""
    half = _simpson(math.atan(abs(t) / math.sqrt(freedom)), freedom)
    share = 0.5 + 0.5 * half / _simpson(math.pi / 2, freedom)
    return share if t >= 0 else 1 - share


def _simpson(end: float, freedom: int) -> float:
    points = np.linspace(0, end, 2001)
    values = np.cos(points) ** (freedom - 1)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * values).sum() * end / 6000)


@cache
def t_quantile(p: float, freedom: int) -> float:
    """The t below which Student's t falls with probability p (0.5 <= p < 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def holm(ps: Sequence[float]) -> tuple[list[float], list[float]]:
    """Holm's step-down over p-values (Holm 1979): (adjusted p, the level that each was held to), in the order given.

    After the first that is not significant the level stays, so an interval at it says what the adjusted p says.
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, levels, highest, level = [0.0] * len(ps), [0.0] * len(ps), 0.0, 0.0
    for rank, index in enumerate(order):
        left = len(ps) - rank
        if highest < ALPHA:
            level = ALPHA / left
        highest = max(highest, min(1.0, left * ps[index]))
        adjusted[index], levels[index] = highest, level
    return adjusted, levels


def paired_mean(differences: Sequence[float], seed: int = 0) -> tuple[float, list[float], float]:
    """Mean of paired differences, its 95 % bootstrap interval over items, and the two-sided p of flipping signs."""
    values = np.asarray(differences, dtype=float)
    chance = np.random.default_rng(seed)
    n = len(values)
    means = [values[chance.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    flipped = [((chance.integers(0, 2, n) * 2 - 1) * values).mean() for _ in range(RESAMPLES)]
    p = (sum(abs(m) >= abs(values.mean()) - 1e-12 for m in flipped) + 1) / (RESAMPLES + 1)
    return float(values.mean()), [float(np.percentile(means, q)) for q in (2.5, 97.5)], p


def mcnemar_could_show(n: int, discordant: int, alpha: float) -> float | None:
    """The smallest difference of two shares right that McNemar's test on n pairs shows with 80 % power.

    Solves n d^2 = (z_(alpha/2) sqrt(s) + z_power sqrt(s - d^2))^2 for d (Connor 1987), where s is the share of items
    that one side alone has right, as seen, and at least d; fewer than 1 - log2(alpha) of them cannot be significant in
    the exact test. None where n is too small for any difference.
    """
    z, power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(POWER)

    def shown(d: float) -> bool:
        s = max(discordant / n, d)
        return (
            n * d >= 1 - math.log2(alpha)
            and n * d * d >= (z * math.sqrt(s) + power * math.sqrt(s - d * d)) ** 2
        )

    if n == 0 or not shown(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high
