"""What the blocks of a bench come to: percentiles with their samples, and whether the medians are known well enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.bench.journal import Journal
from edgeft.bench.processes import FEWEST_PROCESSES
from edgeft.bench.stats import summary
from edgeft.bench.targets import Target

WITHIN = 0.05  # half the width of the 95 % interval of the median, as a share of the median
MAX_ROUNDS = 50


@dataclass(frozen=True)
class Point:
    """A shape of request: `prompt_tokens` in (about: the engine's own count is kept), `output_tokens` out (forced)."""

    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens}x{self.output_tokens}"


def figures(blocks: list[dict[str, Any]], points: tuple[Point, ...]) -> list[dict[str, Any]]:
    """For each point the summaries over all blocks."""
    rounds, processes = ([b[key] for b in blocks] for key in ("round", "process"))
    return [
        point_figures(point, [b["requests"][i] for b in blocks], rounds, processes)
        for i, point in enumerate(points)
    ]


def point_figures(
    point: Point,
    requests: list[dict[str, Any]],
    rounds: list[int] | None = None,
    processes: list[int] | None = None,
) -> dict[str, Any]:
    """Summaries of the requests of one shape; `round` and `process` say which ones each sample is of (a round each, one process)."""
    rounds, processes = rounds or list(range(len(requests))), processes or [0] * len(requests)
    timed = [(r, p) for r, p in zip(requests, processes, strict=True) if r["decode_tok_per_s"]]
    decode, timed_by = [r["decode_tok_per_s"] for r, _ in timed], [p for _, p in timed]
    counted = [(r, p) for r, p in zip(requests, processes, strict=True) if r["prompt_tokens"]]
    prefill, counted_by = [r["prompt_tokens"] / r["ttft_s"] for r, _ in counted], [p for _, p in counted]
    gaps = [gap for r in requests for gap in r["itl_s"]]
    return {
        "asked": {"prompt_tokens": point.prompt_tokens, "output_tokens": point.output_tokens},
        "prompt_tokens": [r["prompt_tokens"] for r in requests],
        "output_tokens": [r["output_tokens"] for r in requests],
        "ttft_s": summary([r["ttft_s"] for r in requests], processes),
        "prefill_tok_per_s": summary(prefill, counted_by) if prefill else None,
        "decode_tok_per_s": summary(decode, timed_by) if decode else None,
        "tpot_s": summary([1 / d for d in decode], timed_by) if decode else None,
        "itl_s": spread_of(gaps) if gaps else None,
        "round": rounds,
        "process": processes,
    }


def spread_of(gaps: list[float]) -> dict[str, Any]:
    """Percentiles of the gaps between pieces of text, the samples kept; they hang together, so no interval is given."""
    return {
        **{f"p{q}": float(np.percentile(gaps, q)) for q in (50, 90, 95, 99)},
        "n": len(gaps),
        "samples": gaps,
    }


def settled(found: list[dict[str, Any]]) -> bool:
    """Are the intervals of all medians (TTFT and decode rate, every shape) within WITHIN?"""
    return all(half_width(s) <= WITHIN for s in _medians(found))


def half_width(found: dict[str, Any]) -> float:
    """Half the interval of the median over the median; no interval of fewer than five samples is believed."""
    low, high = found["p50_ci95"]
    return (high - low) / 2 / found["p50"] if found["p50"] and found["n"] >= 5 else float("inf")


def _medians(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for point in found:
        for name in ("ttft_s", "decode_tok_per_s"):
            if point[name]:
                yield point[name]


def result(
    journal: Journal, target: Target, points: tuple[Point, ...], seconds: float
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """(the `speed` entry of a report, what disturbed it). The first point's figures stand at the top as well."""
    blocks = journal.all(target.id, "block")
    if not blocks:
        return None, []
    plan = journal.all(target.id, "warm-up")[0]
    found = figures(blocks, points)
    widest = max((half_width(s) for s in _medians(found)), default=float("inf"))
    is_settled = widest <= WITHIN
    shortened = [o for o, p in zip(plan["output_tokens"], points, strict=True) if o < p.output_tokens]
    flags = [{**flag, "round": b["round"]} for b in blocks for flag in b["flags"]]
    processes = len({b["process"] for b in blocks})
    several = f" and {processes} processes" if processes >= FEWEST_PROCESSES else ""
    return {
        **{k: v for k, v in found[0].items() if k not in ("asked", "round", "process")},
        "points": found,
        "rounds": len(blocks),
        "processes": processes,
        "first_request_s": plan["first_request_s"],
        "settled": is_settled,
        "widest_interval": widest if widest != float("inf") else None,
        "why": f"all medians within {100 * WITHIN:.0f} %"
        if is_settled
        else f"{MAX_ROUNDS} rounds were over"
        if len(blocks) >= MAX_ROUNDS
        else f"{seconds:.0f} s{several} a model were up",
        "shortened_to_tokens": min(shortened) if shortened else None,
        "side": "client",
    }, flags


def process_notes(timed: list[dict[str, Any]]) -> list[str]:
    """How many processes of each model were timed, and whether the intervals are over them."""
    counts = sorted({r["speed"]["processes"] for r in timed if r["speed"].get("processes")})
    if not counts or counts == [1]:
        return []
    asked = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [
        f"Each model was timed in {asked} processes, one after another, since a process keeps its noise for its life: "
        f"from {FEWEST_PROCESSES} on the intervals of medians are over processes, then rounds (hierarchical bootstrap, Student's t); "
        "of fewer, over the samples alone, and the next process may lie outside."
    ]
