"""The table as one page: the answer, plots as inline SVG, every cell linked to what it rests on; no script, nothing loaded.

Two A4 pages in print: answer, table and plots; then what must be true, evidence and formulas.
"""

from __future__ import annotations

from html import escape

from edgeft.bench.html import STYLE
from edgeft.tco.cells import Cell, usd
from edgeft.tco.plots import Plot, key_of, plots
from edgeft.tco.render import FORMULAS, TAGS, evidence_line, grouped, titles
from edgeft.tco.tabulate import Table

OWN_STYLE = """
.answer{font-size:1.05rem;border-left:4px solid #1f6fb4;padding:.2rem 0 .2rem .8rem;margin:.6rem 0}.answer p{margin:.15rem 0}
.answer p:first-child{font-weight:600}body{max-width:1500px}td{vertical-align:top;white-space:normal;min-width:5.2rem}
td small{color:#555;display:block}td a{text-decoration:none}
a.m,i.m{color:#14532d}a.l,i.l{color:#1b4a80}a.a,i.a{color:#8a4b00}a.n,i.n{color:#8a1111}
td a,li i{font-size:.72rem;font-style:normal;border:1px solid;border-radius:.2rem;padding:0 .22rem;display:inline-block;line-height:1.25}
ul.evidence{columns:2;column-gap:2rem;font-size:.78rem}ul.evidence li{break-inside:avoid}li:has(:target){background:#fdf1d3}
@media print{h1{font-size:11pt}body{font-size:6.5pt;line-height:1.3}.answer{font-size:7pt;margin:1mm 0}.answer p{margin:0}p{margin:.5mm 0}
table{font-size:5pt;line-height:1.15}th,td{padding:.55pt 1.2pt}td{min-width:0}th:first-child,td:first-child{min-width:50pt}
td a{font-size:4.2pt;padding:0 .6pt;line-height:1.05}td small{font-size:4.3pt}
figure{width:32%;margin:0 .4%}figure h2{font-size:7pt;margin:0}figcaption{font-size:5pt;line-height:1.2}h2{font-size:8pt;margin:1.5mm 0 .5mm}
figure svg{max-height:50mm}.plots{margin:0;white-space:nowrap}figcaption{white-space:normal}.key{font-size:5.5pt;margin:0}
.second{break-before:page}ul{font-size:5.8pt;margin:.5mm 0}
ul.evidence{columns:4;font-size:4.3pt;line-height:1.17;column-gap:3mm;padding-left:2.5mm}
li i{font-size:3.9pt;padding:0 .8pt}p.tags{font-size:5pt}}
@page{size:A4 landscape;margin:8mm}
"""
MARKS = {
    "measured": ("m", "measured"),
    "list price": ("l", "list"),
    "assumed": ("a", "assumed"),
    "not known": ("n", "missing"),
}


def page(table: Table) -> str:
    """The whole page as HTML text; the same table gives the same bytes."""
    drawn = plots(table)
    absent = "".join(f"<p>{escape(p.title)}: {escape(p.caption)}</p>" for p in drawn if p.svg is None)
    sentences = "".join(f"<p>{escape(s)}</p>" for s in table.verdict)
    about = f"<p>{escape(table.scenario.about)}</p>" if table.scenario.about else ""
    key = "".join(
        f'<span><i style="background:{ink}"></i>{escape(name)}</span>' for name, ink in key_of(table)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>edgeft tco</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}{OWN_STYLE}</style></head><body>'
        f"<h1>{escape(table.scenario.name)}</h1>"
        f'<div class="answer">{sentences}</div>{about}<div class="wide">{_table(table)}</div>'
        f'<h2>Plots</h2><p class="key">{key}</p><div class="plots">{"".join(map(_figure, drawn))}</div>{absent}'
        f'<div class="second"><h2>What must be true for each to win</h2><ul>{_must(table)}</ul>'
        f'<h2>Evidence</h2><p class="tags">{escape(TAGS)}</p><ul class="evidence">{_evidence(table)}</ul>'
        f"<h2>Formulas</h2><ul>{''.join(f'<li>{escape(f)}</li>' for f in FORMULAS)}</ul>"
        f'<p class="tags">{table.draws:,} draws, seed {table.seed}; figures of {table.scenario.date}.</p></div></body></html>\n'
    )


def _table(table: Table) -> str:
    head = "<th></th>" + "".join(f"<th>{escape(c.title)}</th>" for c in table.scenario.columns.values())
    body = ""
    for key, title in titles(table).items():
        if any(key in row for row in table.cells.values()):
            cells = "".join(f"<td>{_cell(name, key, row.get(key))}</td>" for name, row in table.cells.items())
            body += f"<tr><td>{escape(title)}</td>{cells}</tr>"
    odds = "".join(
        f"<td>{f'{table.cheaper[n]:.0%}' if n in table.cheaper else '–'}</td>" for n in table.cells
    )
    body += f"<tr><td>draws in which it is cheaper than every API that answers in time</td>{odds}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: str, key: str, cell: Cell | None) -> str:
    """A cell with a link to the weakest figures behind it; all of them are listed in its title."""
    if cell is None:
        return "–"
    letter, word = MARKS[cell.tag]
    text = escape(cell.text.removeprefix("not known: "))
    if cell.range and cell.text.startswith(("$", "-$")):
        text += f"<small>{usd(cell.range[0])} to {usd(cell.range[1])}</small>"
    where = f' href="#{_anchor(cell.evidence[0])}"' if cell.evidence else ""
    rests = escape("rests on: " + (", ".join(cell.evidence) or "no figure"))
    return f'{text} <a class="{letter}"{where} title="{rests}">{word}</a>'


def _anchor(figure_id: str) -> str:
    return "e-" + "".join(c if c.isalnum() else "-" for c in figure_id)


def _figure(plot: Plot) -> str:
    if plot.svg is None:
        return ""
    title = escape(plot.title)
    picture = plot.svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f"<figure><h2>{title}</h2>{picture}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _must(table: Table) -> str:
    return "".join(
        f"<li>{escape(table.scenario.columns[n].title)}: {escape(text)}</li>"
        for n, text in table.must.items()
    )


def _evidence(table: Table) -> str:
    """Each group of figures that say the same; every figure has its anchor."""
    found = ""
    for group in grouped(table):
        letter, word = MARKS[group[0].tag]
        anchors = "".join(f'<a id="{_anchor(f.id)}"></a>' for f in group)
        text = escape(evidence_line(group)).replace(f" [{group[0].tag}]", "", 1)
        found += f'<li>{anchors}<i class="{letter}">{word}</i> {text}</li>'
    return found
