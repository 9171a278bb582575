"""The decision. Pure: no I/O, no clock, no randomness but the number it is given.

The order is what keeps promises: privacy and abilities remove candidates first; only what is left is scored; limits,
distance, stickiness and the rule then choose among it, and exploration only ever moves to a stronger one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.errors import UsageError
from edgeft.router import privacy, rule
from edgeft.router.costs import cost_of, seconds_of
from edgeft.router.heads import Features, output_tokens, read, scores_of
from edgeft.router.policy import LoadedPolicy
from edgeft.router.request import Request, State, as_request
from edgeft.types import Decision

NOBODY = State()


class NoCandidate(UsageError):
    """Nobody may answer this request. `removed` says of each candidate why; `private` that it must not leave."""

    def __init__(self, message: str, removed: Mapping[str, str], private: bool) -> None:
        super().__init__(message, "add a local candidate that can take it, or change the policy's rules")
        self.removed, self.private = dict(removed), private


@dataclass
class Weighed:
    """What a rule chooses from, cheapest first."""

    names: list[str]
    scores: list[float]
    costs: list[float]
    latencies_s: list[float]


def decide(
    policy: LoadedPolicy,
    request: Request | str | Sequence[Mapping[str, Any]],
    u: float = 1.0,
    state: State = NOBODY,
    features: Features | None = None,
) -> Decision:
    """Where one request goes. `u` in [0, 1] is the random number that exploration uses (1: none).

    `features` are those of `heads.read`, where the caller has them already. Raises NoCandidate where privacy, abilities
    or outages leave nobody; never sends a private request to a remote candidate.
    """
    asked = as_request(request)
    private = privacy.why_private(policy.policy.privacy, asked)
    removed = _remove(policy, asked, state, private)
    allowed = [c for c in policy.policy.candidates if c["id"] not in removed]
    if not allowed:
        raise NoCandidate(_nobody(removed, private), removed, private is not None)
    features = features or read(policy, asked.text)
    found = weigh(policy, asked, state, allowed, features)
    settings = in_force(policy, asked, state)
    within, limit = within_limits(settings, found)
    chosen, reason = _choose(policy, settings, asked, found, within, features)
    if limit:
        reason = f"{reason}; {limit}"
    choice, propensity, explored = _explore(settings, within, chosen, u)
    if explored:
        reason = f"explores above {found.names[chosen]}"
    order = rule.ranked(settings, found.scores, found.costs, choice)
    return Decision(
        choice=found.names[choice],
        reason=f"private ({private}): {reason}" if private else reason,
        scores=dict(zip(found.names, found.scores, strict=True)),
        costs=dict(zip(found.names, found.costs, strict=True)),
        propensity=propensity,
        removed=removed,
        fallbacks=tuple(found.names[i] for i in order),
        private=private is not None,
        certified=_certified(policy, asked, state, settings, removed),
        explored=explored,
    )


def removed_for(
    policy: LoadedPolicy, request: Request | str | Sequence[Mapping[str, Any]], state: State = NOBODY
) -> dict[str, str]:
    """Candidate -> why it may not answer this request: what binds a pinned model, a fallback and a second model too."""
    asked = as_request(request)
    return _remove(policy, asked, state, privacy.why_private(policy.policy.privacy, asked))


def _remove(policy: LoadedPolicy, request: Request, state: State, private: str | None) -> dict[str, str]:
    removed: dict[str, str] = {}
    for candidate in policy.policy.candidates:
        # Remote unless it is said to be local: a candidate without the field must not pass for one.
        if private is not None and candidate.get("remote", True):
            removed[candidate["id"]] = f"private: {private}"
        elif request.tools and candidate.get("tools") is False:
            removed[candidate["id"]] = "takes no tool calls"
        elif (room := candidate.get("context_tokens")) and request.tokens + (request.max_tokens or 0) > room:
            removed[candidate["id"]] = f"context of {room} tokens"
        elif candidate["id"] in state.unavailable:
            removed[candidate["id"]] = "not available"
    return removed


def weigh(
    policy: LoadedPolicy,
    request: Request,
    state: State,
    allowed: Sequence[dict[str, Any]],
    features: Features,
) -> Weighed:
    """Scores, costs and latencies of the candidates that are left."""
    scores, settings = scores_of(policy, features), policy.policy.cost
    names = [c["id"] for c in allowed]
    place = policy.places
    costs, latencies, prompt = [], [], request.tokens
    for candidate in allowed:
        step = place[candidate["id"]]
        tokens = output_tokens(policy, features, step)
        tokens = min(tokens, request.max_tokens) if request.max_tokens else tokens
        queue_s = state.queue_s.get(candidate["id"], 0.0)
        costs.append(cost_of(settings, candidate, step, prompt, tokens, queue_s))
        latencies.append(queue_s + seconds_of(candidate, prompt, tokens))
    return Weighed(names, [scores[place[name]] for name in names], costs, latencies)


def in_force(policy: LoadedPolicy, request: Request, state: State) -> dict[str, Any]:
    """The rule as it binds now: the policy's, the request's own limits, the budget's λ, a suspension."""
    settings = policy.settings
    for name in ("floor", "max_cost", "max_latency_s"):
        if (own := getattr(request, name)) is not None:
            settings = settings | {name: own}
    if state.price_of_cost is not None:
        settings = settings | {"kind": "tradeoff", "price_of_cost": state.price_of_cost}
    if is_suspended(policy, state):
        instead = settings["on_suspended"]
        settings = settings | {
            "kind": "loss",
            "threshold": rule.ALWAYS_STRONG if instead == "strong" else float(instead),
            "suspended": True,
        }
    return settings


def is_suspended(policy: LoadedPolicy, state: State) -> bool:
    """True where there is a certificate and drift, or a hand, has suspended it."""
    return policy.certificate is not None and (bool(policy.certificate.get("suspended")) or state.suspended)


def within_limits(settings: Mapping[str, Any], found: Weighed) -> tuple[list[int], str]:
    """Which candidates keep the limits, and what to say where none does: the nearest one then stays."""
    left, said = list(range(len(found.names))), []
    for name, values, least in (
        ("max_latency_s", found.latencies_s, True),
        ("max_cost", found.costs, True),
        ("floor", found.scores, False),
    ):
        limit = settings.get(name)
        if limit is None:
            continue
        fits = [i for i in left if (values[i] <= limit if least else values[i] >= limit)]
        if not fits:
            said.append(f"nobody keeps {name} {limit:g}")
            fits = [min(left, key=lambda i: values[i]) if least else max(left, key=lambda i: values[i])]
        elif len(fits) < len(left):
            said.append(f"{name} {limit:g}")
        left = fits
    return left, ", ".join(said)


def _choose(
    policy: LoadedPolicy, settings: Mapping[str, Any], request: Request, found: Weighed, within: list[int], features: Features
) -> tuple[int, str]:  # fmt: skip
    names = [found.names[i] for i in within]
    if len(within) == 1:
        return within[0], "the only candidate left"
    if settings["sticky"] and request.previous in names:
        return found.names.index(request.previous), "the conversation stays where it began"
    if settings.get("suspended") and settings["threshold"] == rule.ALWAYS_STRONG:
        return within[-1], "the certificate is suspended: strongest"
    far = settings["far"]
    if far is not None and features.similarity < far:
        return within[
            -1
        ], f"far from the training rows (similarity {features.similarity:.2f} below {far:.2f})"
    scores, costs = [found.scores[i] for i in within], [found.costs[i] for i in within]
    at = rule.choose(settings, names, scores, costs)
    return within[at], _why(settings, scores, costs, at)


def _why(settings: Mapping[str, Any], scores: Sequence[float], costs: Sequence[float], at: int) -> str:
    if settings["kind"] == "tradeoff":
        return f"expected score {scores[at]:.3f} at cost {costs[at]:.3g}, price of cost {settings['price_of_cost']:.3g}"
    threshold = settings["threshold"]
    if threshold <= rule.ALWAYS_STRONG:
        return "policy sends every request to strong"
    if threshold >= rule.ALWAYS_WEAK:
        return "policy sends every request to weak"
    gain = scores[-1] - scores[at] if at < len(scores) - 1 else scores[-1] - max(scores[:-1])
    return (
        f"predicted gain {gain:+.3f} is {'below' if at < len(scores) - 1 else 'at or above'} {threshold:+.3f}"
    )


def _explore(
    settings: Mapping[str, Any], within: list[int], chosen: int, u: float
) -> tuple[int, float, bool]:
    """(choice, its propensity, explored). A share `explore` goes to the strongest: the certified loss can only fall."""
    share, strongest = settings["explore"], within[-1]
    if not share or strongest == chosen:
        return chosen, 1.0, False
    return (strongest, share, True) if u < share or share >= 1 else (chosen, 1.0 - share, False)


def _certified(
    policy: LoadedPolicy,
    request: Request,
    state: State,
    settings: Mapping[str, Any],
    removed: Mapping[str, str],
) -> bool:
    """True where the rule that chose is the one that was certified: nothing moved it."""
    held = policy.certificate
    return (
        held is not None
        and held.get("void") is None
        and not is_suspended(policy, state)
        and state.price_of_cost is None
        and not removed
        and not (settings["sticky"] and request.previous is not None)
        and all(
            settings[n] == policy.policy.rule.get(n, rule.DEFAULTS[n])
            for n in ("floor", "max_cost", "max_latency_s")
        )
    )


def _nobody(removed: Mapping[str, str], private: str | None) -> str:
    why = "; ".join(f"'{name}': {reason}" for name, reason in removed.items())
    first = "a private request has no local candidate" if private else "no candidate can take the request"
    return f"{first} ({why})."
