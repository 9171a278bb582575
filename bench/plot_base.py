"""What the plots of a report share: a picture with its caption, names, ticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.bench.report import spoiled
from edgeft.types import BenchReport

NAME_CHARS = 24  # of a name beside a point


@dataclass(frozen=True)
class Plot:
    """A picture (SVG; None where there was nothing to draw) and what must be said of it."""

    title: str
    svg: str | None
    caption: str


def label(r: dict[str, Any]) -> str:
    """A model's name as the table has it: with a star where its rounds were disturbed."""
    return str(r["id"]) + ("*" if spoiled(r) else "")


def left_out(report: BenchReport, drawn: list[dict[str, Any]]) -> str:
    """A sentence naming the models for which a plot has nothing."""
    seen = {r["id"] for r in drawn}
    names = [r["id"] for r in report.results if r["id"] not in seen]
    return f" Not measured, so not drawn: {', '.join(names)}." if names else ""


def few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def three(number: float) -> str:
    """A number with three digits that count, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
