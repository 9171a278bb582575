"""The comparison as a table on the terminal, as Markdown and as JSON: the same cells each time."""

from __future__ import annotations

from typing import Any

from edgeft.tco.cells import Cell
from edgeft.tco.costs import ROWS

TAGS = (
    "measured: in the run named below; list price: as published; assumed: not measured, values below. "
    "A cell is as strong as the weakest figure it is made of; the others follow in brackets."
)
FORMULAS = (
    "own = boxes * [(P - RV/(1+r)^n) * CRF(r,n)/12 + P*maintenance/12] + energy + other",
    "energy = boxes * [load*u + idle*(1-u)] W / 1000 * 730 h * PUE * USD/kWh, with u = time busy",
    "boxes = ceil(peak_rps / (rps*(1-headroom))) + spares, with rps = 1 / seconds a request: one request at a "
    "time, so a lower bound of what a box can do until there is a concurrency sweep",
    "API = requests * (1+retry) * (Tin*p_in + Tout*p_out); no cached, batch or long-context prices",
)


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    """The comparison as plain JSON types."""
    return {
        "schema": "edgeft/tco@1",
        **found,
        "own": _plain(found["own"]),
        "apis": {name: _plain(column) for name, column in found["apis"].items()},
        "formulas": list(FORMULAS),
    }


def _plain(column: dict[str, Cell]) -> dict[str, Any]:
    return {key: cell.to_dict() for key, cell in column.items()}


def grid(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of texts): what both the terminal and Markdown show."""
    columns = {f"{found['artifact']} on {found['profile']}": found["own"], **found["apis"]}
    marks = {run: f"R{index}" for index, run in enumerate(found["runs"], 1)}
    rows = [
        [title, *(_text(column.get(key), marks) for column in columns.values())]
        for key, title in ROWS.items()
    ]
    return ["a month", *columns], rows


def _text(cell: Cell | None, marks: dict[str, str]) -> str:
    if cell is None:
        return "-"
    words = [cell.tag, *(word for word in cell.rests_on if word != cell.tag)]
    if cell.run and "measured" in words:
        words[words.index("measured")] += f" {marks[cell.run]}"
    if cell.tag == "not known":
        return cell.text
    return f"{cell.text} [{words[0]}{': ' if words[1:] else ''}{', '.join(words[1:])}]"


def _under(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """What stands under the table: (heading, lines)."""
    return [
        ("Measured in", [f"R{index}: {run}" for index, run in enumerate(found["runs"], 1)]),
        ("Assumed", [f"{a['name']} = {a['value']:,g} ({a['about']})" for a in found["assumptions"]]),
        ("Notes", found["notes"]),
        ("Formulas", list(FORMULAS)),
        ("Tags", [TAGS]),
    ]


def terminal(found: dict[str, Any]) -> str:
    """What stands under the table on a terminal."""
    return "\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in _under(found) if lines
    )


def markdown(found: dict[str, Any]) -> str:
    """The whole comparison as a Markdown page, the answer first."""
    columns, rows = grid(found)
    lines = [
        f"# {found['requests_per_month']:,g} requests a month: own box against API",
        "",
        *found["verdict"],
        "",
    ]
    lines += [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)]), *(_line(row) for row in rows)]
    for title, texts in _under(found):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {_safe(text)}" for text in texts)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("$", "\\$")
