"""What a judge could tell from the first k tokens of a draft: the curve over k, cross-fitted on the rows at hand.

Tokens are characters / 4 here: a report keeps an answer's text, not where its tokens end. Of a draft that was cut the log-probability and how it
ended count as not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeft.router.cascade import Read, fit_gain, gains, read_drafts
from edgeft.router.curves import interval, routing_figures
from edgeft.router.drafts import Draft, first_tokens

TOKENS = (8, 16, 32, 64, 128)
FOLDS = 5
LANDMARKS = 400


def by_first_tokens(
    rows: Sequence[tuple[str, Draft]], draft_scores: np.ndarray, strong_scores: np.ndarray, share: float | None = None,
    tokens: Sequence[int] = TOKENS, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One entry for each k and for the whole draft (tokens None): APGR of escalating by the judge's prediction with its 95 % item-bootstrap
    interval, the share of drafts that end within k, and the mean score where `share` of the rows is escalated (None: left out).
    A judge is fitted for each k, each row judged by one that has not seen it. [] where the strongest is not better than the drafts."""
    if strong_scores.mean() <= draft_scores.mean():
        return []
    gain = strong_scores - draft_scores
    found = []
    for k in (*tokens, None):
        predicted = cross_fitted(read_drafts(rows, k), gain, seed)
        entry: dict[str, Any] = {
            "tokens": k, "ended_share": float(np.mean([first_tokens(draft, k).complete for _, draft in rows])),
            "apgr": routing_figures(predicted, draft_scores, strong_scores)["apgr"],
            "apgr_ci95": interval(
                lambda i, p=predicted: routing_figures(p[i], draft_scores[i], strong_scores[i])["apgr"], len(gain), resamples=400
            ),
        }  # fmt: skip
        if share is not None:
            sent = np.zeros(len(gain), bool)
            sent[np.argsort(-predicted, kind="stable")[: round(share * len(gain))]] = True
            entry["score_at_same_share"] = float(np.where(sent, strong_scores, draft_scores).mean())
        found.append(entry)
    return found


def cross_fitted(read: Read, gain: np.ndarray, seed: int = 0) -> np.ndarray:
    """Each row's gain by a judge fitted on the other folds."""
    order = np.random.default_rng(seed).permutation(len(gain))
    found = np.zeros(len(gain))
    for place in range(FOLDS):
        here = order[place::FOLDS]
        others = np.setdiff1d(order, here)
        judge, _ = fit_gain(read.rows(others), gain[others], LANDMARKS)
        # Held against the fold's own mean: folds must not differ by their constants.
        found[here] = gains(judge, read.rows(here)) - gain[others].mean()
    return found
