"""The three plots of a table: cumulative cost with bands, the tornado, cost against quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.bench.drawing import at, figure, named_rows, names_beside, style, svg
from edgeft.tco.cells import usd
from edgeft.tco.figures import plain
from edgeft.tco.inputs import API, CLOUD, FLEET, OWN, ROUTED
from edgeft.tco.tabulate import Table

COLOURS = {API: "#7d55a8", CLOUD: "#c4771f", OWN: "#1f6fb4", FLEET: "#2c8a2c", ROUTED: "#444444"}
NAMES = {API: "API", CLOUD: "rented GPU", OWN: "own box", FLEET: "fleet", ROUTED: "routed"}
MOST = 6  # lines with bands that stay legible


@dataclass(frozen=True)
class Plot:
    """A plot, or why there is none."""

    title: str
    caption: str
    svg: str | None


def plots(table: Table) -> list[Plot]:
    """The plots that the table's figures allow."""
    with style():
        return [cumulative(table), tornado(table), quality(table)]


def chosen(table: Table) -> list[str]:
    """The columns that are drawn as lines: the two compared, then the cheapest of each kind."""
    known = sorted(table.bands, key=lambda n: table.bands[n][1][-1])
    kinds = {n: table.scenario.columns[n].kind for n in known}
    cheapest = [next(n for n in known if kinds[n] == kind) for kind in dict.fromkeys(kinds.values())]
    first = [n for n in (table.local, table.rival) if n in table.bands]
    return list(dict.fromkeys([*first, *cheapest]))[:MOST]


def cumulative(table: Table) -> Plot:
    """Cumulative cost by month, median and P10 to P90."""
    names = chosen(table)
    title = f"Cumulative cost over {table.months} months"
    if not names:
        return Plot(title, "No column's cost is known.", None)
    made = figure(3.4)
    axes = made.subplots()
    dash = {API: "--", ROUTED: ":"}
    months = range(table.months + 1)
    for name in names:
        kind = table.scenario.columns[name].kind
        low, mid, high = table.bands[name]
        same = [n for n in names if table.scenario.columns[n].kind == kind]
        fade = 1 - 0.25 * same.index(name)
        axes.fill_between(months, low, high, color=COLOURS[kind], alpha=0.12 * fade, lw=0)
        axes.plot(months, mid, color=COLOURS[kind], lw=1.6, ls=dash.get(kind, "-"), alpha=fade)
    axes.set(xlabel="month", xlim=(0, float(table.months)), ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda v, _: usd(v).removesuffix(".00"))
    ends = [
        (float(table.months) * (0.55 + 0.06 * i), _on(table, n, 0.55 + 0.06 * i)) for i, n in enumerate(names)
    ]
    names_beside(made, axes, ends, [table.scenario.columns[n].title for n in names])
    left = len(table.bands) - len(names)
    more = f" {left} columns are left out." if left else ""
    return Plot(
        title,
        f"Lines: median of {table.draws:,} draws; bands: P10 to P90. Assumed and listed figures alike.{more}",
        svg(made),
    )


def _on(table: Table, name: str, share: float) -> float:
    """The median at a share of the months."""
    return float(table.bands[name][1][round(share * table.months)])


def tornado(table: Table) -> Plot:
    """What each figure alone does to the gain of the local column."""
    if not table.tornado:
        return Plot(
            "What moves the answer", "No figure with a range decides between two known columns.", None
        )
    mine, other = (table.scenario.columns[n].title for n in (table.local, table.rival) if n)
    bars = table.tornado
    made, (axes,) = named_rows(
        [b["id"] for b in bars], [f"{plain(b['low'])} to {plain(b['high'])}" for b in bars]
    )
    base = _base(table)
    for row, bar in enumerate(bars):
        for end, ink in (("gain_low", "#1f6fb4"), ("gain_high", "#c4771f")):
            axes.barh(at(row), bar[end] - base, left=base, height=0.34, color=ink, alpha=0.85)
    axes.axvline(0, color="#222", lw=1)
    axes.axvline(base, color="#777", lw=0.8, ls=":")
    axes.xaxis.set_major_formatter(lambda v, _: usd(v).removesuffix(".00"))
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.06)
    caption = (
        f"{table.months}-month gain of {mine} over {other}, each figure alone at P10 (blue) and at P90 (orange), the others as they are "
        "(dotted). Right of the line at 0 the local one is cheaper."
    )
    return Plot("What moves the answer", caption, svg(made))


def _base(table: Table) -> float:
    mine, other = (table.cells[n]["npv_usd"].value or 0.0 for n in (table.local, table.rival) if n)
    return mine - other


def quality(table: Table) -> Plot:
    """Cost of 1,000 requests against what is solved."""
    title = "Cost against quality"
    points, names, kinds = [], [], []
    for name, row in table.cells.items():
        cost, share = row["usd_per_1k_requests"].value, row["correct_share"].value
        if cost and share is not None:
            points.append((cost, 100 * share))
            names.append(table.scenario.columns[name].title)
            kinds.append((table.scenario.columns[name].kind, row["correct_share"]))
    if len(points) < 2:
        return Plot(title, "Fewer than two columns have both a cost and a known share of solved tasks.", None)
    made = figure(3.4)
    axes = made.subplots()
    axes.set(xscale="log", xlabel="USD per 1,000 requests", ylabel="solved correctly, %")
    for (x, y), (kind, cell) in zip(points, kinds, strict=True):
        if cell.range:
            axes.vlines(x, 100 * cell.range[0], 100 * cell.range[1], color=COLOURS[kind], lw=1, alpha=0.6)
        full = cell.tag == "measured"
        axes.plot(x, y, "o", ms=6, color=COLOURS[kind], mfc=COLOURS[kind] if full else "white")
    axes.xaxis.set_major_formatter(lambda v, _: usd(v).removesuffix(".00"))
    axes.xaxis.set_minor_formatter(lambda v, _: "")
    axes.margins(x=0.25)
    low = [100 * c.range[0] if c.range else y for (_, y), (_, c) in zip(points, kinds, strict=True)]
    high = [100 * c.range[1] if c.range else y for (_, y), (_, c) in zip(points, kinds, strict=True)]
    axes.set_ylim(max(0.0, min(low) - 8), min(104.0, max(high) + 8))
    names_beside(made, axes, points, names)
    return Plot(
        title,
        "Full dots: quality measured; hollow: assumed. Lines: P10 to P90 of the share. Up and left is better.",
        svg(made),
    )


def key_of(table: Table) -> list[tuple[str, Any]]:
    """(name, colour) of the kinds that are there."""
    there = {c.kind for c in table.scenario.columns.values()}
    return [(NAMES[k], ink) for k, ink in COLOURS.items() if k in there]
