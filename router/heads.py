"""From a request's text to expected scores and output tokens: linear heads on hashed text, and on an embedding with
its neighbours where the policy has one. Column 0 is the cheapest candidate's score, column i a gain over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter, mul
from typing import TYPE_CHECKING, Any

from edgeft.router.features import vector

if TYPE_CHECKING:
    from edgeft.router.policy import LoadedPolicy


@dataclass(frozen=True)
class Features:
    """What the heads read of one text."""

    sparse: dict[int, float]  # hashed words and word pairs: column -> value
    similarity: float  # to the training rows, 0..1: share of the text's weight in columns that training saw
    embedding: Any = None  # float32 [E], of length 1
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what was computed of them already


def read(policy: LoadedPolicy, text: str) -> Features:
    """The features of a text. Runs the encoder where the policy has one; else pure arithmetic."""
    sparse = vector(text)
    return Features(sparse, similarity(policy, sparse), policy.encoder(text) if policy.encoder else None)


def similarity(policy: LoadedPolicy, sparse: dict[int, float]) -> float:
    """Share of a text's squared weight that lies in columns which a training row had; 0 for an empty text."""
    seen = policy.arrays.get("seen.columns")
    if seen is None:
        return 1.0
    return sum([value * value for column, value in sparse.items() if seen[column]])


def dot(row: Sequence[float], sparse: Mapping[int, float]) -> float:
    """A row of weights times a sparse vector, without a step of Python's a column."""
    if len(sparse) < 2:  # itemgetter of one gives no tuple
        return sum(row[column] * value for column, value in sparse.items())
    return sum(map(mul, itemgetter(*sparse)(row), sparse.values()))


def outputs_of(policy: LoadedPolicy, features: Features) -> list[float]:
    """Score of the first candidate and gains of the others, unclipped."""
    text = [bias + dot(row, features.sparse) for row, bias in zip(policy.weights, policy.bias, strict=True)]
    if features.embedding is None or "blend" not in policy.arrays:
        return text
    import numpy as np

    from edgeft.router.embedding import mix

    spec = policy.policy.features["embedding"]
    return mix(policy.arrays, spec, features.embedding[None], np.array([text]))[0].tolist()


def scores_of(policy: LoadedPolicy, features: Features) -> list[float]:
    """Expected score of every candidate, cheapest first. Gains are clipped to -1..1, levels are left as they come out: only
    differences decide, and a clip would make ties of them."""
    known = features.known.get("scores")
    if known is None or known[0] is not policy.weights:
        first, *gains = outputs_of(policy, features)
        found = [first, *(first + min(1.0, max(-1.0, gain)) for gain in gains)]
        known = features.known["scores"] = (policy.weights, found)
    return list(known[1])


def output_tokens(policy: LoadedPolicy, features: Features, place: int) -> float:
    """Expected output tokens of the candidate at `place` in the order; its mean where no head was worth fitting."""
    candidate = policy.policy.candidates[place]
    weights = policy.arrays.get("tokens.weights")
    if weights is None:
        return candidate.get("mean_output_tokens") or 0.0
    known = features.known.get(place)
    if known is None or known[0] is not weights:
        log = float(policy.arrays["tokens.bias"][place]) + dot(weights[place], features.sparse)
        known = features.known[place] = (weights, max(0.0, math.expm1(min(log, 12.0))))
    tokens: float = known[1]
    return tokens
