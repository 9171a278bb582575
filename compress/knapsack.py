"""The types of tensors that lose least within a number of bytes: a knapsack with one choice a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

Choices = Mapping[str, Mapping[str, tuple[int, float]]]  # tensor -> type -> (bytes, loss)


def hull(choices: Mapping[str, tuple[int, float]]) -> list[tuple[str, int, float]]:
    """The types worth considering, from the smallest to the best: each more byte buys less than the one before.

    That is the lower convex hull of loss over bytes.
    """
    kept: list[tuple[str, int, float]] = []
    for name, (size, loss) in sorted(choices.items(), key=lambda c: (c[1][0], c[1][1])):
        if kept and loss >= kept[-1][2]:
            continue
        while len(kept) > 1 and _gain(kept[-2], (name, size, loss)) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append((name, size, loss))
    return kept


def _gain(a: tuple[str, int, float], b: tuple[str, int, float]) -> float:
    """Loss saved a byte by going from a to b."""
    return (a[2] - b[2]) / (b[1] - a[1])


def fill(choices: Choices, budget_bytes: int) -> dict[str, str] | None:
    """Tensor -> type: the least summed loss within `budget_bytes`, or None where the smallest types do not fit.

    Steps up the hulls in the order of loss saved a byte, which is the best there is for every budget at which a step
    ends; what is left then goes to the next steps that still fit.
    """
    hulls = {name: hull(types) for name, types in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget_bytes - sum(steps[0][1] for steps in hulls.values())
    if left < 0:
        return None
    steps = [
        (-_gain(before, after), name, place)
        for name, found in hulls.items()
        for place, (before, after) in enumerate(pairwise(found), 1)
    ]
    for _, name, place in sorted(steps):
        more = hulls[name][place][1] - hulls[name][at[name]][1]
        if at[name] == place - 1 and more <= left:
            at[name], left = place, left - more
    return {name: hulls[name][place][0] for name, place in at.items()}


def loss_of(choices: Choices, types: Mapping[str, str]) -> float:
    """The summed loss of a choice."""
    return sum(choices[name][kind][1] for name, kind in types.items())
