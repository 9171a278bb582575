"""The tensors of a policy out of its fitting rows: heads on the text, on an embedding, on its surface, output tokens, the judge of drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError
from edgeft.router import blend, clusters, ridge, surface
from edgeft.router.drafts import Draft
from edgeft.router.duplicates import signatures
from edgeft.router.features import SPEC, matrix
from edgeft.router.heads import by_head
from edgeft.router.reports import Item


def fit_heads(
    items: Sequence[Item], encoder: Path | None, looks: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(tensors, what is said of the heads, features block). Targets: the first candidate's score, the others' gains over it."""
    texts = [item.request for item in items]
    x, targets = matrix(texts), targets_of(np.array([item.scores for item in items]))
    spec, vectors = None, None
    if encoder:
        from edgeft.router.embedding import encoded

        spec, vectors = encoded(encoder, texts)
    tensors, said, found = heads_on(x, vectors, surface.of(texts) if looks else {}, targets)
    if spec:
        found["embedding"] |= spec
    tensors |= {"seen.columns": (x != 0).any(0).astype(np.uint8), "seen.signatures": signatures(texts)}
    if (centres := clusters.fit(x)) is not None:
        tensors["clusters"] = centres
    said["tokens"] = _token_head(items, x, tensors)
    return tensors, said, {**SPEC, **found}


def heads_on(
    x: np.ndarray, vectors: np.ndarray | None, looks: Mapping[str, np.ndarray], targets: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(tensors, what is said, features block) of heads on hashed words [n, D], the encoder's vectors [n, E], `surface.of`
    and targets [n, K], blended."""
    fitted = ridge.fit_all(x, targets)
    tensors = {
        "text.weights": np.array([f.weights for f in fitted], np.float32),
        "text.bias": np.array([f.bias for f in fitted], np.float32),
    }
    said: dict[str, Any] = {
        "kind": "ridge on the first score and the gains over it",
        **{k: [getattr(f, k) for f in fitted] for k in ("strength", "loo_mse", "constant_mse")},
    }
    features: dict[str, Any] = {}
    left_out = {"hashed": np.column_stack([head.left_out for head in fitted])}
    if vectors is not None:
        from edgeft.router.embedding import vector_heads

        more, said["embedding"], features["embedding"], others = vector_heads(vectors, targets)
        tensors |= more
        left_out |= others
    for kind, rows in looks.items():
        more, block, seen = surface.fit(kind, rows, targets)
        if blend.pays(list(left_out.values()), seen, targets):
            tensors |= more
            features[kind] = block
            left_out[kind] = seen
    if len(left_out) > 1:
        tensors |= blend.fit(list(left_out.values()), targets)
        said["blend"] = dict(zip(left_out, tensors["blend"].tolist(), strict=True))
    return tensors, said, features


def parts_on(
    tensors: Mapping[str, Any],
    features: Mapping[str, Any],
    x: np.ndarray,
    vectors: np.ndarray | None,
    looks: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The outputs [n, K] of each head that `heads_on` fitted, in the order that they are blended in."""
    hashed = x @ tensors["text.weights"].T.astype(float) + tensors["text.bias"].astype(float)
    return by_head(tensors, features, hashed, vectors, looks)


def blended(tensors: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The outputs [n, K] of the heads together."""
    return blend.mix(tensors, list(parts.values())) if "blend" in tensors else parts["hashed"]


def targets_of(quality: np.ndarray) -> np.ndarray:
    """What the heads learn: column 0 as it is, the others less column 0."""
    return np.column_stack([quality[:, 0], quality[:, 1:] - quality[:, :1]])


def predicted(tensors: Mapping[str, Any], features: Mapping[str, Any], items: Sequence[Item]) -> np.ndarray:
    """Expected scores [items, candidates] as `decide` computes them from these tensors."""
    texts = [item.request for item in items]
    vectors = None
    if spec := features.get("embedding"):
        from edgeft.router.embedding import load_encoder

        encoder = load_encoder(spec)
        vectors = np.array([encoder(text) for text in texts])
    looks = surface.of(texts) if any(kind in features for kind in surface.KINDS) else {}
    outputs = blended(tensors, parts_on(tensors, features, matrix(texts), vectors, looks))
    gains = np.clip(outputs[:, 1:], -1.0, 1.0)
    return np.column_stack([outputs[:, 0], outputs[:, :1] + gains])


def fit_cascade(
    items: Sequence[Item],
    candidates: Sequence[Mapping[str, Any]],
    max_loss: float,
    after_tokens: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, manifest block) of a judge over the cheapest candidate's drafts. Where the next cheapest is local too and is not
    the strongest, its agreement is a feature. Raises UsageError where the reports hold no answers."""
    from edgeft.router.cascade import fit_judge, judge_tensors

    second = 1 if len(candidates) > 2 and not candidates[1].get("remote") else None
    rows = [(item.request, draft_of(item, second)) for item in items]
    quality = np.array([item.scores for item in items])
    judge = fit_judge(rows, quality[:, -1] - quality[:, 0], quality[:, 0], max_loss, after_tokens)
    tensors, block = judge_tensors(judge)
    return tensors, {
        **block,
        "draft": candidates[0]["id"],
        "second": None if second is None else candidates[second]["id"],
    }


def draft_of(item: Item, second: int | None) -> Draft:
    """The cheapest candidate's answer as a draft. Raises UsageError where the item holds none."""
    text = item.outputs[0] if item.outputs else None
    if text is None:
        raise UsageError(
            f"the item '{item.item_id}' holds no answer, which a cascade is fitted on.",
            "edgeft bench …, without --cascade",
        )
    other = item.outputs[second] if second is not None else None
    return Draft(text, None, item.logprobs[0] if item.logprobs else None, other)


def _token_head(
    items: Sequence[Item], x: np.ndarray, tensors: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Fit log(1 + output tokens) of every candidate where all are known; kept where it beats the mean left-one-out."""
    if any(value is None for item in items for value in item.output_tokens):
        return None
    target = np.log1p(np.array([item.output_tokens for item in items], float))
    if float(target.std(0).max()) < 1e-9:
        return None
    fitted = ridge.fit_all(x, target)
    worth = [f.loo_mse < f.constant_mse for f in fitted]
    tensors["tokens.weights"] = np.array(
        [f.weights if w else np.zeros_like(f.weights) for f, w in zip(fitted, worth, strict=True)], np.float32
    )
    tensors["tokens.bias"] = np.array(
        [f.bias if w else t for f, w, t in zip(fitted, worth, target.mean(0), strict=True)], np.float32
    )
    return {
        "loo_mse": [f.loo_mse for f in fitted],
        "constant_mse": [f.constant_mse for f in fitted],
        "used": worth,
    }
