"""What a rule gives on scored items, beside what anybody would have without it.

    share                 of the items sent to strong
    random_same_share     (1 - share) * mean(weak) + share * mean(strong), the expectation of random routing
    gain_over_random      policy - random_same_share = mean(sent * gain) - mean(sent) * mean(gain)
    oracle                mean(max(weak, strong))

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
    from edgeft.router.policy import ALWAYS_STRONG, ALWAYS_WEAK

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


def figures(weak: np.ndarray, strong: np.ndarray, sent: np.ndarray) -> dict[str, Any]:
    """The figures of sending the items in `sent` (bool) to strong."""
    gain, sent = strong - weak, sent.astype(float)
    share = float(sent.mean())
    policy = weak + sent * gain
    return {
        "n": len(weak),
        "n_differently_scored": int(np.count_nonzero(gain)),
        "share_strong": share,
        "policy": {"mean": float(policy.mean()), "ci95": _interval(policy)},
        "always_weak": {"mean": float(weak.mean()), "ci95": _interval(weak)},
        "always_strong": {"mean": float(strong.mean()), "ci95": _interval(strong)},
        "random_same_share": float(weak.mean() + share * gain.mean()),
        "oracle": float(np.maximum(weak, strong).mean()),
        "gain_over_random": _covariance(sent, gain),
        "loss_to_strong": {"mean": float((strong - policy).mean()), "ci95": _interval(strong - policy)},
    }


def verdict(found: dict[str, Any], max_loss: float) -> tuple[bool, str]:
    """(is routing worth it, one sentence that says why). Worth it only if the lower end of the interval of
    policy minus random at the same share is above 0.
    """
    weak, strong = 100 * found["always_weak"]["mean"], 100 * found["always_strong"]["mean"]
    low, high = (100 * v for v in found["gain_over_random"]["ci95"])
    gain, share, points = 100 * found["gain_over_random"]["mean"], found["share_strong"], 100 * max_loss
    if found["n_differently_scored"] == 0:
        return False, f"Not worth it: no item of {found['n']} is scored differently; use weak alone."
    if share in (0, 1):
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


def _covariance(sent: np.ndarray, gain: np.ndarray) -> dict[str, Any]:
    def statistic(picks: np.ndarray) -> np.ndarray:
        s, g = sent[picks], gain[picks]
        return (s * g).mean(1) - s.mean(1) * g.mean(1)

    return {
        "mean": float((sent * gain).mean() - sent.mean() * gain.mean()),
        "ci95": _ends(statistic, len(sent)),
    }


def _ends(statistic: Any, n: int) -> list[float]:
    """The 2.5 and 97.5 percentiles of a statistic over resamples of n items, 200 resamples at a time."""
    chance = np.random.default_rng(SEED)
    found = np.concatenate([statistic(chance.integers(0, n, (200, n))) for _ in range(RESAMPLES // 200)])
    return [float(v) for v in np.percentile(found, [2.5, 97.5])]
