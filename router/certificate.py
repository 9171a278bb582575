"""What a rule promises: with confidence 1 - delta, a request is kept from the strongest candidate and loses by it in at most a
share alpha of requests like the calibration rows.

    loss(row, rule) = 1[the choice is not the strongest and scores less than it]
    certified: the laxest rule of a grid, fixed before these rows were seen, up to which every rule's Clopper-Pearson
    upper bound at 1 - delta is <= alpha (fixed-sequence testing, arXiv 2110.01052; with two candidates it is RCPS)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def upper_bound(losses: int, n: int, delta: float) -> float:
    """Clopper-Pearson's one-sided upper bound at confidence 1 - delta of a rate, `losses` seen among n."""
    if losses >= n:
        return 1.0
    low, high = losses / n, 1.0
    counts = np.arange(losses + 1)
    choose = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts])
    for _ in range(60):
        p = (low + high) / 2
        if float(np.exp(choose + counts * math.log(p) + (n - counts) * math.log1p(-p)).sum()) > delta:
            low = p
        else:
            high = p
    return high


def most_losses(n: int, alpha: float, delta: float) -> int:
    """The largest number of losses among n whose upper bound is at most alpha; -1 where even none is too many."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if upper_bound(middle, n, delta) <= alpha else (low, middle)
    return low


def least_n(alpha: float, delta: float, rate: float = 0.0) -> int | None:
    """The least n at which a rule that loses at `rate` could be certified; None where the rate is not below alpha."""
    if rate >= alpha:
        return None
    if rate == 0:
        return math.ceil(math.log(delta) / math.log1p(-alpha))
    n = math.ceil(math.log(delta) / math.log1p(-alpha))
    while upper_bound(math.ceil(rate * n), n, delta) > alpha:
        n = math.ceil(n * 1.05) + 1
    return n


def losses_of(quality: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """bool [n]: the choice is not the strongest (the last column) and scores less than it."""
    return quality[np.arange(len(quality)), choice] < quality[:, -1]


def certify(losses: Sequence[int], n: int, alpha: float, delta: float) -> int:
    """How many rules of the sequence (strict to lax; losses of each among n rows) are certified: those before the first
    whose bound is over alpha."""
    allowed = most_losses(n, alpha, delta)
    return next((place for place, count in enumerate(losses) if count > allowed), len(losses))


def rcps_threshold(gains: np.ndarray, loss_if_kept: np.ndarray, alpha: float, delta: float) -> float:
    """The two-candidate threshold on predicted gains (kept where gain < threshold): the largest whose bound is at most alpha.
    The loss only grows with the threshold, so any of the rows' own scores may bound it. -inf where nothing can be kept."""
    allowed = most_losses(len(gains), alpha, delta)
    if allowed < 0:
        return -math.inf
    order = np.argsort(gains, kind="stable")
    total = np.cumsum(loss_if_kept[order])
    over = np.flatnonzero(total > allowed)
    # Kept is gain < threshold: the first row that would bring one loss too many stays out, and its equals with it.
    return float(gains[order][over[0]]) if len(over) else math.inf


def random_share(quality: np.ndarray, alpha: float) -> float:
    """The share that keeping at random could keep at the cheapest candidate with an expected loss of alpha."""
    rate = float((quality[:, 0] < quality[:, -1]).mean())
    return 1.0 if rate <= alpha else alpha / rate


def full_knowledge_share(kept: np.ndarray, losses: np.ndarray, alpha: float) -> float:
    """The share the same scores would keep if these rows were all there is: of the rules up to the first whose plain rate is
    over alpha. `kept` and `losses` are shares by rule, strict to lax."""
    over = np.flatnonzero(losses > alpha)
    last = over[0] if len(over) else len(kept)
    return float(kept[last - 1]) if last else 0.0


def risk_given_kept(
    kept: np.ndarray, lost: np.ndarray, groups: Sequence[str | None], delta: float
) -> dict[str, Any]:
    """Losses among what was kept, with their upper bound, over all and by group (a group's bound holds for it alone)."""

    def told(mask: np.ndarray) -> dict[str, Any]:
        n, bad = int((kept & mask).sum()), int((lost & mask).sum())
        return {
            "rows": int(mask.sum()),
            "kept": n,
            "lost": bad,
            "risk_given_kept": bad / n if n else None,
            "upper_bound": upper_bound(bad, n, delta) if n else None,
        }

    names = np.array([group or "" for group in groups])
    return {
        "all": told(np.ones(len(kept), bool)),
        "groups": {str(name): told(names == name) for name in sorted(set(names) - {""})},
    }
