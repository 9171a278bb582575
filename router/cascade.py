"""Draft, judge, keep or escalate: one expected-value rule for routing and cascading.

The judge predicts what the strongest would gain over this very draft, from prompt, draft, log-probability, deterministic checks and a second
model's agreement. Asking the local model first is worth it where

    P(keep) * score(draft) + (1 - P(keep)) * score(strongest) - price * (cost(draft) + (1 - P(keep)) * cost(strongest))

is above both of sending at once and keeping unseen. A draft that was started is paid for: after it only the strongest's cost counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.router import kernel, ridge
from edgeft.router.blend import nonnegative
from edgeft.router.draft_features import FEATURES, features
from edgeft.router.drafts import Draft, agree, checks, first_tokens
from edgeft.router.features import matrix
from edgeft.router.figures import choose_threshold
from edgeft.router.kernel import compressed, scaled, standardised
from edgeft.router.request import CHARS_PER_TOKEN, Request, as_request

if TYPE_CHECKING:
    from edgeft.router.policy import LoadedPolicy
    from edgeft.types import Decision

WIDTHS = (15.0, 40.0, 100.0, 250.0)  # of standardised features
MUST_HOLD = ("json_schema", "label")  # a draft that fails one of these is never kept
FOLDS = 5


@dataclass(frozen=True)
class Judge:
    """Predicts gain of the strongest over a draft: a kernel head on its features, and hashed words of prompt and draft, blended. Arrays are
    float32; `threshold` is where a draft is escalated."""

    head: kernel.Kernel
    mean: np.ndarray  # [features]
    scale: np.ndarray
    words: np.ndarray  # [2, D]: of the prompt, of the draft
    words_bias: np.ndarray  # [2]
    blend: np.ndarray  # [3]: kernel, prompt, draft; of what each says above `centre`
    centre: float
    threshold: float = 0.0
    after_tokens: int | None = None  # judges the first so many tokens (characters / 4); None: whole drafts


@dataclass(frozen=True)
class Read:
    """What the judge reads of drafts, one a row."""

    numbers: np.ndarray  # [n, features]
    prompts: np.ndarray  # [n, D]
    drafts: np.ndarray  # [n, D]

    def rows(self, at: np.ndarray) -> Read:
        """Some of the rows."""
        return Read(self.numbers[at], self.prompts[at], self.drafts[at])


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
    judge, left_out = fit_gain(read_drafts(rows, after_tokens), gain)
    threshold = choose_threshold(left_out, draft_scores, draft_scores + gain, max_loss)
    return replace(judge, threshold=threshold, after_tokens=after_tokens)


def read_drafts(rows: Sequence[tuple[str, Draft]], after_tokens: int | None = None) -> Read:
    """What the judge reads of (prompt, draft) rows."""
    seen = [(prompt, first_tokens(draft, after_tokens)) for prompt, draft in rows]
    numbers = np.array([features(prompt, draft) for prompt, draft in seen])
    return Read(
        compressed(numbers),
        matrix([p for p, _ in seen]),
        matrix([d.text for _, d in seen]),
    )


def fit_gain(read: Read, gain: np.ndarray, most: int = kernel.LANDMARKS) -> tuple[Judge, np.ndarray]:
    """(a judge without its threshold, its leave-one-out predictions [n]). Width, strengths and blend are those of the least
    leave-one-out error."""
    x, mean, scale = standardised(read.numbers)
    head = kernel.fit(x, gain[:, None], WIDTHS, most)
    words = [ridge.fit(part, gain) for part in (read.prompts, read.drafts)]
    centre = float(gain.mean())
    parts = [head.left_out[:, 0] - centre, *(w.left_out - centre for w in words)]
    blend = nonnegative(parts, gain - centre)
    judge = Judge(
        head, mean, scale, np.array([w.weights for w in words], np.float32), np.array([w.bias for w in words]), blend, centre
    )  # fmt: skip
    return judge, centre + np.column_stack(parts) @ blend


def gains(judge: Judge, read: Read) -> np.ndarray:
    """What the strongest would gain over each draft, float64 [n]."""
    x = scaled(read.numbers, judge.mean, judge.scale)
    parts = [kernel.predict(judge.head, x)[:, 0]]
    parts += [
        p @ w + b for p, w, b in zip((read.prompts, read.drafts), judge.words, judge.words_bias, strict=True)
    ]
    return judge.centre + (np.column_stack(parts) - judge.centre) @ judge.blend


def predicted_gain(judge: Judge, prompt: str, draft: Draft) -> float:
    """What the strongest would gain over this draft."""
    return float(gains(judge, read_drafts([(prompt, draft)], judge.after_tokens))[0])


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
    return np.array([agree(a, b) for a, b in zip(one, two, strict=True)], bool)


ARRAYS = ("mean", "scale", "words", "words_bias", "blend")


def judge_tensors(judge: Judge) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, manifest block) of a judge for the policy folder."""
    head = {"landmarks": judge.head.landmarks, "weights": judge.head.weights, "bias": judge.head.bias}
    tensors = {
        f"judge.{k}": np.asarray(v, np.float32)
        for k, v in (head | {k: getattr(judge, k) for k in ARRAYS}).items()
    }
    block = {
        "features": list(FEATURES), "width": judge.head.width, "centre": judge.centre, "threshold": judge.threshold,
        "after_tokens": judge.after_tokens,
    }  # fmt: skip
    return tensors, block


def load_judge(tensors: Mapping[str, np.ndarray], block: Mapping[str, Any]) -> Judge:
    """The judge that `judge_tensors` wrote. Raises ValueError where its features are not those of this edgeft."""
    if block["features"] != list(FEATURES):
        raise ValueError("the judge's features are not those of this edgeft")
    weights = np.asarray(tensors["judge.weights"], float)
    head = kernel.Kernel(
        tensors["judge.landmarks"], weights, np.asarray(tensors["judge.bias"], float), block["width"], [], np.zeros((0, weights.shape[1]))
    )  # fmt: skip
    arrays = {name: np.asarray(tensors[f"judge.{name}"], float) for name in ARRAYS}
    return Judge(
        head,
        **arrays,
        centre=block["centre"],
        threshold=block["threshold"],
        after_tokens=block["after_tokens"],
    )
