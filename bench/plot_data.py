"""What the plots of a report show, as plain numbers: no drawing here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.types import BenchReport

DOTS = 300  # of one model and panel at most


@dataclass(frozen=True)
class Value:
    """A figure and its 95 % interval; without one, low and high are the figure."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A model against the one that all are held against, in points."""

    id: str
    points: float
    low: float
    high: float
    smallest_shown: float | None  # None where so few rows could not show any
    p_holm: float
    n: int


def value(middle: float, interval: Sequence[float] | None, scale: float = 1.0) -> Value:
    """A figure with its interval in another unit; a negative scale turns the interval round."""
    low, high = sorted(scale * bound for bound in interval or (middle, middle))
    return Value(scale * middle, low, high)


def right_percent(r: dict[str, Any]) -> Value | None:
    """Share of the answers that are exactly right, in percent."""
    found = r.get("accuracy") or {}
    return value(found["share"], found.get("ci95"), 100) if found.get("n") else None


def same_top1_percent(r: dict[str, Any]) -> Value | None:
    """Share of the positions with the reference's likeliest token, in percent."""
    found = (r.get("fidelity") or {}).get("all") or {}
    known = found.get("same_top1") is not None
    return value(found["same_top1"], found.get("same_top1_ci95"), 100) if known else None


def minus_kld(r: dict[str, Any]) -> Value | None:
    """KLD to the reference in nats with its sign turned, so that higher is better."""
    found = (r.get("fidelity") or {}).get("all") or {}
    return value(found["kld_mean"], found.get("kld_ci95"), -1) if found.get("kld_mean") is not None else None


def decode_rate(r: dict[str, Any]) -> Value | None:
    """Median decode tok/s of one stream."""
    found = (r.get("speed") or {}).get("decode_tok_per_s")
    return value(found["p50"], found.get("p50_ci95")) if found else None


def size_mb(r: dict[str, Any]) -> Value | None:
    """Size of the files in MB."""
    return value(r["size_bytes"], None, 1e-6) if r.get("size_bytes") else None


Measure = tuple[str, Callable[[dict[str, Any]], Value | None]]
RIGHT: Measure = ("answers exactly right (%)", right_percent)
QUALITY: tuple[Measure, ...] = (
    RIGHT,
    ("same top-1 token as the reference (%)", same_top1_percent),
    ("-KLD to the reference (nats)", minus_kld),
)
DECODE: Measure = ("decode (tok/s)", decode_rate)
SIZE: Measure = ("size (MB)", size_mb)


def first_known(measures: Sequence[Measure], results: list[dict[str, Any]]) -> Measure | None:
    """The first measure that any of the results has."""
    return next((m for m in measures if any(m[1](r) for r in results)), None)


def front(points: Sequence[tuple[float, float]], less_is_better: bool = False) -> list[int]:
    """The points that no other beats, by x: none is as good on both axes and better on one.

    More is better on y, and on x unless `less_is_better`. Equal points are on the front together.
    """
    sign = -1 if less_is_better else 1
    ranked = [(sign * x, y) for x, y in points]
    kept = [
        i
        for i, (x, y) in enumerate(ranked)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in ranked)
    ]
    return sorted(kept, key=lambda i: (points[i], i))


def staircase(
    corners: Sequence[tuple[float, float]], bottom: float, edge: float, less_is_better: bool = False
) -> list[tuple[float, float]]:
    """The line round all that the front beats: from the axis `edge` over the corners down to `bottom`."""
    best_x_last = sorted(corners, reverse=less_is_better)
    line = [(edge, best_x_last[0][1])]
    for x, y in best_x_last:
        line += [(line[-1][0], y), (x, y)]
    return [*line, (line[-1][0], bottom)]


def thinned(samples: Sequence[float], most: int = DOTS) -> list[float]:
    """At most `most` samples: evenly spaced in rank, the smallest and the largest among them."""
    ordered = sorted(samples)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


def points_of(r: dict[str, Any]) -> list[dict[str, Any]]:
    """The shapes of request that were timed; an older report has one, which stands at the top of its `speed`."""
    speed = r.get("speed") or {}
    return speed.get("points") or ([speed] if speed else [])


def shapes(results: list[dict[str, Any]]) -> list[dict[str, int] | None]:
    """The first and the longest shape of request that were timed; [None] where an older report does not say."""
    asked = [p.get("asked") for r in results for p in points_of(r) if p.get("ttft_s")]
    if not asked or asked[0] is None:
        return asked[:1]
    longest = max((a for a in asked if a), key=lambda a: a["prompt_tokens"])
    return [asked[0]] if longest["prompt_tokens"] <= asked[0]["prompt_tokens"] else [asked[0], longest]


def point_at(r: dict[str, Any], shape: dict[str, int] | None) -> dict[str, Any] | None:
    """A result's figures for one shape of request."""
    return next((p for p in points_of(r) if p.get("asked") == shape and p.get("ttft_s")), None)


def differences(report: BenchReport) -> tuple[str | None, list[Difference]]:
    """(what all are held against, each other model's difference from it): the reference, else the first model."""
    ids = [r["id"] for r in report.results]
    paired = {name for p in report.pairs for name in (p["a"], p["b"])}
    base = next((i for i in [report.reference, *ids] if i in paired), None)
    found = []
    for p in report.pairs:
        if base in (p["a"], p["b"]):
            sign = 1 if p["a"] == base else -1  # an entry is b - a
            v = value(p["points"], p["points_ci95"], sign)
            other = p["b"] if p["a"] == base else p["a"]
            found.append(
                Difference(other, v.middle, v.low, v.high, p["smallest_shown_points"], p["p_holm"], p["n"])
            )
    return base, sorted(found, key=lambda d: ids.index(d.id) if d.id in ids else len(ids))
