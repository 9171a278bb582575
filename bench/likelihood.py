"""Log-probabilities of given continuations, from an engine's logits of whole sequences.

A sequence is run once, however many continuations stand on it: the last token of a continuation is never fed, and what is
the beginning of another sequence is read off that one. Four choices of one token each cost one run of their prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Ids = list[int]
Where = list[list[tuple[int, int]]]  # for each run the (item, continuation) that it answers


def plan(items: list[dict[str, Any]]) -> tuple[list[Ids], Where]:
    """The fewest sequences that answer all items, and what each answers.

    An item: `prompt` (at least one token id) and `continuations` (a list of token ids each).
    """
    asked = sorted(
        (tuple(item["prompt"]) + tuple(ids[:-1]), number, index)
        for number, item in enumerate(items)
        for index, ids in enumerate(item["continuations"])
    )
    runs: list[Ids] = []
    where: Where = []
    last: tuple[int, ...] = ()
    # What begins with a sequence stands right behind it when sorted, so from the end the longest comes first.
    for sequence, number, index in reversed(asked):
        if not runs or last[: len(sequence)] != sequence:
            runs.append(list(sequence))
            where.append([])
            last = sequence
        where[-1].append((number, index))
    return runs[::-1], where[::-1]


def of_continuation(logits: Any, start: int, ids: Ids) -> dict[str, Any]:
    """`logprob` (nats, the sum over `ids`) and `greedy` (is each the likeliest token where it stands?).

    `logits` holds raw scores [positions, vocabulary]; `ids` stand behind the first `start` positions.
    """
    from edgeft.bench.fidelity import log_softmax

    if not ids:
        return {"logprob": 0.0, "greedy": True}
    values = log_softmax(np.asarray(logits[start - 1 : start - 1 + len(ids)], dtype=np.float64))
    return {
        "logprob": float(values[np.arange(len(ids)), ids].sum()),
        "greedy": bool((values.argmax(1) == np.asarray(ids)).all()),
    }


def score(engine: str, folder: str, items: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Every item's continuations by an artefact's logits, and how many sequences were run. Runs in a child process."""
    from edgeft.engines import engine as module_of

    module = module_of(engine)
    runs, where = plan(items)
    found: list[list[Any]] = [[None] * len(item["continuations"]) for item in items]
    # Sorted, so that what begins alike follows one another: an engine that knows `reuse` computes it once.
    options = {"threads": threads, "context": 1 << 12, "reuse": True}
    logits = module.logits(Path(folder), runs, options) if runs else []
    for done, (values, answers) in enumerate(zip(logits, where, strict=True), 1):
        for number, index in answers:
            item = items[number]
            found[number][index] = of_continuation(values, len(item["prompt"]), item["continuations"][index])
        print(f"progress: logits {done}/{len(runs)} sequences")
    return {"items": found, "runs": len(runs), "build": module.logits_build()}


def split(whole: Ids, prompt: Ids, alone: Ids) -> Ids:
    """The continuation's ids: what `whole` has behind `prompt`, or `alone` where the two texts grew together into a token."""
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone


def windows(ids: Ids, prefix: int, longest: int) -> list[tuple[Ids, Ids]]:
    """(prompt, continuation) pairs that predict each token once, `longest` tokens together at most.

    The first stands on `prefix` alone; a later one takes as much of what was before as fits, as lm-eval's rolling
    windows with a context of one token do (`get_rolling_token_windows`, `make_disjoint_window`).
    """
    pairs = [([prefix], ids[:longest])] if ids else []
    for begin in range(longest, len(ids), longest):
        end = min(begin + longest, len(ids))
        pairs.append((ids[end - longest - 1 : begin], ids[begin:end]))
    return pairs
