"""The figures that go in: a value, its range, and what it rests on. And the formulas' way to them, which remembers what was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeft.tco.cells import ASSUMED

Z90 = 1.2815515655446004  # the standard normal's 90th percentile
Z975 = 1.959963984540054


@dataclass(frozen=True)
class Figure:
    """One number that goes into the table.

    `range` is P10 and P90. None as a value is: nobody said, and `text` says what is missing.
    """

    id: str  # 'requests_per_month', or 'column.price_usd' where it is a column's own
    value: float | None
    range: tuple[float, float] | None = None
    tag: str = ASSUMED
    text: str = ""  # the run, the source with its date, or why it is assumed to be so
    bounds: tuple[float, float] = (0.0, float("inf"))

    def draw(self, count: int, seed: int) -> Any:
        """`count` draws: a normal of two halves with the value as its median and `range` as P10 and P90, cut at the bounds.

        The stream depends on the seed and the figure's id alone, so that a figure more moves no other's draws.
        """
        if self.value is None or self.range is None:
            return self.value
        words = np.frombuffer(self.id.encode().ljust(-(-len(self.id.encode()) // 4) * 4, b"\0"), np.uint32)
        normal = np.random.default_rng([seed, *words.tolist()]).standard_normal(count)
        low, high = self.range
        spread = np.where(normal < 0, self.value - low, high - self.value) / Z90
        return np.clip(self.value + normal * spread, *self.bounds)

    @property
    def shown(self) -> str:
        """The value, with its range where it has one."""
        if self.value is None:
            return "not known"
        ends = f" ({plain(self.range[0])} to {plain(self.range[1])})" if self.range else ""
        return plain(self.value) + ends


def plain(value: float) -> str:
    """A number without an exponent, four digits where it is small."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def from_ci95(value: float, ends: Any) -> tuple[float, float] | None:
    """P10 and P90 of a figure whose 95 % interval is known, each side as a normal's."""
    if not ends:
        return None
    low, high = ends
    return value - (value - low) * Z90 / Z975, value + (high - value) * Z90 / Z975


class MissingFigure(Exception):
    """A formula needed a figure that nobody gave."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(figure.text)
        self.figure = figure


@dataclass
class Values:
    """What a formula sees of a column: numbers by name. Remembers the ids that were read."""

    figures: Mapping[str, Figure]  # by name
    numbers: Mapping[str, Any]  # by id; a number, or an array of draws
    parts: Mapping[str, Values] = field(default_factory=dict)  # what a routed column is made of
    given: Mapping[str, Any] = field(default_factory=dict)  # by name, instead of a figure
    used: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        found = self.get(name)
        if found is None:
            raise MissingFigure(self.figures[name])
        return found

    def get(self, name: str) -> Any:
        """The number, or None where nobody gave it."""
        if name in self.given:
            return self.given[name]
        figure = self.figures[name]
        self.used.add(figure.id)
        return self.numbers[figure.id]

    def but(self, **given: Any) -> Values:
        """The same with some numbers given; what it reads counts as read here."""
        return replace(self, given={**self.given, **given})

    def part(self, name: str, **given: Any) -> Values:
        """The values of a part, some given; what it reads counts as read here."""
        return replace(self.parts[name], given={**self.parts[name].given, **given}, used=self.used)


def central(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """Every figure's value, by id."""
    return {f.id: f.value for f in figures.values()}


def weakest(figures: list[Figure]) -> tuple[str, ...]:
    """The tags of figures, each once, the strongest first."""
    from edgeft.tco.cells import STRENGTH

    found = {f.tag for f in figures} or {ASSUMED}
    return tuple(word for word in STRENGTH if word in found)
