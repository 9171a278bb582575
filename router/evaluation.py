"""What a policy gives on items it has not seen, beside what anybody would have without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError
from edgeft.router.costs import cost_of
from edgeft.router.curves import aiq, hull, interval, routing_figures
from edgeft.router.duplicates import near
from edgeft.router.figures import loss_choices, mix_figures, picked, thresholds, tradeoff_choices, verdict
from edgeft.router.fit_heads import draft_of
from edgeft.router.heads import output_tokens, read, scores_of
from edgeft.router.policy import LoadedPolicy
from edgeft.router.reports import Item, Joined, join, refuse_used
from edgeft.router.rule import ALWAYS_STRONG, ALWAYS_WEAK

FRONTIER_POINTS = 21


def evaluate(policy: LoadedPolicy, places: Sequence[Path]) -> dict[str, Any]:
    """The policy's figures on reports whose items it has not seen: what `decide` gives for each request, by its rule.

    Raises UsageError naming items that it has seen, or a candidate that is another artefact now.
    """
    joined = same_candidates(policy, places)
    refuse_used(joined.items, policy.policy.seen_rows, "evaluate the policy")
    return report_of(policy, joined, [str(place) for place in places])


def same_candidates(policy: LoadedPolicy, places: Sequence[Path]) -> Joined:
    """The items of the policy's candidates. Raises UsageError where one is another artefact than the policy's."""
    names = list(policy.candidates)
    joined = join(places, names)
    for before, now in zip(policy.policy.candidates, joined.candidates, strict=True):
        if before["artifact_sha256"] != now["artifact_sha256"]:
            raise UsageError(
                f"'{now['id']}' in the report is not the artefact that the policy was fitted on.",
                f"edgeft route fit … {' '.join(f'--candidate {name}' for name in names)}",
            )
    return joined


def report_of(policy: LoadedPolicy, joined: Joined, places: list[str]) -> dict[str, Any]:
    """The whole report: the rule as it stands, curves over all rules of its kind, costs, groups."""
    stored, quality = policy.policy, joined.quality
    names = [c["id"] for c in stored.candidates]
    scores, costs = scores_and_costs(policy, joined.items)
    choice = choices(policy, scores, costs)
    drafted = (choice == 0) & np.array(escalated_drafts(policy, joined.items))  # these pay twice
    choice = np.where(drafted, len(names) - 1, choice)
    found = mix_figures(quality, choice, names)
    worth_it, sentence = verdict(found, stored.fitted["max_loss"])
    return {
        "weak": names[0],
        "strong": names[-1],
        "candidates": names,
        "reports": places,
        "n_unscored": joined.unscored,
        "threshold": stored.rule["threshold"],
        "figures": found,
        "escalated_drafts": float(drafted.mean()),
        "by_first_tokens": first_tokens(policy, joined.items, quality, float(drafted.mean())),
        "cost_unit": stored.cost.get("unit"),
        "cost_per_request": {
            "policy": float((picked(costs, choice) + drafted * costs[:, 0]).mean()),
            "always": dict(zip(names, costs.mean(0).tolist(), strict=True)),
        },
        "two_ends": two_ends(scores, quality),
        "frontier": frontier(policy, scores, costs, quality),
        "near_duplicates": near_duplicates(policy, joined.items),
        "groups": groups(joined.items, quality, choice),
        "worth_it": worth_it,
        "verdict": sentence,
    }


def scores_and_costs(policy: LoadedPolicy, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Expected scores and predicted costs [items, candidates], as `decide` has them for these requests without limits."""
    stored = policy.policy
    scores, costs = [], []
    for item in items:
        features = read(policy, item.request)
        scores.append(scores_of(policy, features))
        prompt = int(item.prompt_tokens or len(item.request) // 4)
        costs.append(
            [
                cost_of(stored.cost, c, place, prompt, output_tokens(policy, features, place), 0.0)
                for place, c in enumerate(stored.candidates)
            ]
        )
    return np.array(scores), np.array(costs)


def escalated_drafts(policy: LoadedPolicy, items: Sequence[Item]) -> list[bool]:
    """Which items' drafts the policy's judge would escalate; none where the policy does not draft."""
    from edgeft.router.cascade import judge_draft

    block = policy.policy.features.get("cascade")
    if block is None:
        return [False] * len(items)
    second = list(policy.candidates).index(block["second"]) if block["second"] else None
    return [not judge_draft(policy.judge, item.request, draft_of(item, second)).keep for item in items]


def first_tokens(
    policy: LoadedPolicy, items: Sequence[Item], quality: np.ndarray, share: float
) -> dict[str, Any] | None:
    """How well drafts could be judged after their first k tokens (router/prefix.py); None where the policy does not draft."""
    from edgeft.router.prefix import by_first_tokens

    block = policy.policy.features.get("cascade")
    if block is None:
        return None
    second = list(policy.candidates).index(block["second"]) if block["second"] else None
    rows = [(item.request, draft_of(item, second)) for item in items]
    return {
        "after_tokens": block.get("after_tokens"),
        "how": "judges fitted on these items, each judged by one that has not seen it; tokens are characters / 4",
        "curve": by_first_tokens(rows, quality[:, 0], quality[:, -1], share),
    }


def choices(policy: LoadedPolicy, scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The policy's own rule on rows of scores and costs; limits, distance and privacy are not applied."""
    settings = policy.policy.rule
    if settings["kind"] == "loss":
        return loss_choices(scores, settings["threshold"])
    return tradeoff_choices(scores, costs, settings["price_of_cost"])


def two_ends(scores: np.ndarray, quality: np.ndarray) -> dict[str, Any] | None:
    """APGR, CPT50, CPT80 between the cheapest and the strongest, with item-bootstrap intervals; None where the strongest is not better."""
    gain, weak, strong = scores[:, -1] - scores[:, 0], quality[:, 0], quality[:, -1]
    if strong.mean() <= weak.mean():
        return None
    found: dict[str, Any] = dict(routing_figures(gain, weak, strong))
    found["apgr_ci95"] = interval(lambda i: routing_figures(gain[i], weak[i], strong[i])["apgr"], len(gain))
    found["random_apgr"] = 0.5
    return found


def frontier(
    policy: LoadedPolicy, scores: np.ndarray, costs: np.ndarray, quality: np.ndarray
) -> dict[str, Any]:
    """Mean score over mean predicted cost for rules from all-strong to all-cheap, with a 95 % band; AIQ of it and of the candidates."""
    kind = policy.policy.rule["kind"]
    steps: list[float]
    if kind == "loss":
        found = thresholds(scores)
        if len(found) > FRONTIER_POINTS:
            found = np.asarray(np.quantile(found, np.linspace(0, 1, FRONTIER_POINTS)))
        steps = [ALWAYS_STRONG, *map(float, found), ALWAYS_WEAK]
        picks = [loss_choices(scores, t) for t in steps]
    else:
        spread = costs.max(1).mean() - costs.min(1).mean()
        steps = [0.0, *(float(v) / max(spread, 1e-12) for v in np.logspace(-3, 1, FRONTIER_POINTS))]
        picks = [tradeoff_choices(scores, costs, t) for t in steps]
    chance = np.random.default_rng(0).integers(0, len(quality), (400, len(quality)))
    points = []
    for step, choice in zip(steps, picks, strict=True):
        got = picked(quality, choice)
        band = np.percentile(got[chance].mean(1), [2.5, 97.5])
        points.append(
            {
                "setting": float(step),
                "cost": float(picked(costs, choice).mean()),
                "score": float(got.mean()),
                "ci95": band.tolist(),
            }
        )
    singles = list(zip(costs.mean(0).tolist(), quality.mean(0).tolist(), strict=True))
    return {
        "kind": kind,
        "points": points,
        "aiq": aiq([p["cost"] for p in points], [p["score"] for p in points]),
        "aiq_of_singles": aiq(*(list(v) for v in zip(*singles, strict=True))),
        "hull_of_singles": hull(*(list(v) for v in zip(*singles, strict=True))),
    }


def near_duplicates(policy: LoadedPolicy, items: Sequence[Item]) -> dict[str, Any]:
    """Items that are near-duplicates of rows which the heads were fitted on: a figure on them flatters."""
    seen = policy.arrays.get("seen.signatures")
    if seen is None:
        return {
            "n": None,
            "first": [],
            "notes": ["near-duplicates: not looked for, the policy keeps no signatures"],
        }
    found = [
        item.item_id for item, same in zip(items, near([i.request for i in items], seen), strict=True) if same
    ]
    notes = (
        [f"{len(found)} of {len(items)} items are near-duplicates of fitting rows (first: '{found[0]}')"]
        if found
        else []
    )
    return {"n": len(found), "first": found[:10], "notes": notes}


def groups(items: Sequence[Item], quality: np.ndarray, choice: np.ndarray) -> dict[str, dict[str, Any]]:
    """Per group: n, the policy's mean score, the strongest's, and the share that is not sent to the strongest."""
    named = np.array([item.group or "" for item in items])
    found = {}
    for group in sorted(set(named) - {""}):
        at = named == group
        found[str(group)] = {
            "n": int(at.sum()),
            "policy": float(picked(quality[at], choice[at]).mean()),
            "strongest": float(quality[at, -1].mean()),
            "kept_share": float((choice[at] != quality.shape[1] - 1).mean()),
        }
    return found
