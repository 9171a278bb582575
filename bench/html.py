"""The report as one page: plots as inline SVG, table, notes; no script, and nothing is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from edgeft.bench.drawing import COLOURS, OTHER
from edgeft.bench.plots import Plot, plots
from edgeft.bench.report import COLUMNS, box_name, notes, table_rows
from edgeft.bench.verdict import FAIL, PASS
from edgeft.types import BenchReport

WORDS = ("verdict", "flags")  # columns that hold no numbers
STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:1240px;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:1.6rem 0 .5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .9rem;margin:0}dt{color:#555}dd{margin:0;overflow-wrap:anywhere}
.key{margin:0 0 .7rem;font-size:.86rem}.key span{margin-right:1.1rem;white-space:nowrap}
.key i{display:inline-block;width:.75em;height:.75em;margin-right:.4em}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:1.4rem 1.6rem;align-items:start}
figure{margin:0;min-width:0;break-inside:avoid;page-break-inside:avoid}figure h2{margin:0 0 .3rem;font-size:1rem}
figure svg{display:block;width:100%;height:auto}figcaption{font-size:.82rem;line-height:1.4;color:#444;overflow-wrap:anywhere}
.wide{overflow-x:auto;border:1px solid #ddd}table{border-collapse:collapse;font-size:.8rem;width:100%}
th,td{padding:.35rem .42rem;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap;font-variant-numeric:tabular-nums}
th{border-bottom:2px solid #888;vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:7.5rem;max-width:13rem}
td.words{white-space:normal;min-width:5rem}td.words,th.words{text-align:left}tr.reference td{background:#f3f3f3}
b{font-weight:600;padding:.05rem .35rem;border-radius:.2rem;border:1px solid;display:inline-block;margin:.05rem 0}
.pass{color:#14532d;background:#e3f4e6}.fail{color:#8a1111;background:#fde8e6}.open{color:#6b4700;background:#fdf1d3}
ul{font-size:.86rem;color:#333;padding-left:1.2rem;overflow-wrap:anywhere}
@page{size:A4;margin:12mm}
@media print{body{margin:0;max-width:none;padding:0;font-size:10pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.plots{display:block}.plots{orphans:1;widows:1}figcaption{font-size:7.5pt}
figure{display:inline-block;width:48.5%;vertical-align:top;margin:0 .6% 5mm}h2{break-after:avoid}
.wide{overflow:visible;border:0}table{font-size:5.9pt;line-height:1.25}th,td{padding:1.2pt 1.6pt;white-space:normal}
th:first-child,td:first-child{position:static;min-width:54pt}td.words{min-width:0}tr,li{break-inside:avoid}b{padding:0 1pt;border:0}}
"""


def page(report: BenchReport) -> str:
    """The whole page as HTML text; the same report gives the same bytes."""
    drawn = plots(report)
    missing = [plot.caption for plot in drawn if plot.svg is None]
    listed = "".join(
        f"<li>{escape(line)}</li>" for line in missing + [n for n in notes(report) if n not in missing]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>edgeft bench</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>edgeft bench</h1>{_header(report)}"
        f'<h2>Figures</h2><div class="wide">{_table(report)}</div>'
        f'<h2>Plots</h2>{_key(report)}<div class="plots">{"".join(_figure(p) for p in drawn if p.svg)}</div>'
        f"<h2>Notes</h2><ul>{listed}</ul></body></html>\n"
    )


def _header(report: BenchReport) -> str:
    w = report.workload
    rows = f"{w['rows']} rows of {w['tasks']}" if w.get("tasks") else "no rows were asked"
    threads = f", {w['threads']} threads" if w.get("threads") else ""
    lines = {
        "Box": box_name(report),
        "Date": report.created_at,
        "Workload": f"{len(report.results)} models, {rows}{threads}",
        "Reference": report.reference or "none",
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in lines.items()) + "</dl>"


def _key(report: BenchReport) -> str:
    """Which colour is which format, for the formats that are there."""
    there = {str(r.get("format") or "") for r in report.results}
    known = [(name, ink) for name, ink in COLOURS.items() if name in there]
    if there - set(COLOURS):
        known.append(("other", OTHER))
    return (
        '<p class="key">'
        + "".join(f'<span><i style="background:{ink}"></i>{name}</span>' for name, ink in known)
        + "</p>"
    )


def _figure(plot: Plot) -> str:
    title = escape(plot.title)
    picture = (plot.svg or "").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f"<figure><h2>{title}</h2>{picture}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _table(report: BenchReport) -> str:
    head = "".join(_head(name) for name in (*COLUMNS, "flags"))
    body = ""
    for result, row in zip(report.results, table_rows(report), strict=True):
        mark = ' class="reference"' if result["id"] == report.reference else ""
        cells = "".join(_cell(name, text) for name, text in zip(COLUMNS, row, strict=True))
        body += f"<tr{mark}>{cells}{_cell('flags', flags_of(result))}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _head(column: str) -> str:
    return f'<th class="words">{column}</th>' if column in WORDS else f"<th>{escape(column)}</th>"


def _cell(column: str, text: str) -> str:
    inner = _verdict(text) if column == "verdict" else escape(text)
    return f'<td class="words">{inner}</td>' if column in WORDS else f"<td>{inner}</td>"


def _verdict(cell: str) -> str:
    """Each word of a verdict on its colour."""
    kinds = {PASS: "pass", FAIL: "fail", "broke": "fail"}
    parts = cell.split("; ")
    return " ".join(
        f'<b class="{kinds.get(p.split()[0], "open")}">{escape(p)}</b>' if p != "–" else p for p in parts
    )


def flags_of(r: dict[str, Any]) -> str:
    """What disturbed the timed rounds, as 'busy in 3 of 5'; a dash where nobody looked."""
    rounds = (r.get("speed") or {}).get("rounds")
    if r.get("flags") is None or not rounds:
        return "–"
    kinds: dict[str, set[int]] = {}
    for flag in r["flags"]:
        kinds.setdefault(flag["what"], set()).add(flag["round"])
    return ", ".join(f"{what} in {len(seen)} of {rounds}" for what, seen in kinds.items()) or "none"
