"""One stream without a pause: what a box that gets hot still gives at the end (ten minutes, by metrics.md)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from edgeft.bench import speed
from edgeft.bench.pool import Running
from edgeft.bench.speed import Point
from edgeft.bench.watch import Watch
from edgeft.errors import EnvironmentFault
from edgeft.rows import Row

POINT = Point(128, 64)
PARTS = 6


def run(running: Running, rows: list[Row], seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Median decode rate in the first and the last sixth, every request's rate with its time, and what was seen."""
    plan = speed.warm_up(running.ask, rows, (POINT,))
    watch = Watch(running.local.pid if running.local else None)
    begun = time.monotonic()
    asked: list[tuple[float, float | None]] = []
    while not asked or time.monotonic() - begun < seconds:
        reply = running.ask(speed.body_of(rows, len(asked), plan["chars"][0], plan["output_tokens"][0]))
        asked.append((round(time.monotonic() - begun, 3), reply.decode_tok_per_s))
        say(f"{asked[-1][0]:.0f} of {seconds:.0f} s")
    rated = [(at, rate) for at, rate in asked if rate]
    if not rated:
        raise EnvironmentFault("no answer had two pieces of text, so there is no rate.", "--sustained 0")
    spent = asked[-1][0]
    first = [rate for at, rate in rated if at <= spent / PARTS] or [rated[0][1]]
    last = [rate for at, rate in rated if at > spent * (PARTS - 1) / PARTS] or [rated[-1][1]]
    return {
        "seconds": spent,
        "first_tok_per_s": statistics.median(first),
        "last_tok_per_s": statistics.median(last),
        "requests": [{"at_s": at, "decode_tok_per_s": rate} for at, rate in rated],
        "flags": "; ".join(flag["detail"] for flag in watch.flags()),
    }
