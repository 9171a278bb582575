"""Why one request goes where it goes: what spoke, scores, costs, the rule that bound, what would have changed it."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from edgeft.router import rule
from edgeft.router.decision import NOBODY, decide, in_force
from edgeft.router.features import DIMENSIONS, hashes, spaced
from edgeft.router.heads import Features, read, spoke_by_head
from edgeft.router.policy import LoadedPolicy
from edgeft.router.request import Request, as_request

SPOKE = 8
FLIPS = 40


def explain(policy: LoadedPolicy, request: Request | str) -> dict[str, Any]:
    """The decision with its grounds. Holds words of the request: for its author's eyes, not for a log."""
    asked = as_request(request)
    features = read(policy, asked.text)
    decision = decide(policy, asked, features=features)
    settings = in_force(policy, asked, NOBODY)
    return {
        **asdict(decision),
        "similarity": features.similarity,
        "spoke_by_head": spoke_by_head(policy, features),
        "spoke": spoke(policy, asked.text, features),
        "rule": {k: v for k, v in settings.items() if v is not None},
        "would_change_it": changes(policy, asked, decision.choice),
        "certificate": certificate_line(policy),
    }


def spoke(policy: LoadedPolicy, text: str, features: Features) -> list[dict[str, Any]]:
    """The words and pairs that moved the strongest's predicted gain most by the hashed head, at its weight in the blend; those that
    share a column are one."""
    words = spaced(text).decode().replace("\0", " ").split()
    seen = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    grams: dict[int, dict[str, None]] = {}
    for gram, column in zip(seen, (hashes(text) % DIMENSIONS).tolist(), strict=True):
        grams.setdefault(column, {})[gram] = None
    row = policy.weights[-1]
    weight = float(policy.arrays["blend"][0, -1]) if "blend" in policy.arrays else 1.0
    moved = sorted(
        ((weight * row[column] * value, column) for column, value in features.sparse.items()),
        key=lambda m: -abs(m[0]),
    )
    return [{"text": " / ".join(grams[column]), "gain": part} for part, column in moved[:SPOKE] if part]


def changes(policy: LoadedPolicy, request: Request, choice: str) -> list[str]:
    """What else in the rule or the request would have given another choice, found by trying it."""
    said = []
    stored = policy.policy.rule
    if stored["kind"] == "loss":
        steps = [rule.ALWAYS_STRONG, *(i / FLIPS for i in range(-FLIPS, FLIPS + 1)), rule.ALWAYS_WEAK]
        now, name = stored["threshold"], "threshold"
    else:
        now, name = stored["price_of_cost"], "price_of_cost"
        steps = [0.0, *((now or 1.0) * 2 ** (i / 4) for i in range(-24, 25))]
    for low in (True, False):
        side = sorted((v for v in steps if (v < now if low else v > now)), reverse=low)
        for value in side:
            other = decide(
                replace(policy, policy=replace(policy.policy, rule={**stored, name: value})), request
            ).choice
            if other != choice:
                said.append(f"a {name} of {value:.3g} (now {now:.3g}): {other}")
                break
    for name in ("floor", "max_cost", "max_latency_s", "far"):
        if stored.get(name) is not None:
            free = replace(policy, policy=replace(policy.policy, rule={**stored, name: None}))
            asked = request
            if name != "far":
                cleared: dict[str, Any] = {name: None}
                asked = replace(request, **cleared)
            if (other := decide(free, asked).choice) != choice:
                said.append(f"without {name} {stored[name]:g}: {other}")
    if policy.policy.privacy:
        open_to_all = replace(policy, policy=replace(policy.policy, privacy={}))
        if (other := decide(open_to_all, replace(request, private=False)).choice) != choice:
            said.append(f"without the privacy rules: {other}")
    return said


def certificate_line(policy: LoadedPolicy) -> str:
    """One sentence on the certificate."""
    held = policy.certificate
    if held is None:
        return "none: edgeft route calibrate"
    if held.get("void"):
        return f"void: {held['void']}"
    if held.get("suspended"):
        return f"suspended: {held.get('suspended_because')}"
    return f"holds: at most {held['alpha']:.1%} lost by keeping, at confidence {1 - held['delta']:.0%}, n {held['n']}, of {held['date'][:10]}"
