"""The whole comparison: from a scenario to cells, draws and sentences, as one value that every rendering shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.tco import uncertainty
from edgeft.tco.cells import ASSUMED, Cell
from edgeft.tco.figures import Figure
from edgeft.tco.inputs import API
from edgeft.tco.scenario import Scenario
from edgeft.tco.table import cells_of, every_figure, is_local, missing_cell, quality_change, sides, world_of
from edgeft.tco.verdict import must_be_true, verdict


@dataclass(frozen=True)
class Table:
    """What the renderings show. Columns in the scenario's order."""

    scenario: Scenario
    cells: dict[str, dict[str, Cell]]  # column -> row -> cell
    local: str | None
    rival: str | None
    verdict: list[str]
    must: dict[str, str]  # column -> what must be true for it to win
    cheaper: dict[
        str, float
    ]  # column -> share of draws in which it is cheaper than every API that answers in time
    bands: dict[str, list[list[float]]]  # column -> P10, P50, P90 of cumulative cost by month
    tornado: list[dict[str, Any]]
    evidence: dict[str, Figure]  # the figures that cells rest on, by id
    draws: int
    seed: int

    @property
    def months(self) -> int:
        """Months that are looked at."""
        return int(self.scenario.figures["months"].value or 0)


def tabulate(scenario: Scenario, draws: int = uncertainty.DRAWS, seed: int = uncertainty.SEED) -> Table:
    """Everything of a scenario. Missing figures end in cells that say so; nothing raises for them."""
    world = world_of(scenario)
    cells = {name: cells_of(world, column) for name, column in scenario.columns.items()}
    local, rival = sides(scenario, cells)
    drawn = uncertainty.simulate(uncertainty.draw(scenario, draws, seed), draws)
    in_time = [c.id for c in scenario.columns.values() if c.kind == API and not c.batch]
    cheaper, must = {}, {}
    for name, column in scenario.columns.items():
        row = cells[name]
        if name in drawn:
            low, high = (float(np.percentile(-drawn[name].npc, q)) for q in (10, 90))
            found = row["npv_usd"]
            row["npv_usd"] = Cell(found.value, found.text, found.rests_on, found.evidence, (low, high))
        if rival is None or name == rival:
            continue
        row["quality_change"] = quality_change(column, scenario.columns[rival], cells, scenario.pairs)
        if is_local(column):
            row |= _break_even(world, scenario, name, rival, cells, drawn)
            chance = uncertainty.chance_cheaper(drawn, column, sorted({*in_time, rival}))
            if chance is not None:
                cheaper[name] = chance
    must = must_be_true(world, cells, rival)
    known = local in drawn and rival in drawn
    bars = uncertainty.tornado(scenario, local, rival) if local and rival and known else []
    every = every_figure(scenario)
    used = {i for row in cells.values() for cell in row.values() for i in cell.evidence}
    return Table(
        scenario, cells, local, rival, verdict(scenario, cells, local, rival, cheaper), must, cheaper,
        {name: d.band().tolist() for name, d in drawn.items()}, bars,
        {i: f for i, f in every.items() if i in used}, draws, seed,
    )  # fmt: skip


def _break_even(
    world: Any, scenario: Scenario, name: str, rival: str, cells: Any, drawn: Any
) -> dict[str, Cell]:
    """The month and the volume at which a column has caught up with the rival."""
    column, other = scenario.columns[name], scenario.columns[rival]
    mine, theirs = cells[name]["total_usd"], cells[rival]["total_usd"]
    for cell in (mine, theirs):
        if missing_cell(cell):
            return {"break_even_month": cell, "break_even_requests": cell}
    words = tuple(dict.fromkeys((*mine.rests_on, *theirs.rests_on)))
    evidence = tuple(dict.fromkeys((*cells[name]["npv_usd"].evidence, *cells[rival]["npv_usd"].evidence)))
    quantiles, share = uncertainty.break_even(drawn[name], drawn[rival])
    shown = "/".join("never" if q == float("inf") else f"{q:.0f}" for q in quantiles)
    if quantiles[0] == float("inf"):
        shown = "never"
    note = f" ({share:.0%} of draws)" + (", on assumptions" if ASSUMED in words else "")
    month = Cell(quantiles[1], shown + note, words, evidence, (quantiles[0], quantiles[2]))
    requests = uncertainty.volume(world, column, other)
    text = "at no volume" if requests is None else f"{requests:,.0f}"
    text += ", on assumptions" if ASSUMED in words else ""
    return {"break_even_month": month, "break_even_requests": Cell(requests, text, words, evidence)}
