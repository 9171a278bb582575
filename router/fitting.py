"""Fit a policy on reports.

Items fall in two halves by the hash of the request's text. The heads are fitted on one; the rule is
chosen on the other, which they did not see. The figures printed are of that second half,
cross-fitted: each item is routed by a rule chosen without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import unknown
from edgeft.router import costs, privacy, rule
from edgeft.router.features import matrix
from edgeft.router.figures import choose_loss_threshold, loss_choices, mix_figures, thresholds, verdict
from edgeft.router.fit_heads import fit_cascade, fit_heads, predicted
from edgeft.router.policy import LoadedPolicy, save_policy
from edgeft.router.reports import Item, Joined, join, names_in, refuse_used, used_before
from edgeft.types import Policy

FOLDS = 5
GRID_POINTS = 150  # rules that a certificate may choose among
SEEN = "fit router"


@dataclass(frozen=True)
class Options:
    """How to fit. Shares and scores are in 0..1."""

    max_loss: float = 0.01  # mean score that may be lost to always-strong
    allow_seen_rows: bool = False
    prices: Mapping[str, tuple[float, float]] = field(
        default_factory=dict
    )  # id -> USD per million tokens in, out
    local: tuple[str, ...] = ()  # candidates that are in the house whatever their address
    unit: str | None = None  # "usd" or "steps"; None: usd where the prices are known
    watts: float | None = None
    usd_per_kwh: float | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)  # settings beside the one that is chosen here
    encoder: Path | None = None  # folder of `edgeft route encoder`
    looks: bool = True  # try the heads on what a request looks like
    cascade: bool = (
        False  # fit a judge of the cheapest candidate's drafts, and of a second local one's agreement
    )
    judge_after: int | None = None  # tokens of a draft after which it is judged; None: when it is whole
    far_share: float = 0.0  # share of fitting rows that would count as far: sets rule.far


def fit(
    places: Sequence[Path], ids: Sequence[str], out: Path, options: Options | None = None
) -> LoadedPolicy:
    """Fit a policy between two or more candidates and write it to `out`. The candidates are ordered by cost, the one with the
    best mean score last; without prices they stand in the order given.

    The threshold sends as little as it can to the strongest while the mean score stays within `max_loss` of always-strong's.
    Raises UsageError for inputs that can't carry a policy.
    """
    options = options or Options()
    joined = join(places, list(ids) or names_in(places))
    _apply(options, joined.candidates)
    settings = costs.settle(
        {"watts": options.watts, "usd_per_kwh": options.usd_per_kwh}, joined.candidates, options.unit
    )
    joined = ordered(joined, settings)
    before = used_before(joined.candidates)
    if not options.allow_seen_rows:
        refuse_used(joined.items, before, "fit a router")
    to_fit, to_choose = halves(joined.items)
    tensors, heads, features = fit_heads(to_fit, options.encoder, options.looks)
    if options.cascade:
        more, features["cascade"] = fit_cascade(
            to_fit, joined.candidates, options.max_loss, options.judge_after
        )
        tensors |= more
    scores = predicted(tensors, features, to_choose)
    quality = np.array([item.scores for item in to_choose])
    threshold = choose_loss_threshold(scores, quality, options.max_loss)
    names = [c["id"] for c in joined.candidates]
    found = mix_figures(quality, _cross_fitted(to_choose, scores, quality, options.max_loss), names)
    worth_it, sentence = verdict(found, options.max_loss)
    far = _far(to_fit, options.far_share)
    policy = Policy(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        candidates=joined.candidates,
        features=features,
        rule={
            **rule.DEFAULTS,
            "far": far,
            **_known(options.rule, rule.DEFAULTS, "rule"),
            "threshold": threshold,
        },
        privacy={**privacy.DEFAULTS, **_known(options.privacy, privacy.DEFAULTS, "privacy")},
        cost=settings,
        fitted={
            "reports": [str(place) for place in places],
            "n_fit": len(to_fit),
            "n_threshold": len(to_choose),
            "n_unscored": joined.unscored,
            "heads": heads,
            "max_loss": options.max_loss,
            "grid": grid_of(scores),
            "threshold_rule": "smallest share to the strongest whose mean score is within max_loss of the strongest's",
            "share_strong_at_threshold": float(np.mean(loss_choices(scores, threshold) == len(names) - 1)),
            "figures_of": f"the threshold items, each by a threshold chosen without it ({FOLDS} folds)",
            "figures": found,
            "worth_it": worth_it,
            "verdict": sentence,
        },
        seen_rows={**before, SEEN: sorted({h for item in joined.items for h in item.hashes})},
    )
    return save_policy(policy, tensors, out, options.encoder)


def ordered(joined: Joined, settings: Mapping[str, Any]) -> Joined:
    """Candidates by cost, the one with the best mean score last; what costs more than that one and is worse stands before it."""
    price = costs.cheapest_first(joined.candidates, settings)
    means = joined.quality.mean(0)
    if settings["unit"] == "usd":
        best = max(range(len(price)), key=lambda i: (means[i], price[i]))
        order = [*sorted((i for i in range(len(price)) if i != best), key=lambda i: (price[i], i)), best]
    else:
        order = list(range(len(price)))  # as given

    def moved(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[k] for k in order) if values else ()

    items = [
        replace(
            item,
            scores=moved(item.scores),
            output_tokens=moved(item.output_tokens),
            outputs=moved(item.outputs),
            logprobs=moved(item.logprobs),
        )
        for item in joined.items
    ]
    return Joined([joined.candidates[k] for k in order], items, joined.unscored)


def halves(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Two halves by the hash of the request's text; items with the same text stay together."""
    in_order = sorted(items, key=lambda p: (_digest(p.request, "half"), p.item_id))
    cut = len(in_order) // 2
    while cut < len(in_order) - 1 and in_order[cut].request == in_order[cut - 1].request:
        cut += 1
    return in_order[:cut], in_order[cut:]


def grid_of(scores: np.ndarray) -> list[float]:
    """The thresholds that a certificate may choose among, strict to lax: set here, before its rows are seen."""
    found = thresholds(scores, GRID_POINTS)
    return [rule.ALWAYS_STRONG, *found.tolist(), rule.ALWAYS_WEAK]


def _cross_fitted(
    items: Sequence[Item], scores: np.ndarray, quality: np.ndarray, max_loss: float
) -> np.ndarray:
    """The choice for each item, by the threshold that the other folds choose."""
    fold = np.array([int(_digest(item.request, "fold")[:8], 16) % FOLDS for item in items])
    choice: np.ndarray = np.zeros(len(items), int)
    for index in np.unique(fold):
        here, others = fold == index, fold != index
        if others.any():
            choice[here] = loss_choices(
                scores[here], choose_loss_threshold(scores[others], quality[others], max_loss)
            )
    return choice


def _apply(options: Options, candidates: list[dict[str, Any]]) -> None:
    names = [c["id"] for c in candidates]
    for name in (*options.prices, *options.local):
        if name not in names:
            raise unknown("the candidate", name, names, f"of: {', '.join(names)}")
    for candidate in candidates:
        if candidate["id"] in options.local:
            candidate["remote"] = False
        if price := options.prices.get(candidate["id"]):
            candidate["price"] = {
                "usd_per_mtok_in": price[0],
                "usd_per_mtok_out": price[1],
                "source": "given by hand",
            }


def _known(given: Mapping[str, Any], known: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    for name in given:
        if name not in known:
            raise unknown(f"the {kind} setting", name, known, f"of: {', '.join(known)}")
    return given


def _digest(text: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}:{text}".encode(errors="surrogatepass")).hexdigest()


def _far(items: Sequence[Item], share: float) -> float | None:
    """The similarity below which `share` of rows lie, each against the others (five folds)."""
    if share <= 0:
        return None
    fold = np.array([int(_digest(item.request, "fold")[:8], 16) % FOLDS for item in items])
    x = matrix([item.request for item in items])
    found = np.ones(len(items))
    for index in np.unique(fold):
        here = fold == index
        found[here] = (x[here] ** 2) @ (x[~here] != 0).any(0)
    return float(np.quantile(found, share))
