"""A figure of the table together with what it rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MEASURED, LIST_PRICE, ASSUMED, NOT_KNOWN = "measured", "list price", "assumed", "not known"
# a figure is as strong as the weakest it is made of
STRENGTH = (MEASURED, LIST_PRICE, ASSUMED, NOT_KNOWN)


@dataclass(frozen=True)
class Cell:
    """`tag` is the weakest of `rests_on`; `value` is None where something is missing, as `text` says."""

    value: float | None
    text: str
    rests_on: tuple[str, ...]
    note: str = ""
    run: str | None = None  # the run that measured parts were measured in

    @property
    def tag(self) -> str:
        return max(self.rests_on, key=STRENGTH.index)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rests_on": list(self.rests_on), "tag": self.tag}


def not_known(why: str) -> Cell:
    """A cell that says what is missing; never zero."""
    return Cell(None, f"not known: {why}", (NOT_KNOWN,))


def derived(value: float | None, text: str, parts: list[Cell], *more: str, note: str = "") -> Cell:
    """A cell computed from others: it rests on all that they rest on. Not known where one of them is not."""
    for part in parts:
        if part.tag == NOT_KNOWN:
            return part
    words = {word for part in parts for word in part.rests_on} | set(more)
    runs = [part.run for part in parts if part.run]
    return Cell(value, text, tuple(w for w in STRENGTH if w in words), note, runs[0] if runs else None)


def usd(value: float) -> str:
    """Dollars, with digits where the amount is small."""
    if value != 0 and abs(value) < 0.01:
        return f"${value:.6f}".rstrip("0")
    return f"${value:,.2f}"
