"""How scores and costs become a choice. Pure arithmetic over numbers; knows nothing of texts or policies.

loss      the cheapest candidate whose expected score lies less than `threshold` below the strongest's; with two
          candidates: strong where the predicted gain is at or above the threshold
tradeoff  argmax of score - λ * cost; ties go to the cheaper
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALWAYS_STRONG, ALWAYS_WEAK = -2.0, 2.0  # thresholds beyond any gain, which lies in -1..1
DEFAULTS: dict[str, Any] = {
    "kind": "loss",
    "threshold": ALWAYS_STRONG,
    "price_of_cost": 0.0,  # λ: score given up for one unit of cost
    "floor": None,  # lowest expected score (0..1)
    "max_cost": None,
    "max_latency_s": None,
    "far": None,  # requests less similar than this to any training row go to the strongest; None: off
    "sticky": True,  # a conversation stays with the candidate that began it
    "explore": 0.0,  # share of requests sent to a stronger candidate than chosen
    "on_suspended": "strong",  # when the certificate is suspended: "strong", or a stricter threshold (a number)
    "budget": None,  # {"usd": …, "per": "day" or "month"}
}


def choose(
    rule: Mapping[str, Any], names: Sequence[str], scores: Sequence[float], costs: Sequence[float]
) -> int:
    """The index of the choice among candidates that are listed cheapest first; the last one is the strongest."""
    if rule["kind"] == "loss":
        threshold = rule["threshold"]
        if threshold <= ALWAYS_STRONG:
            return len(names) - 1
        return next((i for i in range(len(names) - 1) if scores[-1] - scores[i] < threshold), len(names) - 1)
    price = rule["price_of_cost"]
    worth = [score - price * cost for score, cost in zip(scores, costs, strict=True)]
    return max(range(len(names)), key=lambda i: (worth[i], -costs[i], -i))


def ranked(
    rule: Mapping[str, Any], scores: Sequence[float], costs: Sequence[float], chosen: int
) -> list[int]:
    """Who answers where the choice fails: stronger ones by strength, then weaker ones by score."""
    others = [i for i in range(len(scores)) if i != chosen]
    if len(others) < 2:
        return others
    return sorted(others, key=lambda i: (i < chosen, i if i > chosen else -scores[i]))
