"""A policy's rule on logged traffic: shares, costs and latencies; quality too where propensities and grades allow it.

A log line (JSONL) holds what a Decision holds: choice, scores, costs, propensity, removed, private; and where known `request` (text,
opt-in), `latency_s` and `score` (the graded answer, 0..1). With exploration logged:

    IPS   mean of 1[new = logged] / propensity * score                    (Horvitz and Thompson 1952), and self-normalised
    DR    mean of q(new) + 1[new = logged] / propensity * (score - q(logged))       (Dudik et al. 2011), q the logged scores
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError
from edgeft.router.curves import interval
from edgeft.router.decision import NoCandidate, decide, within_limits
from edgeft.router.decision import Weighed as Seen
from edgeft.router.policy import LoadedPolicy
from edgeft.router.rule import DEFAULTS, choose

NEEDED = ("choice", "scores", "costs", "propensity")
LEAST_GRADED = 30


def replay(policy: LoadedPolicy, log: Path) -> dict[str, Any]:
    """What the policy would have done with the log's requests. Raises UsageError for lines that are no decisions."""
    lines = read_log(log, set(policy.candidates))
    chosen = [new_choice(policy, line) for line in lines]
    covered = [(line, new) for line, new in zip(lines, chosen, strict=True) if new is not None]
    n = len(covered)
    if not n:
        raise UsageError(f"{log}: no line can be decided by this policy.", f"head -1 {log}")
    names = list(policy.candidates)
    found: dict[str, Any] = {
        "n": n,
        "n_refused": len(lines) - n,
        "shares": {name: sum(new == name for _, new in covered) / n for name in names},
        "shares_logged": {name: sum(line["choice"] == name for line, _ in covered) / n for name in names},
        "changed": sum(new != line["choice"] for line, new in covered) / n,
        "cost_per_request": float(np.mean([line["costs"].get(new, 0.0) for line, new in covered])),
        "cost_per_request_logged": float(
            np.mean([line["costs"].get(line["choice"], 0.0) for line, _ in covered])
        ),
        "latency_s": _latencies(covered),
        "quality": None,
    }
    graded = [(line, new) for line, new in covered if line.get("score") is not None]
    explored = any(line["propensity"] < 1 for line, _ in graded)
    if not explored:
        found["quality_note"] = (
            "no exploration is logged (explore: 0.02 in a policy), so nothing is said of quality"
        )
    elif len(graded) < LEAST_GRADED:
        found["quality_note"] = (
            f"{len(graded)} graded lines; {LEAST_GRADED} are needed to say anything of quality"
        )
    else:
        found["quality"] = quality(graded)
    return found


def quality(graded: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """IPS, self-normalised IPS and doubly robust estimates with bootstrap intervals, and the share of lines that the log could have
    answered as the new policy does."""
    same = np.array([line["choice"] == new for line, new in graded], float)
    weight = same / np.array([line["propensity"] for line, _ in graded])
    score = np.array([float(line["score"]) for line, _ in graded])
    q_new = np.array([line["scores"].get(new, 0.0) for line, new in graded])
    q_old = np.array([line["scores"].get(line["choice"], 0.0) for line, _ in graded])
    ips, dr = weight * score, q_new + weight * (score - q_old)
    # Under the log the base choice or the strongest could have come: another one could not, and its weight is nought for ever.
    possible = [
        new in (line["choice"], list(line["scores"])[-1]) or line.get("explored", False)
        for line, new in graded
    ]

    def normalised(rows: np.ndarray) -> float:
        if weight[rows].sum() == 0:
            raise ValueError
        return float(ips[rows].sum() / weight[rows].sum())

    everything = np.arange(len(graded))
    found: dict[str, Any] = {
        "n_graded": len(graded),
        "could_have_come": float(np.mean(possible)),
        "logged_mean": float(score.mean()),
        "ips": {"mean": float(ips.mean()), "ci95": interval(lambda i: ips[i].mean(), len(graded))},
        "doubly_robust": {"mean": float(dr.mean()), "ci95": interval(lambda i: dr[i].mean(), len(graded))},
    }
    if weight.sum():
        found["self_normalised"] = {"mean": normalised(everything), "ci95": interval(normalised, len(graded))}
    return found


def read_log(path: Path, known: set[str]) -> list[dict[str, Any]]:
    """The lines of a log. Raises UsageError naming the first that is not a decision between candidates of the policy."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}.", f"ls {path.parent}")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            missing = [name for name in NEEDED if name not in line]
        except (json.JSONDecodeError, TypeError):
            missing = list(NEEDED)
        if missing:
            raise UsageError(
                f"{path} line {number} is no logged decision: it lacks {', '.join(missing)}.",
                f"sed -n {number}p {path}",
            )
        if line["choice"] not in known or not 0 < line["propensity"] <= 1:
            raise UsageError(
                f"{path} line {number}: the choice or the propensity is not of this policy.",
                f"sed -n {number}p {path}",
            )
        lines.append(line)
    if not lines:
        raise UsageError(f"{path} holds no decisions.", f"head -3 {path}")
    return lines


def new_choice(policy: LoadedPolicy, line: dict[str, Any]) -> str | None:
    """The policy's choice for a logged request: by `decide` where its text was kept, else its rule on the logged scores and costs, among
    who was allowed then. None where nobody is allowed."""
    if isinstance(line.get("request"), str) and line["request"]:
        try:
            return decide(policy, line["request"]).choice
        except NoCandidate:
            return None
    names = [name for name in policy.candidates if name in line["scores"] and name in line["costs"]]
    if not names:
        return None
    settings = {**DEFAULTS, **policy.policy.rule, "max_latency_s": None}
    seen = Seen(
        names, [line["scores"][n] for n in names], [line["costs"][n] for n in names], [0.0] * len(names)
    )
    within, _ = within_limits(settings, seen)
    at = choose(
        settings,
        [names[i] for i in within],
        [seen.scores[i] for i in within],
        [seen.costs[i] for i in within],
    )
    return names[within[at]]


def _latencies(covered: list[tuple[dict[str, Any], str]]) -> dict[str, float] | None:
    """Mean logged latency by candidate, and the mean over the new choices where each was seen at least once."""
    by_name: dict[str, list[float]] = {}
    for line, _ in covered:
        if line.get("latency_s") is not None:
            by_name.setdefault(line["choice"], []).append(float(line["latency_s"]))
    means = {name: float(np.mean(values)) for name, values in by_name.items()}
    if not means or any(new not in means for _, new in covered):
        return means or None
    return {**means, "replayed": float(np.mean([means[new] for _, new in covered]))}
