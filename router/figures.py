"""What a rule gives on scored items, beside what anybody would have without it.

    share                 of the items sent to a candidate
    random_same_share     sum over candidates of share * mean score, the expectation of random routing at the same shares
    gain_over_random      policy - random_same_share; with two candidates mean(sent * gain) - mean(sent) * mean(gain)
    oracle                mean of the best score of an item
    weak, strong          the cheapest candidate and the last one, the strongest

Scores are shares in 0..1; a point is 0.01. Intervals are 95 % percentile-bootstrap over items.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES = 2000
SEED = 20240607


def choose_threshold(scores: np.ndarray, weak: np.ndarray, strong: np.ndarray, max_loss: float) -> float:
    """The highest threshold (so the smallest share to strong) whose mean score is at most `max_loss` below
    always-strong on these items; scores are predicted gains. Items with equal scores go together.
    """
    from edgeft.router.rule import ALWAYS_STRONG, ALWAYS_WEAK

    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # means[k]: the k items with the highest predicted gain go to strong
    means = (weak.sum() + np.concatenate([[0.0], np.cumsum((strong - weak)[order])])) / len(scores)
    allowed = np.flatnonzero(means >= strong.mean() - max_loss - 1e-12)
    for k in allowed:
        if k == 0:
            return ALWAYS_WEAK
        if k == len(scores):
            return ALWAYS_STRONG
        if ranked[k - 1] > ranked[k]:
            return float((ranked[k - 1] + ranked[k]) / 2)
    return ALWAYS_STRONG


def choose_loss_threshold(scores: np.ndarray, quality: np.ndarray, max_loss: float) -> float:
    """The same for any number of candidates (predicted scores and scores [n, candidates], cheapest first): the highest
    threshold of the rule `loss` whose mean score is at most `max_loss` below the strongest's. Not monotone with more
    than two, so all thresholds above the first that fails are left aside."""
    if scores.shape[1] == 2:
        return choose_threshold(scores[:, 1] - scores[:, 0], quality[:, 0], quality[:, 1], max_loss)
    from edgeft.router.rule import ALWAYS_STRONG, ALWAYS_WEAK

    allowed, chosen = quality[:, -1].mean() - max_loss - 1e-12, ALWAYS_STRONG
    for threshold in [*thresholds(scores), ALWAYS_WEAK]:
        if picked(quality, loss_choices(scores, threshold)).mean() < allowed:
            break
        chosen = float(threshold)
    return chosen


def loss_choices(scores: np.ndarray, threshold: float) -> np.ndarray:
    """What the rule `loss` chooses for each row of predicted scores [n, candidates]: int [n]."""
    fits = scores[:, -1:] - scores < threshold
    fits[:, -1] = True
    return fits.argmax(1)


def tradeoff_choices(scores: np.ndarray, costs: np.ndarray, price_of_cost: float) -> np.ndarray:
    """What the rule `tradeoff` chooses for each row of predicted scores and costs [n, candidates]: int [n]; ties to the cheaper."""
    worth = scores - price_of_cost * costs
    tied = worth >= worth.max(1, keepdims=True)
    return np.where(tied, costs, np.inf).argmin(1)


def thresholds(scores: np.ndarray, most: int = 200) -> np.ndarray:
    """Thresholds of the rule `loss` from strict to lax, between the predicted losses that occur."""
    losses = np.unique(scores[:, -1:] - scores[:, :-1])
    if len(losses) > most:
        losses = np.unique(np.quantile(losses, np.linspace(0, 1, most)))
    return (losses[1:] + losses[:-1]) / 2


def picked(quality: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """The score of each row's choice."""
    return quality[np.arange(len(quality)), choice]


def mix_figures(quality: np.ndarray, choice: np.ndarray, names: list[str] | None = None) -> dict[str, Any]:
    """The figures of a choice for each row of scores [n, candidates], cheapest first and strongest last."""
    n, k = quality.shape
    names = names or [str(i) for i in range(k)]
    policy, means = picked(quality, choice), quality.mean(0)
    shares = np.bincount(choice, minlength=k) / n
    sent = np.eye(k)[choice]
    best = int(means.argmax())
    return {
        "n": n,
        "n_differently_scored": int(np.count_nonzero(quality.max(1) > quality.min(1))),
        "share_strong": float(shares[-1]),
        "shares": dict(zip(names, shares.tolist(), strict=True)),
        "policy": {"mean": float(policy.mean()), "ci95": _interval(policy)},
        "always": {
            name: {"mean": float(m), "ci95": _interval(q)}
            for name, m, q in zip(names, means, quality.T, strict=True)
        },
        "always_weak": {"mean": float(means[0]), "ci95": _interval(quality[:, 0])},
        "always_strong": {"mean": float(means[-1]), "ci95": _interval(quality[:, -1])},
        "best_single": {"name": names[best], "mean": float(means[best])},
        "random_same_share": float(shares @ means),
        "oracle": float(quality.max(1).mean()),
        "gain_over_random": _over_random(sent, quality),
        "loss_to_strong": {
            "mean": float((quality[:, -1] - policy).mean()),
            "ci95": _interval(quality[:, -1] - policy),
        },
    }


def figures(weak: np.ndarray, strong: np.ndarray, sent: np.ndarray) -> dict[str, Any]:
    """The figures of sending the items in `sent` (bool) to strong, of two candidates."""
    return mix_figures(np.column_stack([weak, strong]), sent.astype(int))


def verdict(found: dict[str, Any], max_loss: float) -> tuple[bool, str]:
    """(is routing worth it, one sentence that says why). Worth it only if the lower end of the interval of
    policy minus random at the same share is above 0.
    """
    weak, strong = 100 * found["always_weak"]["mean"], 100 * found["always_strong"]["mean"]
    low, high = (100 * v for v in found["gain_over_random"]["ci95"])
    gain, share, points = 100 * found["gain_over_random"]["mean"], found["share_strong"], 100 * max_loss
    if found["n_differently_scored"] == 0:
        return False, f"Not worth it: no item of {found['n']} is scored differently; use weak alone."
    lone = next((name for name, part in found["shares"].items() if part == 1), None)
    if share in (0, 1) or lone:
        sent, alone, loss = (
            ("nothing", "weak", strong - weak) if share == 0 else ("everything", "strong", 0.0)
        )
        advice = (
            f"use {alone} alone" if loss <= points else "and weak alone loses more than allowed: fit again"
        )
        return False, (
            f"Not worth it: staying within {points:g} points of strong ({strong:.1f}; weak {weak:.1f}), "
            f"the policy sends {sent} to strong; {advice}."
        )
    numbers = (
        f"{gain:+.1f} points over random at the same share ({share:.0%} to strong), "
        f"95 % interval {low:+.1f} to {high:+.1f}"
    )
    if low > 0:
        return True, f"Worth it: {numbers}."
    return False, f"Not worth it: {numbers}, which is not above 0 for sure on {found['n']} items."


def _interval(values: np.ndarray) -> list[float]:
    return _ends(lambda picks: values[picks].mean(1), len(values))


def _over_random(sent: np.ndarray, quality: np.ndarray) -> dict[str, Any]:
    """Mean and interval of policy minus random at the same shares; `sent` is 1 at the choice, [n, candidates]."""

    def statistic(picks: np.ndarray) -> np.ndarray:
        s, q = sent[picks], quality[picks]
        return (s * q).sum(2).mean(1) - (s.mean(1) * q.mean(1)).sum(1)

    everything = np.arange(len(sent))[None]
    return {"mean": float(statistic(everything)[0]), "ci95": _ends(statistic, len(sent))}


def _ends(statistic: Any, n: int) -> list[float]:
    """The 2.5 and 97.5 percentiles of a statistic over resamples of n items, 200 resamples at a time."""
    chance = np.random.default_rng(SEED)
    found = np.concatenate([statistic(chance.integers(0, n, (200, n))) for _ in range(RESAMPLES // 200)])
    return np.asarray(np.percentile(found, [2.5, 97.5])).tolist()
