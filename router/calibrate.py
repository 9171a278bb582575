"""Certify a policy on rows that nothing else has seen, through `decide` itself: the rule as it will be served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import Inconclusive, UsageError
from edgeft.files import sha256_json
from edgeft.router.certificate import (
    certify,
    full_knowledge_share,
    least_n,
    losses_of,
    most_losses,
    random_share,
    risk_given_kept,
    upper_bound,
)
from edgeft.router.decision import decide, removed_for
from edgeft.router.drift import observe, reference
from edgeft.router.evaluation import escalated_drafts, same_candidates
from edgeft.router.heads import cluster_of, read, scores_of
from edgeft.router.policy import (
    CERTIFICATE,
    MANIFEST,
    LoadedPolicy,
    load_policy,
    policy_sha256,
    read_certificate,
    write_certificate,
)
from edgeft.router.reports import Item, Joined, refuse_used

SCHEMA = "edgeft/certificate@1"
SEEN = "certify"
LEAST_GRADES = 100


def calibrate(
    folder: Path,
    places: Sequence[Path],
    alpha: float = 0.05,
    delta: float = 0.1,
    temperature: float = 0.0,
    judged: Path | None = None,
) -> dict[str, Any]:
    """Certify the policy in `folder`: move its rule to the laxest certified one, write certificate.json, and return it.

    `temperature` is that of the reports' answers, and of serving. `judged` is a JSONL of rows that a judge model and a person graded: the
    scores are then the judge's, half of delta bounds the losses that it misses, and that bound comes off alpha.

    Raises UsageError for rows seen before and changed artefacts, Inconclusive where n is too small or no rule that keeps anything
    can be certified; the policy then stays as it was.
    """
    policy = load_policy(folder)
    missed = None if judged is None else missed_losses(judged, delta / 2)
    return certify_items(folder, policy, same_candidates(policy, places), alpha, delta, temperature, missed)


def certify_items(
    folder: Path, policy: LoadedPolicy, joined: Joined, alpha: float, delta: float, temperature: float,
    missed: Mapping[str, Any] | None = None, more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`calibrate` on items at hand, of the policy's own candidates. `missed` is `miss_bound` at delta / 2 of the judge that gave the scores;
    `more` is written into the certificate."""
    for name, value in (("--alpha", alpha), ("--delta", delta)):
        if not 0 < value < 1:
            raise UsageError(f"{name} {value:g} is not between 0 and 1.", f"{name} 0.05")
    asked = {"alpha": alpha, "delta": delta}
    if missed is not None:
        alpha, delta = alpha - missed["bound"], delta / 2
        if alpha <= 0:
            raise Inconclusive(
                f"the judge may miss losses in {missed['bound']:.1%} of rows, which is more than alpha {asked['alpha']:g} allows.",
                "more human grades, a better judge, or a larger --alpha",
            )
    refuse_used(joined.items, policy.policy.seen_rows, "certify the policy")
    items = [item for item in joined.items if not removed_for(policy, item.request)]
    n, needed = len(items), least_n(alpha, delta)
    if needed is not None and n < needed:
        raise Inconclusive(
            f"{n} rows can't carry alpha {alpha:g} at delta {delta:g}: even with no loss among them the bound is "
            f"{upper_bound(0, n, delta) if n else 1.0:.3f}; {needed} rows are the least.",
            "edgeft bench … --tasks MORE.jsonl, and calibrate on that report",
        )
    grid = [float(setting) for setting in policy.policy.fitted["grid"]]
    setting_name = "threshold" if policy.policy.rule["kind"] == "loss" else "price_of_cost"
    choices = choices_by_rule(policy, items, setting_name, grid)
    quality = np.array([item.scores for item in items])
    lost = np.array([losses_of(quality, choice) for choice in choices])
    kept = choices != quality.shape[1] - 1
    held = certify(lost.sum(1).tolist(), n, alpha, delta)
    if held == 0 or not kept[held - 1].any():
        raise Inconclusive(*_nothing(kept, lost, n, alpha, delta))
    last = held - 1
    certified = replace(
        policy.policy,
        rule={**policy.policy.rule, setting_name: grid[last]},
        seen_rows={
            **policy.policy.seen_rows,
            SEEN: sorted(
                {*policy.policy.seen_rows.get(SEEN, ()), *(h for item in joined.items for h in item.hashes)}
            ),
        },
    )
    certificate = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asked,
        "judge": missed,
        "n": n,
        "n_left_out": len(joined.items) - n,
        "promise": "share of requests kept from the strongest candidate that score less than its answer would",
        "rule": {"kind": policy.policy.rule["kind"], setting_name: grid[last]},
        "rules_tested": len(grid),
        "rules_certified": held,
        "losses": int(lost[last].sum()),
        "bound": upper_bound(int(lost[last].sum()), n, delta) + (missed["bound"] if missed else 0.0),
        "share_kept": float(kept[last].mean()),
        "share_kept_random": random_share(quality, alpha),
        "share_kept_full_knowledge": full_knowledge_share(kept.mean(1), lost.mean(1), alpha),
        "risk_given_kept": risk_given_kept(kept[last], lost[last], [item.group for item in items], delta),
        "temperature": temperature,
        "data_sha256": sha256_json(sorted(h for item in items for h in item.hashes)),
        "policy_sha256": policy_sha256(certified),
        "artifacts": {c["id"]: c["artifact_sha256"] for c in certified.candidates},
        "holds_for": "requests like these rows, first turns, all candidates at hand, no limit of a request's own",
        "drift_reference": reference([observation(policy, item.request) for item in items]),
        "suspended": False,
        "suspended_because": None,
        **(more or {}),
    }
    write_certificate(folder, certificate)  # first: it is void until the policy names the certified rule
    certified.save(folder / MANIFEST)
    return certificate


def observation(policy: LoadedPolicy, text: str) -> dict[str, float]:
    """What the drift alarm keeps of a request: the predicted gain of the strongest, the length, the similarity to the fitting rows, the
    nearest of their clusters."""
    features = read(policy, text)
    scores = scores_of(policy, features)
    return observe(scores[-1] - scores[0], len(text), features.similarity, cluster_of(policy, features))


def choices_by_rule(
    policy: LoadedPolicy, items: Sequence[Item], setting: str, grid: Sequence[float]
) -> np.ndarray:
    """int [rules, items]: the place of the candidate that `decide` chooses under each rule of the grid."""
    place = {name: index for index, name in enumerate(policy.candidates)}
    found: np.ndarray = np.zeros((len(grid), len(items)), int)
    features = [read(policy, item.request) for item in items]
    escalated = escalated_drafts(policy, items)
    for row, value in enumerate(grid):
        rule = {**policy.policy.rule, setting: value}
        # Without the certificate in force: what is tested is the rule, not its suspension.
        variant = replace(policy, policy=replace(policy.policy, rule=rule), certificate=None)
        for column, (item, known) in enumerate(zip(items, features, strict=True)):
            chosen = place[decide(variant, item.request, features=known).choice]
            found[row, column] = len(place) - 1 if chosen == 0 and escalated[column] else chosen
    return found


def missed_losses(path: Path, delta: float) -> dict[str, Any]:
    """How often a judge sees no loss where a person does: {n, missed, bound at 1 - delta}, from lines {"judge_loss": 0 or 1,
    "human_loss": 0 or 1} of rows drawn at random. Raises UsageError below LEAST_GRADES lines or for other lines."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}.", f"ls {path.parent}")
    pairs = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                line = json.loads(text)
                pairs.append((bool(line["judge_loss"]), bool(line["human_loss"])))
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UsageError(
                    f"{path} line {number} lacks judge_loss or human_loss.", f"sed -n {number}p {path}"
                ) from None
    if len(pairs) < LEAST_GRADES:
        raise UsageError(
            f"{path} holds {len(pairs)} rows that a person graded; {LEAST_GRADES} are the least.",
            "grade more rows",
        )
    return miss_bound([human and not judge for judge, human in pairs], delta)


def miss_bound(missed: Sequence[bool], delta: float) -> dict[str, Any]:
    """{n, missed, bound at 1 - delta} of how often a judge sees no loss where a person does, from rows drawn at random."""
    count = sum(missed)
    return {"n": len(missed), "missed": count, "bound": upper_bound(count, len(missed), delta)}


def suspend(folder: Path, because: str | None) -> dict[str, Any]:
    """Suspend a policy's certificate with a reason, or (None) lift it; returns the certificate."""
    policy = load_policy(folder)
    held = read_certificate(folder, policy.policy)
    if held is None:
        raise UsageError(f"{folder} holds no {CERTIFICATE}.", "edgeft route calibrate POLICY REPORT")
    held = {k: v for k, v in held.items() if k != "void"} | {
        "suspended": because is not None,
        "suspended_because": because,
    }
    write_certificate(folder, held)
    return held


def _nothing(kept: np.ndarray, lost: np.ndarray, n: int, alpha: float, delta: float) -> tuple[str, str]:
    """What to say where no rule that keeps anything holds: the first that keeps something, and the n that would do for it."""
    some = next((row for row in range(len(kept)) if kept[row].any()), None)
    allowed = most_losses(n, alpha, delta)
    if some is None:
        return (
            "no rule of the policy's grid keeps anything on these rows.",
            "edgeft route fit … with more rows, or use the strongest alone",
        )
    rate = float(lost[some].mean())
    more = least_n(alpha, delta, rate)
    would = f"about {more} rows would do at this rate" if more else "no number of rows would do at this rate"
    return (
        f"on {n} rows at most {allowed} losses keep alpha {alpha:g} at delta {delta:g}, and the strictest rule that keeps anything "
        f"({kept[some].mean():.1%}) loses {int(lost[some].sum())}; {would}.",
        "edgeft route calibrate … --alpha LARGER, or more rows",
    )
