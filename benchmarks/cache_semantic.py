"""Semantic cache: wrong hits among hits, and true pairs hit, on paraphrase pairs with generated hard negatives. Prints JSON.

Two halves of the pairs by hash: the threshold is calibrated on one and tested on the other, both ways round. Each pair gives one right
candidate (its paraphrase), up to three hard negatives (number, negation, order; made from the paraphrase and from the sentence itself) and its
most similar foreign sentence. The rival in the same run is the embedding alone, its threshold calibrated to the same budget.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import route_data

from edgeft.errors import Inconclusive
from edgeft.router.cache.negatives import KINDS, negative
from edgeft.router.cache.semantic import bound_of, calibrate, pairs_likeness, passed_guards

FIXED = (0.7, 0.8, 0.9, 0.95)
WORD = re.compile(r"\w+")
DEFAULT = route_data.DEFAULT.parent / "cache" / "paraphrase_pairs.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--delta", type=float, default=0.05)
    options = parser.parse_args()
    if not options.data.is_file():
        sys.exit(f"there is no {options.data}: --data names the pairs")
    found = json.loads(options.data.read_text(encoding="utf-8"))
    pairs, right, kinds, half = rows(found, options.encoder)
    texts = sorted({t for pair in pairs for t in pair})
    vectors = dict(
        zip(texts, route_data.embeddings(options.data, "cache", texts, options.encoder), strict=True)
    )
    likeness = pairs_likeness(*(np.array([vectors[p[i]] for p in pairs]) for i in (0, 1)))
    guards = passed_guards(pairs)
    shown: dict[str, Any] = {
        "pairs": len(found),
        "candidates": {k: int((kinds == k).sum()) for k in sorted(set(kinds))},
        "budget": options.budget,
    }
    shown["pass the guards"] = {k: round(float(guards[kinds == k].mean()), 4) for k in sorted(set(kinds))}
    for name, passed in (
        ("embedding and guards", guards),
        ("rival: embedding alone", np.ones(len(pairs), bool)),
    ):
        shown[name] = both_ways(likeness, right, passed, half, options.budget, options.delta)
        shown[name]["hits at a fixed threshold"] = {
            str(t): {k: int((passed & (likeness >= t) & (kinds == k)).sum()) for k in sorted(set(kinds))}
            for t in FIXED
        }
    print(json.dumps(shown, indent=1))


def rows(
    found: list[dict[str, str]], encoder: Path
) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, np.ndarray]:
    """(candidate pairs, whether right, kind, half) of all candidates."""
    pairs, right, kinds, half = [], [], [], []
    origins = [f["origin"] for f in found]
    vectors = route_data.embeddings(encoder, "cache-origins", origins, encoder)
    halves = np.array([int(sha256(o.encode()).hexdigest(), 16) % 2 for o in origins])
    near = vectors @ vectors.T
    near[np.array(origins)[:, None] == np.array(origins)[None]] = -1
    near[halves[:, None] != halves[None]] = -1  # a sentence stays in one half
    plain = np.array([" ".join(WORD.findall(o.casefold())) for o in origins])
    near[
        plain[:, None] == plain[None]
    ] = -1  # the pairs hold some sentences twice, with other capitals or quotation marks
    for i, f in enumerate(found):
        chance = random.Random(f["origin"])
        made = [("paraphrase", f["similar"], True), ("foreign", origins[int(near[i].argmax())], False)]
        for kind in KINDS:
            for source in (f["similar"], f["origin"]):
                if changed := negative(source, kind, chance):
                    made.append((kind, changed, False))
        for kind, other, good in made:
            pairs.append((f["origin"], other))
            right.append(good)
            kinds.append(kind)
            half.append(halves[i])
    return pairs, np.array(right), np.array(kinds), np.array(half)


def both_ways(
    likeness: np.ndarray,
    right: np.ndarray,
    passed: np.ndarray,
    half: np.ndarray,
    budget: float,
    delta: float,
) -> dict[str, Any]:
    """Calibrated on one half and tested on the other, both ways, the hits added up."""
    hits, wrong, true_hits, thresholds, missed = 0, 0, 0, [], []
    for own in (0, 1):
        at, test = half == own, half != own
        try:
            threshold = calibrate(likeness[at], right[at], passed[at], budget, delta).threshold
        except Inconclusive as error:
            missed.append(error.message)
            # Too few pairs for the budget at this confidence: the strictest rule of the same sequence, which is told.
            threshold = _plain(likeness[at], right[at], passed[at], budget)
        thresholds.append(round(threshold, 4))
        hit = test & passed & (likeness >= threshold)
        hits, wrong, true_hits = (
            hits + int(hit.sum()),
            wrong + int((hit & ~right).sum()),
            true_hits + int((hit & right).sum()),
        )
    return {
        "thresholds": thresholds, "hits": hits, "wrong": wrong, "wrong_share_bound_95": round(bound_of(wrong, hits), 4),
        "true_pairs_hit": round(true_hits / int(right.sum()), 4), "calibration": missed or "held",
    }  # fmt: skip


def _plain(likeness: np.ndarray, right: np.ndarray, passed: np.ndarray, budget: float) -> float:
    """The lowest threshold whose plain share of wrong hits is within a half of the budget."""
    order = np.argsort(-likeness[passed], kind="stable")
    good = right[passed][order]
    share = np.cumsum(~good) / np.arange(1, len(good) + 1)
    fits = np.flatnonzero(share <= budget / 2)
    return float(likeness[passed][order][fits[-1]]) if len(fits) else 2.0


if __name__ == "__main__":
    main()
