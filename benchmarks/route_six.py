"""Six models on GSM8K: a cascade on agreement of two open-weights models, and what of gpt-4o's accuracy 15 % of its cost keeps.

Outer folds test; pair, tie-break and threshold are chosen on the fitting folds alone, by their own inner folds. Prices are the table
below (USD per million tokens; API models: list prices of November 2024 as litellm ships them; local models: energy, assumed).
Tokens are characters / 4, of the question and of the response. Prints JSON.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import route_data

from edgeft.router import kernel
from edgeft.router.certificate import most_losses
from edgeft.router.curves import interval
from edgeft.router.drafts import agree
from edgeft.router.kernel import standardised

LOCAL = ("gemma-2-2b-it", "Phi-3.5-mini-instruct", "Meta-Llama-3.1-8B-Instruct", "gemma-2-9b-it")
MINI, STRONG = "gpt-4o-mini-2024-07-18", "gpt-4o-2024-08-06"
MODELS = (*LOCAL, MINI, STRONG)
PRICES = {  # in, out
    "gemma-2-2b-it": (0.01, 0.02), "Phi-3.5-mini-instruct": (0.02, 0.04), "Meta-Llama-3.1-8B-Instruct": (0.03, 0.06),
    "gemma-2-9b-it": (0.03, 0.06), MINI: (0.15, 0.60), STRONG: (2.50, 10.0),
}  # fmt: skip
BUDGET_SHARE = 0.12
COST_SHARE = 0.15  # of what gpt-4o alone costs, may be spent
# Standard errors of the mean cost that are kept off it. Tried too: none (.9986 at .152) and 1.28 (.9949 at .127).
COST_MARGIN = 0.5
SHARE_DELTA = 0.1  # chance that the escalated share of new rows is over the budget
LANDMARKS = 150


class Rows:
    """What was measured: answers, correctness, costs; arrays are [n, models]."""

    def __init__(self, folder: Path) -> None:
        found = route_data.rows(folder, "zeroeval_gsm8k_six_models")
        self.n = len(found)
        self.right = np.array([[float(r[f"{m}:correct"]) for m in MODELS] for r in found])
        self.answers = [[r[f"{m}:answer"] for m in MODELS] for r in found]
        self.characters = np.array([[float(r[f"{m}:chars"]) for m in MODELS] for r in found])
        self.prompt = np.array([len(r["question"]) for r in found])
        both = [PRICES[m] for m in MODELS]
        self.cost = np.column_stack(
            [(self.prompt / 4 * i + self.characters[:, k] / 4 * o) / 1e6 for k, (i, o) in enumerate(both)]
        )
        k = len(MODELS)
        self.same = np.array(
            [[[agree(a[i], a[j]) for j in range(k)] for i in range(k)] for a in self.answers]
        )


class Plan:
    """A cascade: two local models, a third asked where they differ (or none), the judge over what they said."""

    def __init__(self, rows: Rows, first: int, second: int, third: int | None) -> None:
        self.rows, self.first, self.second, self.third = rows, first, second, third
        pair = rows.same[:, first, second]
        self.answer = np.full(rows.n, first)
        self.cost = rows.cost[:, first] + rows.cost[:, second]
        self.agreed = pair.copy()
        if third is not None:
            with_first, with_second = rows.same[:, first, third], rows.same[:, second, third]
            self.answer = np.where(~pair & ~with_first & with_second, second, self.answer)
            if third == MODELS.index(MINI):
                self.answer = np.where(~pair & ~with_first & ~with_second, third, self.answer)
            self.agreed |= with_first | with_second
            self.cost = self.cost + np.where(pair, 0.0, rows.cost[:, third])
        self.right = rows.right[np.arange(rows.n), self.answer]
        self.gain = rows.right[:, -1] - self.right
        self.x = self.features(pair)

    def features(self, pair: np.ndarray) -> np.ndarray:
        """What the judge sees: who agreed, how long question and answers are, what the answer looks like."""
        numbers = [np.array([_number(a[m]) for a in self.rows.answers]) for m in (self.first, self.second)]
        length = np.log1p(self.rows.characters)
        asked = [self.first, self.second]
        columns = [
            3 * pair, 3 * self.agreed, *(length[:, m] for m in asked), length[:, self.first] - length[:, self.second],
            np.log1p(self.rows.prompt),
            *(np.abs(v - np.round(v)) > 1e-6 for v in numbers), *(np.log1p(np.abs(v)) for v in numbers), *(v < 0 for v in numbers),
        ]  # fmt: skip
        if self.third is not None:  # its length is known only where it was asked
            columns.append(np.where(pair, 0.0, length[:, self.third] - length[:, self.third].mean()))
        return np.column_stack(columns).astype(float)

    def predicted(self, fitting: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(out-of-sample predicted gain of the fitting rows, of the test rows)."""
        x, mean, scale = standardised(self.x[fitting])
        head = kernel.fit(x, self.gain[fitting][:, None], (20.0, 60.0, 200.0), most=LANDMARKS)
        return head.left_out[:, 0], kernel.predict(head, np.clip((self.x[test] - mean) / scale, -4, 4))[:, 0]

    def scores(self, at: np.ndarray, sent: np.ndarray) -> np.ndarray:
        return np.where(sent, self.rows.right[at, -1], self.right[at])

    def costs(self, at: np.ndarray, sent: np.ndarray) -> np.ndarray:
        return self.cost[at] + sent * self.rows.cost[at, -1]


def main() -> None:
    options = route_data.parser(__doc__ or "").parse_args()
    rows = Rows(options.data)
    local = [
        Plan(rows, a, b, c)
        for a, b in itertools.permutations(range(1, 4), 2)
        for c in (None, *(m for m in range(1, 4) if m not in (a, b)))
    ]
    mixed = local + [Plan(rows, a, b, MODELS.index(MINI)) for a, b in itertools.permutations(range(1, 4), 2)]
    by_seed = [
        one_seed(rows, local, mixed, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    ]
    naive = {}
    for a, b in itertools.combinations(range(4), 2):
        same = rows.same[:, a, b]
        naive[f"{MODELS[a]} + {MODELS[b]}"] = {
            "escalated": round(float(1 - same.mean()), 4),
            "accuracy": round(float(np.where(same, rows.right[:, a], rows.right[:, -1]).mean()), 4),
        }  # fmt: skip
    shown = {
        "rows": rows.n, "seeds": options.seeds, "prices_usd_per_mtok": PRICES, "tokens": "characters / 4",
        "always": dict(zip(MODELS, rows.right.mean(0).round(4).tolist(), strict=True)), "oracle": round(float(rows.right.max(1).mean()), 4),
        "naive_pairs": naive, "agreement": _mean(by_seed, "agreement"), "cost": _mean(by_seed, "cost"), "by_seed": by_seed,
    }  # fmt: skip
    print(json.dumps(shown, indent=1))


def one_seed(rows: Rows, local: list[Plan], mixed: list[Plan], seed: int) -> dict[str, Any]:
    """Both tasks, with nested folds: everything chosen on the fitting rows."""
    sent, right = np.zeros(rows.n, bool), np.zeros(rows.n)
    got, cost = np.zeros(rows.n), np.zeros(rows.n)
    names: list[str] = []
    for fitting, test in route_data.folds(rows.n, seed):
        plan, fit_gain, test_gain = _best(local, fitting, test, lambda p, g, at: _accuracy_within(p, g, at))
        # The share must hold on new rows: the most escalations whose upper bound on the fitting rows is within it.
        cut = np.sort(fit_gain)[::-1][most_losses(len(fitting), BUDGET_SHARE, SHARE_DELTA)]
        out = test_gain > cut
        sent[test], right[test] = out, plan.scores(test, out)
        names.append(_name(plan))
        plan, fit_gain, test_gain = _best(mixed, fitting, test, lambda p, g, at: _within_cost(p, g, at)[0])
        out = test_gain > _within_cost(plan, fit_gain, fitting)[1]
        got[test], cost[test] = plan.scores(test, out), plan.costs(test, out)
    full = rows.cost[:, -1]
    pair = rows.same[:, 1, 3]
    naive_score, naive_cost = (
        np.where(pair, rows.right[:, 1], rows.right[:, -1]),
        rows.cost[:, [1, 3]].sum(1) + np.where(pair, 0, full),
    )
    share = float(
        np.clip((cost.mean() - rows.cost[:, 3].mean()) / (full.mean() - rows.cost[:, 3].mean()), 0, 1)
    )
    random_score = (1 - share) * rows.right[:, 3] + share * rows.right[:, -1]
    # The naive pair at the same cost: a share of its requests, the rest answered by its first model alone.
    part = float(
        np.clip((cost.mean() - rows.cost[:, 3].mean()) / (naive_cost.mean() - rows.cost[:, 3].mean()), 0, 1)
    )
    naive_same = part * naive_score + (1 - part) * rows.right[:, 3]
    return {
        "agreement": {
            "escalated": round(float(sent.mean()), 4), "accuracy": round(float(right.mean()), 4),
            "accuracy_ci95": _ends(lambda i: right[i].mean(), rows.n), "plans": sorted(set(names)),
        },
        "cost": {
            "accuracy": round(float(got.mean()), 4), "of_gpt4o": round(float(got.mean() / rows.right[:, -1].mean()), 4),
            "cost_share": round(float(cost.mean() / full.mean()), 4),
            "over_random_mix_ci95": _ends(lambda i: (got - random_score)[i].mean(), rows.n),
            "over_naive_pair_ci95": _ends(lambda i: (got - naive_same)[i].mean(), rows.n),
            "naive_pair": {"accuracy": round(float(naive_score.mean()), 4), "cost_share": round(float(naive_cost.mean() / full.mean()), 4)},
        },
    }  # fmt: skip


def _best(
    plans: list[Plan], fitting: np.ndarray, test: np.ndarray, worth: Any
) -> tuple[Plan, np.ndarray, np.ndarray]:
    best = None
    for plan in plans:
        left_out, predicted = plan.predicted(fitting, test)
        value = worth(plan, left_out, fitting)
        if best is None or value > best[0]:
            best = (value, plan, left_out, predicted)
    assert best is not None
    return best[1], best[2], best[3]


def _accuracy_within(plan: Plan, gain: np.ndarray, at: np.ndarray) -> float:
    """Accuracy where the budget's share with the highest predicted gain is escalated."""
    out = np.zeros(len(at), bool)
    out[np.argsort(-gain, kind="stable")[: int(BUDGET_SHARE * len(at))]] = True
    return float(plan.scores(at, out).mean())


def _within_cost(plan: Plan, gain: np.ndarray, at: np.ndarray) -> tuple[float, float]:
    """(accuracy, the cut on predicted gain) where the most is escalated that COST_SHARE of gpt-4o's cost allows."""
    order = np.argsort(-gain, kind="stable")
    full = plan.rows.cost[at, -1]
    # What an item costs beyond the allowance, with the first k of the order sent on, for every k.
    base = plan.cost[at] - COST_SHARE * full
    extra = full[order]
    total = base.sum() + np.concatenate([[0.0], np.cumsum(extra)])
    squares = (base**2).sum() + np.concatenate(
        [[0.0], np.cumsum((base[order] + extra) ** 2 - base[order] ** 2)]
    )
    mean = total / len(at)
    upper = mean + COST_MARGIN * np.sqrt(np.maximum(squares / len(at) - mean**2, 0) / len(at))
    if not (upper <= 0).any():
        return -1.0, float("inf")  # its own models cost too much
    k = int(np.flatnonzero(upper <= 0)[-1])
    right = plan.right[at].sum() + plan.gain[at][order][:k].sum()
    cut = np.inf if k == 0 else (gain[order][k - 1] + (gain[order][k] if k < len(at) else -9)) / 2
    return float(right / len(at)), float(cut)


def _name(plan: Plan) -> str:
    return " + ".join(
        [
            MODELS[plan.first],
            MODELS[plan.second],
            *([] if plan.third is None else [f"tie-break {MODELS[plan.third]}"]),
        ]
    )


def _number(text: str) -> float:
    try:
        return float(np.clip(float(text.replace(",", "")), -1e9, 1e9))
    except ValueError:
        return 0.0


def _ends(statistic: Any, n: int) -> list[float]:
    return [round(v, 4) for v in interval(statistic, n) or []]


def _mean(runs: list[dict[str, Any]], name: str) -> dict[str, float]:
    first = runs[0][name]
    return {
        k: round(float(np.mean([r[name][k] for r in runs])), 4)
        for k, v in first.items()
        if isinstance(v, float)
    }


if __name__ == "__main__":
    main()
