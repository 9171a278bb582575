"""The price of cost (λ) that keeps a budget: found by bisection on what was asked lately. Pure.

Raising λ moves the rule `tradeoff` to cheaper candidates, so the mean cost falls with it.
"""

from __future__ import annotations

import numpy as np

from edgeft.router.figures import picked, tradeoff_choices

STEPS = 60


def price_of_cost(scores: np.ndarray, costs: np.ndarray, per_request: float) -> float:
    """The least λ >= 0 at which recent requests, expected scores and costs [n, candidates], would cost at most `per_request` each in the
    mean; where even the cheapest are too dear, the λ that takes the cheapest everywhere."""

    def spent(price: float) -> float:
        return float(picked(costs, tradeoff_choices(scores, costs, price)).mean())

    if spent(0.0) <= per_request:
        return 0.0
    gaps = np.diff(np.sort(costs, axis=1), axis=1)
    least = float(gaps[gaps > 0].min()) if (gaps > 0).any() else 1.0
    low, high = 0.0, 2.0 * float(np.ptp(scores, axis=1).max() + 1e-9) / least
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= per_request else (middle, high)
    return high


def allowance(
    usd: float, spent_usd: float, elapsed: float, period: float, requests_per_second: float
) -> float:
    """What one request may cost now: what is left of the budget over the requests that are to be expected in what is left of the
    period (times in seconds). Nothing is left where the budget is spent."""
    expected = max(1.0, requests_per_second * max(0.0, period - elapsed))
    return max(0.0, usd - spent_usd) / expected
