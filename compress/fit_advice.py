"""What to ask for instead where no candidate of `--fit` holds all that was wanted."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgeft.compress import gate_limits
from edgeft.compress.fit_choice import Wanted, broken

Rows = Sequence[dict[str, Any]]
STEP_BYTES = 100_000  # sizes are named to 0.1 MB, rounded up


def nothing_holds(rows: Rows, wanted: Wanted, frontier: Rows, limits: gate_limits.Limits) -> tuple[str, str]:
    """The two lines where every candidate was rejected or breaks something.

    `frontier`: points of rising size, as `fit_report.frontier` makes them.
    """
    if not rows:
        size = _within_the_gate(wanted, frontier, limits)
        larger = f"; by the estimate {_fit(size)} is within the gate's KLD" if size else ""
        return "every candidate was rejected by the gate.", f"less …/.rejected/*/reasons.json{larger}"
    why = "; ".join(f"{row['id']}: {', '.join(broken(row, wanted))}" for row in rows)
    would = _relaxed(rows, wanted)
    if size := estimated_size(rows, wanted, frontier):
        would.insert(0, f"{_fit(size)} (by the estimate)")
    if wanted.min_retention is not None and all(row["retention"] is None for row in rows):
        would.insert(0, "--eval rows on which the merged model is surely better than its base")
    if all(row["kld_nats"] is None for row in rows):
        would = ["--eval with shorter rows: none could be compared"]
    return f"nothing holds all that is wanted ({why}).", " or ".join(
        would
    ) or "a smaller base, or less wanted at once"


def estimated_size(rows: Rows, wanted: Wanted, frontier: Rows) -> int | None:
    """The smallest size of the frontier, in bytes, at which all should hold; the largest where speed alone is amiss.

    An estimate: flipped answers, and with them what retention loses, are taken to go with the size of the change in the
    logits, that is with the root of KL; tok/s is taken to go with 1 / bytes, as where memory decides. Both start from
    what the GGUF candidates were measured at. None where nothing of it was measured or no size does.
    """
    unbounded = replace(wanted, size_bytes=sys.maxsize)
    measured = [row for row in rows if row["id"].startswith("gguf") and row["kld_nats"] is not None]
    if not measured or any(not broken(row, unbounded) for row in measured):
        return None
    most_bytes, most_kl = math.inf, math.inf
    if wanted.min_tok_per_s:
        most_bytes = max(row["tok_per_s"] * row["size_bytes"] for row in measured) / wanted.min_tok_per_s
    if wanted.min_retention is not None:
        kept = [row for row in measured if row["retention"] is not None]
        if not kept or not frontier:
            return None
        best = max(kept, key=lambda row: row["retention"])
        most_kl = _kl_at(frontier, best["size_bytes"])
        if best["retention"] < 1:
            most_kl *= ((1 - wanted.min_retention) / (1 - best["retention"])) ** 2
    holding = [
        size
        for point in frontier
        if point["estimated_kl_nats"] <= most_kl and (size := _up(point["size_bytes"])) <= most_bytes
    ]
    if not holding:
        return None
    return holding[-1] if wanted.min_retention is None else holding[0]


def _kl_at(frontier: Rows, size_bytes: int) -> float:
    """The estimate of the largest point that a size holds."""
    held = [p for p in frontier if p["size_bytes"] <= size_bytes] or frontier[:1]
    return float(held[-1]["estimated_kl_nats"])


def _within_the_gate(wanted: Wanted, frontier: Rows, limits: gate_limits.Limits) -> int | None:
    """The smallest larger size whose estimated KL is within the gate's limit for its bits."""
    for point in frontier:
        limit = gate_limits.of_width(limits, int(point["bits_per_weight"]))["kld"]
        if point["size_bytes"] > wanted.size_bytes and (limit is None or point["estimated_kl_nats"] <= limit):
            return _up(point["size_bytes"])
    return None


def _relaxed(rows: Rows, wanted: Wanted) -> list[str]:
    """What was measured to hold when one thing less is wanted; where none does alone, two."""

    def held(**less: Any) -> list[dict[str, Any]]:
        return [row for row in rows if not broken(row, replace(wanted, **less))]

    would = []
    if wanted.min_retention is not None and (left := held(min_retention=None)):
        kept = [row["retention"] for row in left if row["retention"] is not None]
        would.append(_retention(max(kept)) if kept else "leave out --min-retention")
    if wanted.min_tok_per_s is not None and (left := held(min_tok_per_s=None)):
        would.append(f"{_speed(max(row['tok_per_s'] for row in left))}, or a faster box")
    if left := held(size_bytes=sys.maxsize):
        would.append(_fit(_up(min(row["size_bytes"] for row in left))))
    if not would and (left := held(min_retention=None, min_tok_per_s=None)):
        best = max(left, key=lambda row: (row["retention"] or 0.0, row["tok_per_s"]))
        less = _retention(best["retention"]) if best["retention"] is not None else "leave out --min-retention"
        would.append(f"{less} with {_speed(best['tok_per_s'])}")
    return would


def _up(size_bytes: int) -> int:
    return -(-size_bytes // STEP_BYTES) * STEP_BYTES


def _fit(size_bytes: int) -> str:
    return f"--fit {size_bytes / 1e6:.1f}MB"


def _retention(value: float) -> str:
    """Rounded down: what is named holds."""
    return f"--min-retention {math.floor(value * 1000) / 1000:.3f}"


def _speed(value: float) -> str:
    return f"--min-tps {math.floor(value * 10) / 10:.1f}"
