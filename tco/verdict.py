"""The answer in sentences: where an API is cheaper it says so first; and for each column what must be true for it to win."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.tco import uncertainty
from edgeft.tco.cells import Cell, usd
from edgeft.tco.inputs import API
from edgeft.tco.scenario import Scenario
from edgeft.tco.table import is_local, missing_cell

Cells = Mapping[str, Mapping[str, Cell]]


def verdict(
    scenario: Scenario, cells: Cells, local: str | None, rival: str | None, cheaper: Mapping[str, float]
) -> list[str]:
    """Sentences, the answer first. The yardstick is the net present cost over the months."""
    titles = {name: c.title for name, c in scenario.columns.items()}
    months = int(scenario.figures["months"].value or 0)
    if local is None or rival is None:
        return [
            _why_none(scenario, cells, "own" if local is None else "API"),
            *_batch(scenario, cells, local, rival),
        ]
    mine, other = cells[local]["npv_usd"], cells[rival]["npv_usd"]
    for name, cell in ((local, mine), (rival, other)):
        if missing_cell(cell):
            return [f"The cost of {titles[name]} is not known: {_bare(cell)}."]
    here, there = -(mine.value or 0.0), -(other.value or 0.0)
    chance = cheaper.get(local)
    odds = "" if chance is None else f" It is cheaper than every API here in {chance:.0%} of the draws."
    month = cells[local].get("break_even_month")
    paid = (
        f" Paid off in month, P10/P50/P90: {month.text}."
        if month is not None and month.value is not None
        else ""
    )
    lines = []
    if there <= here:
        lines.append(
            f"The API is cheaper: {titles[rival]} costs {usd(there)} over {months} months, {titles[local]} {usd(here)} "
            f"({_ratio(here, there)})."
        )
        if chance:
            lines.append(f"{titles[local]} is cheaper in {chance:.0%} of the draws.")
        if paid:
            lines.append(paid.strip())
    else:
        lines.append(
            f"{titles[local]} is cheaper: {usd(here)} over {months} months against {usd(there)} for {titles[rival]} "
            f"({_ratio(there, here)}).{odds}{paid}"
        )
    lines += _batch(scenario, cells, local, rival)
    weak = cells[local]["npv_usd"].tag
    if weak == "assumed":
        lines.append(
            "These sums rest on assumed figures; each stands in the list of evidence with its range."
        )
    lines.append(_quality(scenario, cells, local, rival))
    return lines + _with_wrong_answers(scenario, cells)


def _ratio(more: float, less: float) -> str:
    return f"{more / less:,.1f} times as much" if less > 0 else "the other costs nothing"


def _bare(cell: Cell) -> str:
    return cell.text.removeprefix("not known: ")


def _why_none(scenario: Scenario, cells: Cells, side: str) -> str:
    """Why one side of the comparison has no sum."""
    for name, column in scenario.columns.items():
        if is_local(column) == (side == "own") and missing_cell(cells[name]["npv_usd"]):
            return f"The cost of {column.title} is not known: {_bare(cells[name]['npv_usd'])}."
    return f"The scenario has no {side} column to compare."


def _batch(scenario: Scenario, cells: Cells, local: str | None, rival: str | None) -> list[str]:
    """What a batch price costs, where the work can wait and it is not the rival anyway."""
    waits = [c for c in scenario.columns.values() if c.batch and not missing_cell(cells[c.id]["npv_usd"])]
    if (
        not waits
        or local is None
        or (rival and scenario.columns[rival].batch)
        or missing_cell(cells[local]["npv_usd"])
    ):
        return []
    best = max(waits, key=lambda c: cells[c.id]["npv_usd"].value or 0.0)
    cost, here = -(cells[best.id]["npv_usd"].value or 0.0), -(cells[local]["npv_usd"].value or 0.0)
    word = "cheaper" if cost < here else "dearer"
    return [
        f"Where the work can wait a day, {best.title} costs {usd(cost)}: {word} than {scenario.columns[local].title}."
    ]


def _with_wrong_answers(scenario: Scenario, cells: Cells) -> list[str]:
    """Which column is cheapest when wrong answers are counted, where their cost is known."""
    known = [n for n, row in cells.items() if not missing_cell(row["total_wrong_usd"])]
    if len(known) < 2:
        return []
    best = min(known, key=lambda n: cells[n]["total_wrong_usd"].value or 0.0)
    cell, each = cells[best]["total_wrong_usd"], scenario.figures["wrong_answer_usd"]
    return [
        f"With wrong answers at {usd(each.value or 0.0)} each, {scenario.columns[best].title} costs least: {cell.text} a month, "
        f"{cell.tag}."
    ]


def _quality(scenario: Scenario, cells: Cells, local: str, rival: str) -> str:
    change = cells[local].get("quality_change")
    title = scenario.columns[rival].title
    if change is None or change.value is None:
        return f"Price alone: the quality against {title} is not known."
    return f"Quality against {title}, in points: {change.text}, {change.tag}."


def must_be_true(world: Any, cells: Cells, rival: str | None) -> dict[str, str]:
    """For each column, what must hold for it to win against the rival (the rival: against the cheapest of the others)."""
    columns, found = world.scenario.columns, {}
    known = [n for n in columns if not missing_cell(cells[n]["npv_usd"])]
    for name, column in columns.items():
        if rival is None or rival not in known:
            found[name] = "not known: there is no API to hold it against"
        elif name not in known:
            found[name] = f"first this must be known: {_bare(cells[name]['npv_usd'])}"
        elif name == rival:
            found[name] = _for_the_rival(world, cells, name, [n for n in known if n != name])
        else:
            found[name] = _for(world, cells, column, columns[rival])
    return found


def _for(world: Any, cells: Cells, column: Any, rival: Any) -> str:
    mine, other = cells[column.id]["npv_usd"].value or 0.0, cells[rival.id]["npv_usd"].value or 0.0
    ahead = mine > other
    factor = uncertainty.needed_price_factor(world, column, rival)
    parts = []
    if factor is not None:
        verb = "stay above" if ahead else "rise to"
        parts.append(f"prices of {rival.title} {verb} {_times(factor)} of today's")
    if column.kind == API:
        if not ahead:
            need = (other / mine) if mine else 0.0
            parts = [f"its own prices fall to {_times(need)} of today's"]
        return "; or ".join(parts) if parts else "nothing more"
    requests = uncertainty.volume(world, column, rival)
    asked = world.numbers["requests_per_month"]
    if requests is None:
        parts.append("no volume alone does it")
    elif ahead:
        parts.append(
            f"volume stays above {requests:,.0f} requests a month ({requests / asked:.0%} of what is asked)"
        )
    elif requests > asked:
        parts.append(
            f"volume of {requests:,.0f} requests a month ({requests / asked:,.1f} times what is asked)"
        )
    return (" and " if ahead else "; or ").join(parts)


def _times(factor: float) -> str:
    return f"{factor:.0%}" if factor < 2 else f"{factor:,.1f} times"


def _for_the_rival(world: Any, cells: Cells, name: str, others: list[str]) -> str:
    columns = world.scenario.columns
    local = [n for n in others if is_local(columns[n])]
    if not local:
        return "nothing more: no own column's cost is known"
    best = max(local, key=lambda n: cells[n]["npv_usd"].value or 0.0)
    ahead = (cells[name]["npv_usd"].value or 0.0) >= (cells[best]["npv_usd"].value or 0.0)
    requests = uncertainty.volume(world, columns[best], columns[name])
    limit = "at any volume" if requests is None else f"below {requests:,.0f} requests a month"
    if ahead:
        return f"holds {limit} against {columns[best].title}"
    factor = uncertainty.needed_price_factor(world, columns[best], columns[name])
    price = "" if factor is None else f"its prices fall to {_times(factor)} of today's; or "
    return f"{price}volume falls {limit}" if requests is not None else f"{price}nothing else"
