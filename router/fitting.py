"""Fit a policy on reports, and evaluate it on others.

Items fall in two halves by the hash of the request's text. The ridge on the per-item gain is fitted
on one; the threshold is chosen on the other, which the ridge did not see. The figures printed are of
that second half, cross-fitted: each item is routed by a threshold chosen without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError
from edgeft.router import ridge
from edgeft.router.features import SPEC, matrix
from edgeft.router.figures import choose_threshold, figures, verdict
from edgeft.router.policy import LoadedPolicy, predicted_gain, save_policy
from edgeft.router.reports import Pair, join, refuse_used, used_before
from edgeft.types import Policy

FOLDS = 5
SEEN = "fit router"


def fit(
    reports: Sequence[Path],
    weak: str,
    strong: str,
    out: Path,
    max_loss: float = 0.01,
    allow_seen_rows: bool = False,
) -> LoadedPolicy:
    """Fit a policy between two models of the reports and write it to `out`.

    The threshold sends the smallest share to strong whose mean score is at most `max_loss` (0.01 is
    one point) below always-strong's. Raises UsageError for inputs that can't carry a policy.
    """
    joined = join(reports, weak, strong)
    before = used_before([joined.weak, joined.strong])
    if not allow_seen_rows:
        refuse_used(joined.pairs, before, "fit a router")
    to_fit, to_choose = halves(joined.pairs)
    head = ridge.fit(matrix([p.request for p in to_fit]), _gains(to_fit))
    # The weights that will decide are float32: score with these.
    head_weights, bias = np.float32(head.weights).astype(float), float(np.float32(head.bias))
    scores = np.clip(matrix([p.request for p in to_choose]) @ head_weights + bias, -1.0, 1.0)
    weak_scores, strong_scores = _scores(to_choose)
    threshold = choose_threshold(scores, weak_scores, strong_scores, max_loss)
    found = figures(weak_scores, strong_scores, _cross_fitted(to_choose, scores, max_loss))
    worth_it, sentence = verdict(found, max_loss)
    policy = Policy(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        weak=joined.weak,
        strong=joined.strong,
        features=dict(SPEC),
        threshold=threshold,
        fitted={
            "reports": [str(folder) for folder in reports],
            "n_fit": len(to_fit),
            "n_threshold": len(to_choose),
            "n_unscored": joined.unscored,
            "head": {
                "kind": "ridge on strong - weak",
                "strength": head.strength,
                "loo_mse": head.loo_mse,
                "constant_mse": head.constant_mse,
            },
            "max_loss": max_loss,
            "threshold_rule": "smallest share to strong whose mean score is within max_loss of strong's",
            "share_strong_at_threshold": float(np.mean(scores >= threshold)),
            "figures_of": f"the threshold items, each by a threshold chosen without it ({FOLDS} folds)",
            "figures": found,
            "worth_it": worth_it,
            "verdict": sentence,
        },
        seen_rows={**before, SEEN: sorted({h for pair in joined.pairs for h in pair.hashes})},
    )
    return save_policy(policy, head_weights, bias, out)


def evaluate(policy: LoadedPolicy, reports: Sequence[Path]) -> dict[str, Any]:
    """The policy's figures on reports whose items it has not seen.

    Raises UsageError naming items that it has seen, or a candidate that is another artefact now.
    """
    stored = policy.policy
    joined = join(reports, stored.weak["id"], stored.strong["id"])
    for before, now in ((stored.weak, joined.weak), (stored.strong, joined.strong)):
        if before["artifact_sha256"] != now["artifact_sha256"]:
            raise UsageError(
                f"'{now['id']}' in the report is not the artefact that the policy was fitted on.",
                f"edgeft route fit … --weak {stored.weak['id']} --strong {stored.strong['id']}",
            )
    refuse_used(joined.pairs, stored.seen_rows, "evaluate the policy")
    scores = np.array([predicted_gain(policy, pair.request) for pair in joined.pairs])
    found = figures(*_scores(joined.pairs), scores >= stored.threshold)
    worth_it, sentence = verdict(found, stored.fitted["max_loss"])
    return {
        "weak": stored.weak["id"],
        "strong": stored.strong["id"],
        "reports": [str(folder) for folder in reports],
        "n_unscored": joined.unscored,
        "threshold": stored.threshold,
        "figures": found,
        "worth_it": worth_it,
        "verdict": sentence,
    }


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Two halves by the hash of the request's text; items with the same text stay together."""
    ordered = sorted(pairs, key=lambda p: (_digest(p.request, "half"), p.item_id))
    cut = len(ordered) // 2
    while cut < len(ordered) - 1 and ordered[cut].request == ordered[cut - 1].request:
        cut += 1
    return ordered[:cut], ordered[cut:]


def _cross_fitted(pairs: Sequence[Pair], scores: np.ndarray, max_loss: float) -> np.ndarray:
    """Which items go to strong, each by the threshold that the other folds choose."""
    weak, strong = _scores(pairs)
    fold = np.array([int(_digest(pair.request, "fold")[:8], 16) % FOLDS for pair in pairs])
    sent = np.zeros(len(pairs), bool)
    for index in np.unique(fold):
        here, others = fold == index, fold != index
        if others.any():
            sent[here] = scores[here] >= choose_threshold(
                scores[others], weak[others], strong[others], max_loss
            )
    return sent


def _digest(text: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}:{text}".encode(errors="surrogatepass")).hexdigest()


def _scores(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p.weak for p in pairs]), np.array([p.strong for p in pairs])


def _gains(pairs: Sequence[Pair]) -> np.ndarray:
    return np.array([p.strong - p.weak for p in pairs])
