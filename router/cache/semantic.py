"""Answers to questions that mean the same: off by default, within a partition, behind guards, on an error budget.

A partition is the hash of everything but the last user turn (tenant, model and its hashes, system prompt, history, tools, sampling …), so
only the last turn is compared. The threshold is calibrated so that at confidence 1 - delta at most a share `budget` of hits is wrong;
a sample of hits is asked again, and when the audit shows the budget overspent the cache switches itself off.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeft.errors import Inconclusive
from edgeft.router.cache.exact import key_of
from edgeft.router.cache.guards import differs
from edgeft.router.certificate import upper_bound

MOST_ENTRIES = 10_000  # of all partitions together


@dataclass(frozen=True)
class Calibrated:
    """What calibration found: `threshold` on the cosine, and the rows it comes from."""

    threshold: float
    budget: float
    delta: float
    hits: int
    wrong: int
    bound: float
    share_of_pairs_hit: float


def calibrate(
    likeness: np.ndarray, right: np.ndarray, passed: np.ndarray, budget: float = 0.01, delta: float = 0.05
) -> Calibrated:
    """The lowest threshold whose hits (likeness >= threshold, all guards passed) are wrong in at most `budget`, by Clopper-Pearson's upper
    bound at 1 - delta, testing from strict to lax and ending at the first that fails. float [n], bool [n], bool [n].

    Raises Inconclusive where no threshold of these pairs holds.
    """
    order = np.argsort(-likeness[passed], kind="stable")
    ranked, wrong = likeness[passed][order], np.cumsum(~right[passed][order])
    least = next(n for n in range(1, 100_000) if upper_bound(0, n, delta) <= budget) if budget > 0 else 10**9
    best = None
    # Every 25th rule from the first that could hold: a fixed sequence of few tests, known before the labels.
    for hits in range(least, len(ranked) + 1, 25):
        if upper_bound(int(wrong[hits - 1]), hits, delta) > budget:
            break
        best = hits
    if best is None:
        raise Inconclusive(
            f"no threshold keeps wrong hits within {budget:g} on {len(ranked)} pairs that pass the guards; "
            f"{least} right hits without a wrong one are the least.",
            "calibrate on more pairs, or leave the semantic cache off",
        )
    held = int(wrong[best - 1])
    true_hits = int((right[passed][order][:best]).sum())
    return Calibrated(
        float(ranked[best - 1]),
        budget,
        delta,
        best,
        held,
        upper_bound(held, best, delta),
        true_hits / max(1, int(right.sum())),
    )


@dataclass
class Audit:
    """Hits that were asked again. Off at the first look at which, with confidence 1 - delta over all looks together, more than the
    budget is wrong; the k-th look spends delta / (k (k + 1))."""

    budget: float
    delta: float = 0.05
    looked: int = 0
    wrong: int = 0
    off: bool = False

    def saw(self, was_right: bool) -> bool:
        """Count one audited hit; True while the cache may go on."""
        self.looked += 1
        self.wrong += not was_right
        spend = self.delta / (self.looked * (self.looked + 1))
        if self.wrong and lower_bound(self.wrong, self.looked, spend) > self.budget:
            self.off = True
        return not self.off


def lower_bound(wrong: int, n: int, delta: float) -> float:
    """Clopper-Pearson's one-sided lower bound: 1 - the upper bound of the complement."""
    return 1.0 - upper_bound(n - wrong, n, delta)


def partition_of(request: Mapping[str, Any], model: str, **hashes: Any) -> tuple[str, str] | None:
    """(partition, last user turn), or None where the last message is no plain text of a user."""
    messages = request.get("messages") or []
    last = messages[-1] if messages else {}
    if last.get("role") != "user" or not isinstance(last.get("content"), str) or not last["content"].strip():
        return None
    rest = {**request, "messages": [*messages[:-1], {k: v for k, v in last.items() if k != "content"}]}
    return key_of(rest, model, **hashes), last["content"]


@dataclass
class SemanticCache:
    """Keys of the exact cache by meaning. Holds the texts of questions in memory alone, never on disk. Safe to use from several threads."""

    encoder: Any  # text -> float32 [E] of length 1
    threshold: float
    audit: Audit
    partitions: dict[str, OrderedDict[str, tuple[str, np.ndarray]]] = field(default_factory=dict)
    age: OrderedDict[tuple[str, str], None] = field(
        default_factory=OrderedDict
    )  # (partition, key), oldest first
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, partition: str, text: str) -> tuple[str, float] | None:
        """(key of the exact cache, cosine) of the most similar question that passes every guard, or None."""
        with self.lock:
            entries = list(self.partitions.get(partition, {}).items())
        if self.audit.off or not entries:
            return None
        likeness = np.array([vector for _, (_, vector) in entries]) @ self.encoder(text)
        for place in np.argsort(-likeness):
            key, (question, _) = entries[place]
            if likeness[place] < self.threshold:
                return None
            if differs(question, text) is None:
                return key, float(likeness[place])
        return None

    def add(self, partition: str, text: str, key: str) -> None:
        """Remember a question whose answer stands in the exact cache under `key`; the oldest of all goes where there are too many."""
        vector = self.encoder(text)
        with self.lock:
            self.partitions.setdefault(partition, OrderedDict())[key] = (text, vector)
            self.age[(partition, key)] = None
            self.age.move_to_end((partition, key))
            while len(self.age) > MOST_ENTRIES:
                (old, oldest), _ = self.age.popitem(last=False)
                entries = self.partitions[old]
                entries.pop(oldest, None)
                if not entries:
                    del self.partitions[old]


def bound_of(wrong: int, hits: int, delta: float = 0.05) -> float:
    """The one-sided upper bound of the share of wrong hits."""
    return upper_bound(wrong, hits, delta) if hits else 1.0


def pairs_likeness(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosines of rows of two matrices of unit vectors."""
    return (one * two).sum(1)


def passed_guards(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """bool [n]: which pairs pass every guard."""
    return np.array([differs(a, b) is None for a, b in pairs])
