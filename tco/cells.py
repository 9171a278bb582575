"""A figure of the table together with what it rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MEASURED, LIST_PRICE, ASSUMED, NOT_KNOWN = "measured", "list price", "assumed", "not known"
# a figure is as strong as the weakest it is made of
STRENGTH = (MEASURED, LIST_PRICE, ASSUMED, NOT_KNOWN)


@dataclass(frozen=True)
class Cell:
    """`tag` is the weakest of `rests_on`; `value` is None where something is missing, as `text` says.

    `evidence` are the ids of the figures that it was computed from; `range` is P10 and P90 where draws gave one.
    """

    value: float | None
    text: str
    rests_on: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    range: tuple[float, float] | None = None

    @property
    def tag(self) -> str:
        return max(self.rests_on, key=STRENGTH.index)

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain JSON types; what is infinite becomes null, as the text says it in words."""
        value = {
            **asdict(self),
            "rests_on": list(self.rests_on),
            "evidence": list(self.evidence),
            "tag": self.tag,
        }
        value["value"] = _finite(self.value)
        value["range"] = [_finite(v) for v in self.range] if self.range else None
        return value


def _finite(value: float | None) -> float | None:
    return None if value is None or value in (float("inf"), float("-inf")) else float(value)


def not_known(why: str, evidence: tuple[str, ...] = ()) -> Cell:
    """A cell that says what is missing; never zero."""
    return Cell(None, f"not known: {why}", (NOT_KNOWN,), evidence)


def usd(value: float) -> str:
    """Dollars, with digits where the amount is small and none where it is large."""
    if value != 0 and abs(value) < 0.01:
        return f"${value:.6f}".rstrip("0")
    sign = "-" if value < 0 else ""
    return f"{sign}${abs(value):,.2f}" if abs(value) < 10_000 else f"{sign}${abs(value):,.0f}"
