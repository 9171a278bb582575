"""A comparison in words: a table row and a sentence a figure."""

from __future__ import annotations

from typing import Any

from edgeft.bench.processes import FEWEST_PROCESSES

COLUMNS = ("figure", "A", "B", "B against A", "95 %", "p (Holm)", "verdict")


def table_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """A row a figure for `COLUMNS`."""
    return [
        [
            f["figure"],
            _value(f, f["a"]),
            _value(f, f["b"]),
            _change(f),
            _interval(f),
            "–" if f.get("p_holm") is None else f"{f['p_holm']:.2g}",
            f["verdict"],
        ]
        for f in comparison["figures"]
    ]


def sentences(comparison: dict[str, Any]) -> list[str]:
    """One sentence a figure, then what else differs."""
    return [sentence(f) for f in comparison["figures"]] + [f"note: {line}" for line in comparison["notes"]]


def sentence(f: dict[str, Any]) -> str:
    """What can be said of one figure."""
    where = f" at {f['at']}" if f.get("at") else ""
    if f["a"] is None:
        return f"{f['figure']}{where}: {f['verdict']} ({f['why']})."
    text = f"{f['figure']}{where}: B is {_change(f)} against A"
    if f.get("ci95"):
        text += f" (95 % {_interval(f)}{_over(f)})"
    text += f": {f['verdict']}"
    text += f", {f['why']}" if f.get("why") else ""
    if f["verdict"] == "not told apart" and f.get("could_show") is not None:
        unit = "points" if f["figure"] == "right %" else "%"
        size = f["could_show"] if unit == "points" else 100 * f["could_show"]
        text += f"; {size:.1f} {unit} would have been found in 80 of 100 such runs"
    return text + "."


def _over(f: dict[str, Any]) -> str:
    """Of how many processes an interval is, where it is of processes."""
    counts = f.get("processes") or [0]
    return f", {counts[0]} and {counts[1]} processes" if min(counts) >= FEWEST_PROCESSES else ""


def _value(f: dict[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    if f["figure"].endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _change(f: dict[str, Any]) -> str:
    if "ratio" in f:
        return f"{100 * (f['ratio'] - 1):+.1f} %"
    if "difference" in f:
        return f"{f['difference']:+.1f} points" if f["figure"] == "right %" else f"{f['difference']:+.4f}"
    return "–"


def _interval(f: dict[str, Any]) -> str:
    if not f.get("ci95"):
        return "–"
    low, high = f["ci95"]
    if "ratio" in f:
        return f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %"
    digits = 1 if f["figure"] == "right %" else 4
    return f"{low:+.{digits}f} to {high:+.{digits}f}"
