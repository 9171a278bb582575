"""From a request's text to expected scores and output tokens: linear heads on hashed text, and on an embedding with its
neighbours and on the text's surface where the policy has them. Column 0 is the cheapest candidate's score, column i a gain over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.router import blend, clusters, surface
from edgeft.router.features import arrays

if TYPE_CHECKING:
    from edgeft.router.policy import LoadedPolicy


@dataclass
class Features:
    """What the heads read of one text."""

    columns: np.ndarray  # int64 [n]: hashed words and word pairs
    values: np.ndarray  # float64 [n]
    seen: Any = None  # float64 [D], 1 in columns that a fitting row had; None where the policy does not know
    embedding: Any = None  # float32 [E], as the encoder gives it
    looks: dict[str, Any] = field(default_factory=dict)  # head -> float64 [d], `surface.numbers`
    known: dict[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # what was computed of them already

    @cached_property
    def similarity(self) -> float:
        """To the fitting rows, 0..1: the share of the text's squared weight that lies in columns which they had; 0 for an empty text."""
        if self.seen is None:
            return 1.0
        return float(self.values * self.values @ self.seen.take(self.columns))

    @property
    def sparse(self) -> dict[int, float]:
        """Column -> value."""
        return dict(zip(self.columns.tolist(), self.values.tolist(), strict=True))


def read(policy: LoadedPolicy, text: str) -> Features:
    """The features of a text. Runs the encoder where the policy has one; else pure arithmetic."""
    columns, values = arrays(text)
    embedding = policy.encoder(text) if policy.encoder else None
    looks = {kind: surface.numbers(kind, text) for kind in surface.KINDS if kind in policy.policy.features}
    return Features(columns, values, policy.arrays.get("seen.columns"), embedding, looks)


def cluster_of(policy: LoadedPolicy, features: Features) -> int | None:
    """The cluster of training texts that a text is nearest to; None where the policy has none."""
    centres = policy.arrays.get("clusters")
    return None if centres is None else clusters.nearest(centres, features.columns, features.values)


def outputs_of(policy: LoadedPolicy, features: Features) -> list[float]:
    """Score of the first candidate and gains of the others, unclipped."""
    weights = policy.by_column.take(features.columns, axis=0)
    text = features.values @ weights + policy.bias_row
    if "blend" not in policy.arrays:
        return text.tolist()
    return blend.mix(policy.arrays, list(parts_of(policy, features, text).values()))[0].tolist()


def parts_of(policy: LoadedPolicy, features: Features, text: np.ndarray) -> dict[str, np.ndarray]:
    """Each head's outputs [1, K] of one text; `text` [K] are the hashed head's."""
    vectors = None if features.embedding is None else features.embedding[None]
    looks = {kind: numbers[None] for kind, numbers in features.looks.items()}
    return by_head(policy.arrays, policy.policy.features, text[None], vectors, looks)


def by_head(
    tensors: Mapping[str, Any],
    specs: Mapping[str, Any],
    hashed: np.ndarray,
    vectors: np.ndarray | None,
    looks: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Outputs [n, K] of each head that there is, in the order that they are blended in: `hashed` [n, K] as they come, those on the
    encoder's vectors [n, E], those on `surface.of`'s numbers."""
    parts = {"hashed": hashed}
    if vectors is not None and (spec := specs.get("embedding")):
        from edgeft.router.embedding import parts_of

        parts["kernel"], parts["neighbours"] = parts_of(tensors, spec, vectors)
    for kind, rows in looks.items():
        if kind in specs:
            parts[kind] = surface.outputs(kind, tensors, specs[kind]["width"], rows)
    return parts


def spoke_by_head(policy: LoadedPolicy, features: Features) -> dict[str, float]:
    """What each head moved the strongest's predicted gain from its mean over the fitting rows (the hashed head alone: from its bias)."""
    hashed = features.values @ policy.by_column.take(features.columns, axis=0)
    if "blend" not in policy.arrays:
        return {"hashed": float(hashed[-1])}
    parts = parts_of(policy, features, hashed + policy.bias_row)
    weights, mean = policy.arrays["blend"][:, -1], float(policy.arrays["blend.means"][-1])
    return {
        name: float(weight * (part[0, -1] - mean))
        for (name, part), weight in zip(parts.items(), weights, strict=True)
    }


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
    known = features.known.get("tokens")
    if known is None or known[0] is not weights:
        log = weights[:, features.columns] @ features.values + policy.arrays["tokens.bias"]
        known = features.known["tokens"] = (
            weights,
            np.maximum(0.0, np.expm1(np.minimum(log, 12.0))).tolist(),
        )
    tokens: float = known[1][place]
    return tokens
