"""From a scenario to its table: every cell by a formula on the figures' values, tagged by what that formula read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeft.tco import cashflow, columns, formulas
from edgeft.tco.cells import NOT_KNOWN, Cell, not_known, usd
from edgeft.tco.columns import KINDS
from edgeft.tco.figures import Figure, MissingFigure, Values, weakest
from edgeft.tco.inputs import API, MACHINES, ROUTED
from edgeft.tco.scenario import Column, Scenario

ROWS = {
    "upfront_usd": "upfront",
    "fixed_usd": "fixed a month",
    "variable_usd": "variable a month",
    "total_usd": "total a month",
    "usd_per_mtok_in": "$ per 1M prompt tokens",
    "usd_per_mtok_out": "$ per 1M answer tokens",
    "usd_per_1k_requests": "$ per 1,000 requests",
    "usd_per_1k_solved": "$ per 1,000 solved",
    "wrong_usd": "wrong answers a month",
    "total_wrong_usd": "total with wrong answers",
    "npv_usd": "NPV of all payments",
    "break_even_month": "break-even month, P10/P50/P90",
    "break_even_requests": "break-even requests a month",
    "correct_share": "solved correctly (P10 to P90)",
    "quality_change": "points against the rival",
    "ttft_p95_s": "first token, p95",
    "kwh": "energy a month",
    "kgco2": "carbon a month",
    "units": "boxes",
    "capacity_used": "capacity used",
}
SPAN = 0.8  # P10 to P90


@dataclass
class World:
    """All figures of a scenario as numbers, central or drawn, and the columns' way to them."""

    scenario: Scenario
    numbers: dict[str, Any]  # by figure id

    def values(self, column: Column) -> Values:
        """What the formulas of a column read."""
        parts = {part: self.values(self.scenario.columns[name]) for part, name in column.parts.items()}
        return Values({**self.scenario.figures, **column.figures}, self.numbers, parts)


def every_figure(scenario: Scenario) -> dict[str, Figure]:
    """All figures by id."""
    found = {f.id: f for f in scenario.figures.values()}
    for column in scenario.columns.values():
        found |= {f.id: f for f in column.figures.values()}
    return found


def world_of(scenario: Scenario, changed: Mapping[str, Any] | None = None) -> World:
    """The scenario at its central values, some changed."""
    return World(scenario, {**{i: f.value for i, f in every_figure(scenario).items()}, **(changed or {})})


@dataclass
class Builder:
    """Makes the cells of one column."""

    world: World
    column: Column
    figures: Mapping[str, Figure]
    cells: dict[str, Cell] = field(default_factory=dict)

    def cell(self, key: str, formula: Callable[[str, Values], Any], text: Callable[[float], str]) -> None:
        """Compute one cell; it rests on whatever its formula read."""
        v = self.world.values(self.column)
        try:
            value = float(formula(self.column.kind, v))
        except MissingFigure as missing:
            self.cells[key] = not_known(missing.figure.text, (missing.figure.id,))
            return
        self.cells[key] = self._made(value, text(value), v.used)

    def _made(self, value: float, text: str, used: set[str]) -> Cell:
        # what is zero or one by default decides nothing and is no evidence
        told = [self.figures[i] for i in sorted(used) if not _is_nothing(self.figures[i])]
        return Cell(value, text, weakest(told), tuple(f.id for f in told))


def _is_nothing(figure: Figure) -> bool:
    return (
        figure.text == "assumed by default" and figure.range is None and figure.value in (0, 1, float("inf"))
    )


def cells_of(world: World, column: Column) -> dict[str, Cell]:
    """The cells of a column that need no other column; a row without meaning for its kind is absent."""
    b = Builder(world, column, every_figure(world.scenario))
    kind, k = column.kind, KINDS[column.kind]
    b.cell("upfront_usd", columns.upfront, usd)
    b.cell("fixed_usd", lambda kind, v: k.steady(v) + k.capital(v) + columns.all_spread(kind, v), usd)
    b.cell("variable_usd", lambda kind, v: k.energy(v) + k.spend(v), usd)
    b.cell("total_usd", columns.monthly, usd)
    b.cell("usd_per_mtok_in", lambda kind, v: _per_mtok(columns.split(kind, v)[0], v, "tokens_in"), usd)
    b.cell("usd_per_mtok_out", lambda kind, v: _per_mtok(columns.split(kind, v)[1], v, "tokens_out"), usd)
    b.cell(
        "usd_per_1k_requests",
        lambda kind, v: _per_1k(columns.monthly(kind, v), v["requests_per_month"]),
        _or_none,
    )
    b.cell("usd_per_1k_solved", _solved, _or_none)
    b.cell("wrong_usd", lambda kind, v: _wrong(v), usd)
    b.cell("total_wrong_usd", lambda kind, v: columns.monthly(kind, v) + _wrong(v), usd)
    b.cell("npv_usd", lambda kind, v: -cashflow.net_present_cost(kind, v), usd)
    b.cell("correct_share", lambda kind, v: v["correct_share"], _percent)
    b.cell("ttft_p95_s", lambda kind, v: v["ttft_p95_s"], lambda s: f"{s:.2f} s")
    if column.batch:
        b.cells["ttft_p95_s"] = Cell(None, "by the next day", b.cells["total_usd"].rests_on)
    if k.kwh and k.units and k.busy:
        b.cell("kwh", lambda kind, v: k.kwh(v), lambda e: f"{e:,.1f} kWh")  # type: ignore[misc]
        b.cell("kgco2", lambda kind, v: k.kwh(v) * v["kgco2_per_kwh"], lambda c: f"{c:,.1f} kg")  # type: ignore[misc]
        b.cell("units", lambda kind, v: k.units(v), lambda n: f"{n:.0f}")  # type: ignore[misc]
        b.cell("capacity_used", lambda kind, v: k.busy(v), _percent)  # type: ignore[misc]
    else:
        for key in ("kwh", "kgco2"):
            b.cells[key] = not_known("not published by the token")
    if kind == ROUTED and b.cells["kwh"].value is not None:
        for key in ("kwh", "kgco2"):
            found = b.cells[key]
            b.cells[key] = Cell(found.value, f"{found.text}, own boxes alone", found.rests_on, found.evidence)
    interval = column.figures["correct_share"].range
    if interval and b.cells["correct_share"].value is not None:
        found = b.cells["correct_share"]
        text = f"{found.text} ({interval[0]:.1%} to {interval[1]:.1%})"
        b.cells["correct_share"] = Cell(found.value, text, found.rests_on, found.evidence, interval)
    return b.cells


def _per_mtok(usd_per_month: Any, v: Values, tokens: str) -> float:
    """USD per million tokens of the workload, by the artefact's count, so that columns compare."""
    return float(formulas.per_thousand(usd_per_month, v["requests_per_month"] * v[tokens]) * 1000)


def _per_1k(usd_per_month: Any, count: Any) -> float:
    return float(formulas.per_thousand(usd_per_month, count))


def _solved(kind: str, v: Values) -> float:
    return _per_1k(columns.monthly(kind, v), v["requests_per_month"] * v["correct_share"])


def _wrong(v: Values) -> float:
    """USD a month that wrong answers cost."""
    return v["requests_per_month"] * (1 - v["correct_share"]) * v["wrong_answer_usd"]


def _or_none(value: float) -> str:
    return usd(value) if np.isfinite(value) else "none is solved"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def is_local(column: Column) -> bool:
    """Whether a column runs (partly) on machines of one's own or rented."""
    return column.kind in (*MACHINES, ROUTED)


def sides(scenario: Scenario, cells: Mapping[str, Mapping[str, Cell]]) -> tuple[str | None, str | None]:
    """(local, rival): the columns that are held against each other: the scenario's, else the cheapest of each side by NPV.

    A batch price is a rival only where every API column is one: an answer tomorrow is no answer to a customer who waits.
    """

    def cheapest(which: list[Column]) -> str | None:
        known = [c for c in which if cells[c.id]["npv_usd"].value is not None]
        return max(known, key=lambda c: cells[c.id]["npv_usd"].value or 0.0).id if known else None

    every = list(scenario.columns.values())
    apis = [c for c in every if c.kind == API]
    waiting = [c for c in apis if not c.batch] or apis
    local = scenario.local or cheapest([c for c in every if is_local(c)])
    return local, scenario.rival or cheapest(waiting)


def quality_change(
    column: Column, rival: Column, cells: Mapping[str, Mapping[str, Cell]], pairs: Mapping[str, Any]
) -> Cell:
    """Points of correctness against the rival: paired by rows where a report has both, else two intervals added in squares."""
    mine, other = cells[column.id]["correct_share"], cells[rival.id]["correct_share"]
    for cell in (mine, other):
        if cell.value is None:
            return not_known(cell.text.removeprefix("not known: "), cell.evidence)
    change = 100 * (mine.value - other.value)  # type: ignore[operator]
    evidence = tuple(dict.fromkeys((*mine.evidence, *other.evidence)))
    words = tuple(dict.fromkeys((*mine.rests_on, *other.rests_on)))
    paired = pairs.get(f"{column.quality_of}|{rival.quality_of}")
    if paired:
        low, high = paired["points_ci95"]
        text = f"{paired['points']:+.1f} ({low:+.1f} to {high:+.1f}, 95 %, {paired['n']} rows in pairs)"
        return Cell(paired["points"], text, words, evidence, (low, high))
    ends = [c.range for c in (mine, other)]
    if all(ends):
        low = change - 100 * np.hypot(mine.value - ends[0][0], ends[1][1] - other.value)  # type: ignore[index,operator]
        high = change + 100 * np.hypot(ends[0][1] - mine.value, other.value - ends[1][0])  # type: ignore[index,operator]
        return Cell(
            change, f"{change:+.1f} ({low:+.1f} to {high:+.1f})", words, evidence, (float(low), float(high))
        )
    return Cell(change, f"{change:+.1f}, no interval", words, evidence)


def missing_cell(cell: Cell) -> bool:
    """Whether a cell says that something is missing."""
    return cell.tag == NOT_KNOWN
