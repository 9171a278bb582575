"""The table on the terminal, as Markdown, CSV and JSON: the same cells each time."""

from __future__ import annotations

import csv
import io
from typing import Any

from edgeft.tco.cells import Cell, usd
from edgeft.tco.figures import Figure, plain
from edgeft.tco.inputs import INPUTS
from edgeft.tco.table import ROWS
from edgeft.tco.tabulate import Table

TAGS = (
    "measured: in the run that the evidence names; list price: as published, with source and date; assumed: neither. A cell is as "
    "weak as the weakest figure that it was computed from."
)
FORMULAS = (
    "own a month = boxes × [(P − RV/(1+r)ⁿ) × CRF(r,n)/12 + P × maintenance/12 + room + visits] + energy + staff + storage + other, "
    "and data, training, quantizing again spread over their lives",
    "energy = boxes × [load × u + idle × (1−u)] W / 1000 × 730 h × PUE × USD/kWh, with u = time busy",
    "boxes = ceil(peak rps / (rps × (1 − headroom))) + spares; rps = concurrency gain / seconds of a request",
    "API a month = requests × (1 + retry) × [Tfresh × p_in + Tread × p_read + Twrite × p_write + Tout × p_out] × (1 − fall)^(t/12)",
    "routed = own boxes for what is tried there + (1−c) × [(1−s) + s × e] × API: c from the cache, s tried locally, e escalated, paid twice",
    "break-even month: the first at whose end the rival has cost more in all, capital recovery left out; NPV: payments and what boxes "
    "are still worth, at the cost of capital; with growth month m has Q × (1+g)^(m−1) requests, and rows a month are the first's",
    "an own box's $ per 1M tokens: prompts and answers by the time before and after the first token",
)
FORMATS = (".md", ".csv", ".json", ".html")


def grid(table: Table) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of texts): what the terminal and Markdown show. A dash stands where a row has no meaning."""
    columns = [c.title for c in table.scenario.columns.values()]
    rows = [
        [title, *(shown(table.cells[name].get(key)) for name in table.scenario.columns)]
        for key, title in titles(table).items()
        if any(key in row for row in table.cells.values())
    ]
    cheaper = [f"{table.cheaper[n]:.0%}" if n in table.cheaper else "–" for n in table.scenario.columns]
    rows.append(["cheaper than every API in time", *cheaper])
    return ["", *columns], rows


def titles(table: Table) -> dict[str, str]:
    """Row -> its title."""
    return {**ROWS, "npv_usd": f"{table.months}-month NPV of all payments"}


def shown(cell: Cell | None) -> str:
    """A cell's text, its range and its tag."""
    if cell is None:
        return "–"
    if cell.tag == "not known":
        return cell.text
    ends = (
        f"\n({usd(cell.range[0])} to {usd(cell.range[1])})"
        if cell.range and cell.text.startswith(("$", "-$"))
        else ""
    )
    return f"{cell.text}{ends}\n[{cell.tag}]"


def grouped(table: Table) -> list[list[Figure]]:
    """The evidence, figures of several columns that say the same together."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for f in table.evidence.values():
        groups.setdefault((f.id.rsplit(".", 1)[-1], f.shown, f.tag, f.text), []).append(f)
    return list(groups.values())


def evidence_line(group: list[Figure]) -> str:
    """Figures that say the same, with their meaning and what they rest on: 'name (columns) = value [tag]: meaning; source'."""
    first, name = group[0], group[0].id.rsplit(".", 1)[-1]
    where = [f.id.rsplit(".", 1)[0] for f in group if "." in f.id]
    of = f" ({', '.join(where)})" if where else ""
    return f"{name}{of} = {first.shown} [{first.tag}]: {INPUTS[name].about}; {first.text}"


def terminal(table: Table) -> str:
    """What stands under the table on a terminal."""
    lines = ["What must be true for each to win"]
    lines += [f"  {table.scenario.columns[n].title}: {text}" for n, text in table.must.items()]
    if table.tornado:
        lines += [
            "",
            f"What moves the gain of {_title(table, table.local)} over {_title(table, table.rival)} most (P10 and P90 of each)",
        ]
        lines += [
            f"  {b['id']} {plain(b['low'])} to {plain(b['high'])}: {usd(b['gain_low'])} to {usd(b['gain_high'])}"
            for b in table.tornado
        ]
    lines += ["", "Evidence", *(f"  {evidence_line(g)}" for g in grouped(table)), "", f"  {TAGS}"]
    return "\n".join(lines)


def _title(table: Table, name: str | None) -> str:
    return table.scenario.columns[name].title if name else ""


def markdown(table: Table) -> str:
    """The whole comparison as a Markdown page, the answer first."""
    columns, rows = grid(table)
    lines = [f"# {_safe(table.scenario.name)}", ""]
    for sentence in table.verdict:
        lines += [_safe(sentence), ""]
    if table.scenario.about:
        lines += [_safe(" ".join(table.scenario.about.split())), ""]
    lines += [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    lines += [_line([cell.replace("\n", "<br>") for cell in row]) for row in rows]
    lines += ["", "## What must be true for each to win", ""]
    lines += [f"- {_safe(table.scenario.columns[n].title)}: {_safe(text)}" for n, text in table.must.items()]
    if table.tornado:
        lines += [
            "",
            f"## What moves the gain of {_safe(_title(table, table.local))} over {_safe(_title(table, table.rival))}",
            "",
        ]
        lines += [
            _line(["figure", "P10", "P90", "gain at P10", "gain at P90"]),
            _line(["---", *["---:"] * 4]),
        ]
        lines += [
            _line([b["id"], plain(b["low"]), plain(b["high"]), usd(b["gain_low"]), usd(b["gain_high"])])
            for b in table.tornado
        ]
    lines += ["", "## Evidence", "", *(f"- {_safe(evidence_line(g))}" for g in grouped(table))]
    lines += ["", "## Formulas", "", *(f"- {_safe(f)}" for f in FORMULAS), "", TAGS, ""]
    lines += [f"{table.draws:,} draws, seed {table.seed}."]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("$", "\\$")


def to_csv(table: Table) -> str:
    """One line a cell: column, row, value, P10, P90, tag, evidence, text. Empty where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["column", "row", "value", "p10", "p90", "tag", "rests_on", "evidence", "text"])
    for name, row in table.cells.items():
        for key in ROWS:
            if cell := row.get(key):
                d = cell.to_dict()
                low, high = d["range"] or ("", "")
                words = " ".join(word.replace(" ", "-") for word in cell.rests_on)
                value = "" if d["value"] is None else d["value"]
                writer.writerow(
                    [name, key, value, low, high, cell.tag, words, " ".join(cell.evidence), cell.text]
                )
    return out.getvalue()


def to_json(table: Table) -> dict[str, Any]:
    """The comparison as plain JSON types."""
    s = table.scenario
    return {
        "schema": "edgeft/tco@2",
        "name": s.name,
        "date": s.date.isoformat(),
        "verdict": table.verdict,
        "local": table.local,
        "rival": table.rival,
        "months": table.months,
        "columns": {
            name: {
                "title": c.title, "kind": c.kind, "batch": c.batch, "must_be_true": table.must.get(name),
                "cheaper_share_of_draws": table.cheaper.get(name),
                "cells": {key: cell.to_dict() for key, cell in table.cells[name].items()},
                "cumulative_usd": dict(zip(("p10", "p50", "p90"), table.bands[name], strict=True)) if name in table.bands else None,
            }
            for name, c in s.columns.items()
        },
        "tornado": table.tornado,
        "evidence": {i: _plain(f) for i, f in table.evidence.items()},
        "formulas": list(FORMULAS),
        "draws": table.draws,
        "seed": table.seed,
    }  # fmt: skip


def _plain(figure: Figure) -> dict[str, Any]:
    value = None if figure.value == float("inf") else figure.value
    ends = list(figure.range) if figure.range else None
    return {"value": value, "p10_p90": ends, "tag": figure.tag, "text": figure.text}
