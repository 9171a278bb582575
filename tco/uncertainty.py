"""What the ranges of the figures do to the answer: draws, break-even, P(local is cheaper), tornado."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.tco import cashflow
from edgeft.tco.columns import KINDS, upfront
from edgeft.tco.figures import MissingFigure
from edgeft.tco.inputs import API, INPUTS
from edgeft.tco.scenario import Column, Scenario
from edgeft.tco.table import World, every_figure, world_of

DRAWS, SEED = 10_000, 20261125
BARS = 10  # of the tornado
QUANTILES = (10, 50, 90)


@dataclass(frozen=True)
class Drawn:
    """One column over all draws, USD."""

    paid: Any  # [months + 1, draws]
    npc: Any  # net present cost [draws]

    def band(self) -> Any:
        """P10, P50 and P90 of the cumulative cost: array [3, months + 1]."""
        return np.percentile(np.cumsum(self.paid, 0), QUANTILES, axis=1)


def draw(scenario: Scenario, draws: int = DRAWS, seed: int = SEED) -> World:
    """The scenario with every ranged figure drawn; whole numbers stay whole."""
    numbers = {}
    for key, figure in every_figure(scenario).items():
        value = figure.draw(draws, seed)
        whole = INPUTS[key.rsplit(".", 1)[-1]].whole
        numbers[key] = np.round(value) if whole and value is not None else value
    return World(scenario, numbers)


def simulate(world: World, draws: int = DRAWS) -> dict[str, Drawn]:
    """Every column whose figures are all there. A column without any range is one draw, repeated."""
    found = {}
    for name, column in world.scenario.columns.items():
        v = world.values(column)
        try:
            paid = cashflow.payments(column.kind, v)
            npc = cashflow.net_present_cost(column.kind, v, paid)
        except MissingFigure:
            continue
        paid = paid.reshape(len(paid), -1)
        found[name] = Drawn(np.broadcast_to(paid, (len(paid), draws)), np.broadcast_to(npc, (draws,)))
    return found


def break_even(own: Drawn, rival: Drawn) -> tuple[tuple[float, float, float], float]:
    """(P10, P50, P90 of the month in which the own column has paid off, the share of draws in which it does in time)."""
    months = np.sort(cashflow.break_even_month(own.paid, rival.paid))
    picked = [float(months[min(len(months) - 1, int(q / 100 * len(months)))]) for q in QUANTILES]
    return (picked[0], picked[1], picked[2]), float(np.isfinite(months).mean())


def chance_cheaper(drawn: Mapping[str, Drawn], column: Column, against: list[str]) -> float | None:
    """The share of draws in which a column has a lower net present cost than every one of some others."""
    others = [drawn[name].npc for name in against if name in drawn]
    if column.id not in drawn or not others:
        return None
    return float((drawn[column.id].npc < np.minimum.reduce(others)).mean())


def tornado(scenario: Scenario, local: str, rival: str) -> list[dict[str, Any]]:
    """What each ranged figure alone does to the gain of local over rival: {id, low, high, gain_low, gain_high}, widest first.

    The gain is the rival's net present cost less the local one's, with the figure at P10 and at P90 and all others central.
    """
    pair = [scenario.columns[name] for name in (local, rival)]

    def gain(changed: Mapping[str, float]) -> float:
        world = world_of(scenario, changed)
        mine, other = (float(cashflow.net_present_cost(c.kind, world.values(c))) for c in pair)
        return other - mine

    read: set[str] = set()
    world = world_of(scenario)
    for column in pair:
        v = world.values(column)
        cashflow.net_present_cost(column.kind, v)
        read |= v.used
    bars: list[dict[str, Any]] = []
    for key, figure in every_figure(scenario).items():
        if key in read and figure.range and figure.range[0] < figure.range[1]:
            low, high = figure.range
            bars.append(
                {
                    "id": key,
                    "low": low,
                    "high": high,
                    "gain_low": gain({key: low}),
                    "gain_high": gain({key: high}),
                }
            )
    bars.sort(key=lambda b: (-abs(b["gain_high"] - b["gain_low"]), b["id"]))
    return [bar for bar in bars[:BARS] if bar["gain_low"] != bar["gain_high"]]


def needed_price_factor(world: World, column: Column, rival: Column) -> float | None:
    """What the rival's prices would have to be, as a multiple of today's, for both to cost the same over the months.

    Prices of the rival count in a routed column as well, for what it leaves to that very API. None where no factor does.
    """
    free = World(
        world.scenario,
        {**world.numbers, **{k: 0.0 for k in world.numbers if _is_price_of(rival.id, k, world.scenario)}},
    )
    try:
        with_prices = [_npc(world, c) for c in (column, rival)]
        without = [_npc(free, c) for c in (column, rival)]
    except MissingFigure:
        return None
    mine, other = (a - b for a, b in zip(with_prices, without, strict=True))
    if other - mine <= 0:
        return None
    factor = (without[0] - without[1]) / (other - mine)
    return factor if factor > 0 else None


def _npc(world: World, column: Column) -> float:
    return float(cashflow.net_present_cost(column.kind, world.values(column)))


def _is_price_of(column: str, key: str, scenario: Scenario) -> bool:
    prices = (
        "usd_per_mtok_in",
        "usd_per_mtok_read",
        "usd_per_mtok_write",
        "usd_per_mtok_out",
        "usd_per_mtok_in_long",
        "usd_per_mtok_out_long",
    )
    own = {scenario.columns[column].figures[p].id for p in prices if p in scenario.columns[column].figures}
    return key in own


def volume(world: World, column: Column, rival: Column) -> float | None:
    """The fewest requests a month at which the column costs no more a month than the rival; None: at no volume."""
    v, other = world.values(column), world.values(rival)
    asked = other["requests_per_month"]
    if not asked or column.kind == API:
        return None
    spend = KINDS[API].spend(other)
    from edgeft.tco.columns import monthly

    fixed = float(monthly(API, other) - spend)
    return cashflow.break_even_requests(column.kind, v, float(spend) / asked, fixed)


def upfront_of(world: World, column: Column) -> float | None:
    """USD before the first request, None where a figure is missing."""
    try:
        return float(upfront(column.kind, world.values(column)))
    except MissingFigure:
        return None
