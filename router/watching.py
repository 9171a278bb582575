"""What serving keeps between requests: the last observations for the drift alarm, and recent scores and costs for the budget's λ.

Both are told of a request in microseconds and compute only at a look, one in so many requests. No text stands here, and no clock: the
caller says what time it is. One event loop's use; not safe to call from several threads at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.router import budget, drift
from edgeft.router.figures import loss_choices, picked, tradeoff_choices
from edgeft.types import Decision

if TYPE_CHECKING:
    from edgeft.router.policy import LoadedPolicy

LOOK_EVERY = (
    drift.WINDOW
)  # each window is looked at once: windows that overlap would count the same requests twice
BUDGET_WINDOW = 500
PERIODS_S = {"day": 86_400.0, "month": 2_629_746.0}  # a month is the mean of the Gregorian calendar's


class DriftWatch:
    """The last `drift.WINDOW` requests against a certificate's reference. `suspended_because` is None until an alarm, and stays from then on:
    traffic that has drifted back is no proof, `edgeft route recertify` or a hand lifts it."""

    def __init__(self, certificate: Mapping[str, Any] | None) -> None:
        held = certificate if certificate and not certificate.get("void") else None
        self.known: Mapping[str, Any] | None = held.get("drift_reference") if held else None
        self.window: deque[dict[str, float]] = deque(maxlen=drift.WINDOW)
        self.since_look = 0
        self.suspended_because: str | None = None

    def saw(self, decision: Decision, characters: int, similarity: float, cluster: int | None = None) -> bool:
        """Count one decided request (length of its last user message, `Features.similarity`, `heads.cluster_of`); True where the
        certificate is to be suspended from now on (`State(suspended=True)`). A decision for which a candidate was removed is not counted:
        its gain is not that of cheapest against strongest, and the certificate does not speak of it."""
        if self.known is None or decision.removed:
            return self.suspended_because is not None
        self.window.append(drift.observe(decision.predicted_gain, characters, similarity, cluster))
        self.since_look += 1
        if self.since_look >= LOOK_EVERY and self.suspended_because is None:
            self.since_look = 0
            self.suspended_because = drift.alarm(self.known, self.window)
        return self.suspended_because is not None


class BudgetWatch:
    """The λ that keeps a budget of `usd` a `period` ("day" or "month"), from the last BUDGET_WINDOW decisions. `rule` is the policy's: while
    its own choices fit into what is left there is no λ, and decisions stay certified."""

    def __init__(self, usd: float, period: str, rule: Mapping[str, Any], look_every: int = 100) -> None:
        self.rule = rule
        self.usd, self.period_s, self.look_every = usd, PERIODS_S[period], look_every
        self.recent: deque[tuple[float, list[float], list[float]]] = deque(maxlen=BUDGET_WINDOW)
        self.began_s: float | None = None
        self.spent_usd = 0.0
        self.since_look = 0
        self.price_of_cost: float | None = (
            None  # what `State.price_of_cost` takes; None: the policy's own rule is cheap enough
        )

    def saw(self, decision: Decision, now_s: float, cost_usd: float | None = None) -> float | None:
        """Count one decided request at `now_s` (any clock in seconds that only grows) and what it really cost, where known, else what was
        predicted; returns the λ for the next one."""
        if self.began_s is None or now_s - self.began_s >= self.period_s:
            self.began_s, self.spent_usd = now_s, 0.0
        self.spent_usd += decision.cost if cost_usd is None else cost_usd
        self.recent.append((now_s, list(decision.scores.values()), list(decision.costs.values())))
        self.since_look += 1
        if self.since_look >= self.look_every:
            self.since_look = 0
            self.price_of_cost = self._look(now_s)
        return self.price_of_cost

    def _look(self, now_s: float) -> float | None:
        """λ where the policy's own choices would not fit into what is left."""
        width = max(len(scores) for _, scores, _ in self.recent)
        rows = [
            (s, c) for _, s, c in self.recent if len(s) == width
        ]  # requests of which somebody was removed say less
        scores, costs = np.array([s for s, _ in rows]), np.array([c for _, c in rows])
        seconds = max(1.0, now_s - self.recent[0][0])
        assert self.began_s is not None
        elapsed = now_s - self.began_s
        may = budget.allowance(self.usd, self.spent_usd, elapsed, self.period_s, len(self.recent) / seconds)
        own = (
            loss_choices(scores, self.rule["threshold"])
            if self.rule["kind"] == "loss"
            else tradeoff_choices(scores, costs, self.rule["price_of_cost"])
        )
        return None if picked(costs, own).mean() <= may else budget.price_of_cost(scores, costs, may)


def watches(policy: LoadedPolicy) -> tuple[DriftWatch, BudgetWatch | None]:
    """What a policy's certificate and its rule's `budget` ({"usd": …, "per": "day" or "month"}) ask to be watched. A budget in money
    needs a policy whose costs are money: there is no BudgetWatch otherwise."""
    asked = policy.policy.rule.get("budget")
    money = policy.policy.cost.get("unit") == "usd"
    watch = BudgetWatch(asked["usd"], asked["per"], policy.policy.rule) if asked and money else None
    return DriftWatch(policy.certificate), watch
