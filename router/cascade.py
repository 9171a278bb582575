"""Draft, judge, keep or escalate: one expected-value rule for routing and cascading.

The judge predicts what the strongest would gain over this very draft, from prompt, draft, log-probability, deterministic checks and a second
model's agreement. Asking the local model first is worth it where

    P(keep) * score(draft) + (1 - P(keep)) * score(strongest) - price * (cost(draft) + (1 - P(keep)) * cost(strongest))

is above both of sending at once and keeping unseen. A draft that was started is paid for: after it only the strongest's cost counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.router import kernel
from edgeft.router.drafts import FEATURES, Draft, checks, features
from edgeft.router.figures import choose_threshold
from edgeft.router.prefix import cut
from edgeft.router.request import CHARS_PER_TOKEN, Request, as_request

if TYPE_CHECKING:
    from edgeft.router.policy import LoadedPolicy
    from edgeft.types import Decision

WIDTHS = (15.0, 40.0, 100.0, 250.0)  # of standardised features
MUST_HOLD = ("json_schema", "label")  # a draft that fails one of these is never kept
FOLDS = 5


@dataclass(frozen=True)
class Judge:
    """Predicts gain of the strongest over a draft. Arrays are float32; `threshold` is where a draft is escalated."""

    head: kernel.Kernel
    mean: np.ndarray  # [features]
    scale: np.ndarray
    threshold: float
    after_tokens: int | None = None  # judges the first so many tokens (characters / 4); None: whole drafts


@dataclass(frozen=True)
class Verdict:
    """Keep or escalate, and why."""

    keep: bool
    predicted_gain: float
    reason: str


def fit_judge(
    rows: Sequence[tuple[str, Draft]], gain: np.ndarray, draft_scores: np.ndarray, max_loss: float = 0.01, after_tokens: int | None = None
) -> Judge:  # fmt: skip
    """Fit on (prompt, draft) rows, the strongest's gain over each draft [n] and the drafts' scores [n]; the threshold is chosen on
    leave-one-out predictions: the fewest escalations whose mean score is within `max_loss` of always escalating."""
    read = [features(prompt, cut(draft, after_tokens)) for prompt, draft in rows]
    x, mean, scale = standardised(np.array(read))
    head = kernel.fit(x, gain[:, None], WIDTHS)
    threshold = choose_threshold(head.left_out[:, 0], draft_scores, draft_scores + gain, max_loss)
    return Judge(head, mean, scale, threshold, after_tokens)


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of mean 0 and deviation 1, clipped to 4; mean; scale). A column without spread becomes 0."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale < 1e-9, 1.0, scale)
    return np.clip((x - mean) / scale, -4, 4), mean, scale


def predicted_gain(judge: Judge, prompt: str, draft: Draft) -> float:
    """What the strongest would gain over this draft."""
    x = np.clip((np.array([features(prompt, cut(draft, judge.after_tokens))]) - judge.mean) / judge.scale, -4, 4)
    return float(kernel.predict(judge.head, x)[0, 0])


def judge_draft(
    judge: Judge, prompt: str, draft: Draft, *, may_escalate: bool = True, schema: Mapping[str, Any] | None = None, labels: Sequence[str] = ()
) -> Verdict:  # fmt: skip
    """Keep a draft or escalate it, before a byte is sent. `may_escalate` is False where no stronger candidate is allowed (privacy):
    the draft is then kept whatever it is worth."""
    found = checks(draft, schema=schema, labels=labels)
    gain = predicted_gain(judge, prompt, draft)
    if not may_escalate:
        return Verdict(True, gain, "kept: nobody stronger is allowed")
    failed = [name for name in MUST_HOLD if found[name] is False]
    if failed and draft.complete:
        return Verdict(False, gain, f"escalated: the draft fails {', '.join(failed)}")
    keep = gain < judge.threshold
    return Verdict(
        keep,
        gain,
        f"{'kept' if keep else 'escalated'}: predicted gain {gain:+.3f}, threshold {judge.threshold:+.3f}",
    )


def judge(
    policy: LoadedPolicy, request: Request | str, draft: Draft, decision: Decision,
    schema: Mapping[str, Any] | None = None, labels: Sequence[str] = (),
) -> Verdict:  # fmt: skip
    """Keep or escalate the draft of a request that `decide` sent to a candidate that may draft (`drafts(policy, decision)`). Where nobody
    stronger is allowed the draft is kept."""
    asked = as_request(request)
    stronger = strongest_allowed(policy, decision)
    return judge_draft(
        policy.judge, asked.text, draft, may_escalate=stronger is not None, schema=schema, labels=labels
    )


def drafts(policy: LoadedPolicy, decision: Decision) -> bool:
    """True where the choice's answer is to be judged before it is sent: it is the policy's drafter and not the strongest allowed."""
    block = policy.policy.features.get("cascade")
    return (
        block is not None
        and decision.choice == block["draft"]
        and strongest_allowed(policy, decision) is not None
    )


def strongest_allowed(policy: LoadedPolicy, decision: Decision) -> str | None:
    """Who a draft is escalated to: the last of the candidates that were not removed, None where that is the choice itself."""
    last = next(
        name for name in reversed(policy.candidates) if name == decision.choice or name in decision.fallbacks
    )
    return None if last == decision.choice else last


def first(
    keep_share: float, draft_score: float, strong_score: float, draft_cost: float, strong_cost: float, price_of_cost: float,
    draft_s: float = 0.0, strong_s: float = 0.0, max_latency_s: float | None = None,
) -> tuple[str, dict[str, float]]:  # fmt: skip
    """("local", "cascade" or "strong", the worth of each) before anything has run. `draft_score` is the expected score of a draft that the
    judge keeps. The cascade is left out where draft and strongest one after the other would break the latency limit."""
    worth = {
        "local": draft_score - price_of_cost * draft_cost,
        "strong": strong_score - price_of_cost * strong_cost,
        "cascade": keep_share * draft_score
        + (1 - keep_share) * strong_score
        - price_of_cost * (draft_cost + (1 - keep_share) * strong_cost),
    }
    if max_latency_s is not None and draft_s + strong_s > max_latency_s:
        del worth["cascade"]
    return max(worth, key=lambda name: worth[name]), worth


def enough(policy: LoadedPolicy, text: str) -> bool:
    """True where what has come of a draft is all that the judge reads: it may be judged before the rest is there."""
    tokens = policy.judge.after_tokens
    return tokens is not None and len(text) > CHARS_PER_TOKEN * tokens


def agreement_keeps(one: Sequence[str], two: Sequence[str]) -> np.ndarray:
    """bool [n]: where two local models' answers agree and the first one's is kept."""
    from edgeft.router.drafts import agree

    return np.array([agree(a, b) for a, b in zip(one, two, strict=True)], bool)


def judge_tensors(judge: Judge) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, manifest block) of a judge for the policy folder."""
    tensors = {
        "judge.landmarks": judge.head.landmarks, "judge.weights": judge.head.weights.astype(np.float32),
        "judge.bias": judge.head.bias.astype(np.float32), "judge.mean": judge.mean.astype(np.float32),
        "judge.scale": judge.scale.astype(np.float32),
    }  # fmt: skip
    return tensors, {"features": list(FEATURES), "width": judge.head.width, "threshold": judge.threshold, "after_tokens": judge.after_tokens}


def load_judge(tensors: Mapping[str, np.ndarray], block: Mapping[str, Any]) -> Judge:
    """The judge that `judge_tensors` wrote. Raises ValueError where its features are not those of this edgeft."""
    if block["features"] != list(FEATURES):
        raise ValueError("the judge's features are not those of this edgeft")
    weights = np.asarray(tensors["judge.weights"], float)
    head = kernel.Kernel(
        tensors["judge.landmarks"],
        weights,
        np.asarray(tensors["judge.bias"], float),
        block["width"],
        [],
        np.zeros((0, weights.shape[1])),
    )
    return Judge(
        head,
        np.asarray(tensors["judge.mean"], float),
        np.asarray(tensors["judge.scale"], float),
        block["threshold"],
        block.get("after_tokens"),
    )
