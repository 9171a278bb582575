"""The report as one page: table, plots as inline SVG, notes; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import io
from typing import Any

from edgeft.bench.report import COLUMNS, notes, table_rows
from edgeft.types import BenchReport

COLOURS = {"safetensors": "#555", "gguf": "#1f77b4", "onnx": "#2ca02c", "gptq": "#d62728"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}.lead{color:#555;margin-top:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;width:100%}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap;font-variant-numeric:tabular-nums}
th{border-bottom:2px solid #888;vertical-align:bottom;white-space:normal}th:first-child,td:first-child{text-align:left}
tr.reference td{background:#f6f6f6}.plots{display:flex;flex-wrap:wrap;gap:1rem;margin:1.5rem 0}
.plots figure{margin:0;flex:1 1 480px}.plots svg{width:100%;height:auto}figcaption{font-size:.85rem;color:#555}
ul{font-size:.86rem;color:#444;padding-left:1.2rem}@media print{body{margin:0;max-width:none}}
"""


def page(report: BenchReport) -> str:
    """The whole page as HTML text."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
    body = ""
    for result, row in zip(report.results, table_rows(report), strict=True):
        mark = ' class="reference"' if result["id"] == report.reference else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    figures = [
        (_accuracy_plot(report), "Accuracy over size. Bars are Wilson's 95 % intervals."),
        (_speed_plot(report), "Decode speed over size, one stream. Bars span all runs."),
    ]
    plots = "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures if svg)
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in notes(report))
    lead = f"{len(report.results)} models, {report.workload['rows']} rows of {html.escape(report.workload['tasks'])}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>edgeft bench</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>edgeft bench</h1><p class="lead">{lead}</p><div class="plots">{plots}</div>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<ul>{listed}</ul></body></html>\n"
    )


def _accuracy_plot(report: BenchReport) -> str:
    points = []
    for r in report.results:
        if r["size_bytes"] and (r["accuracy"] or {}).get("n"):
            share, (low, high) = r["accuracy"]["share"], r["accuracy"]["ci95"]
            points.append((r, 100 * share, 100 * (share - low), 100 * (high - share)))
    return _scatter(points, "answers exactly right (%)", (0, 104)) if points else ""


def _speed_plot(report: BenchReport) -> str:
    points = []
    for r in report.results:
        decode = (r.get("speed") or {}).get("decode_tok_per_s")
        if r["size_bytes"] and decode:
            ordered = sorted(decode["samples"])
            points.append((r, decode["p50"], decode["p50"] - ordered[0], ordered[-1] - decode["p50"]))
    return _scatter(points, "decode (tok/s)", (0, None)) if points else ""


def _scatter(
    points: list[tuple[dict[str, Any], float, float, float]], label: str, limits: tuple[float, float | None]
) -> str:
    """A scatter over file size as SVG text; a point's name stands beside it where there is room."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeft", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for result, value, below, above in points:
            colour = COLOURS.get(result.get("format", ""), "#9467bd")
            size_mb = result["size_bytes"] / 1e6
            axes.vlines(size_mb, value - max(below, 0), value + max(above, 0), color=colour, alpha=0.35, lw=2)
            axes.plot(size_mb, value, "o", color=colour, zorder=3)
        top = limits[1] or 1.12 * max(value + above for _, value, _, above in points)
        widest = max(result["size_bytes"] for result, *_ in points) / 1e6
        axes.set(xlabel="size (MB)", ylabel=label, ylim=(limits[0], top), xlim=(0, 1.25 * widest))
        for (result, value, _, _), (align, shift) in zip(points, _label_places(points, top), strict=True):
            axes.annotate(
                result["id"], (result["size_bytes"] / 1e6, value), xytext=(6 if align == "left" else -6, shift),
                textcoords="offset points", ha=align, fontsize=8.5, zorder=4,
                arrowprops={"arrowstyle": "-", "color": "#888", "lw": 0.6} if abs(shift) > 12 else None,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _label_places(
    points: list[tuple[dict[str, Any], float, float, float]], top: float
) -> list[tuple[str, float]]:
    """For each point the side its name stands on, and a vertical offset in points: clear of names and of other points."""
    widest = max(p[0]["size_bytes"] for p in points)
    spots = [(p[0]["size_bytes"] / widest, p[1] / top * 240) for p in points]
    # What is taken: (left, right, height), in shares of the widest and in points.
    taken = [(x - 0.02, x + 0.02, y) for x, y in spots]
    places: list[tuple[str, float]] = [("left", 0.0)] * len(points)
    for index in sorted(range(len(points)), key=lambda i: -spots[i][1]):
        (x, y), length = spots[index], 0.022 * len(points[index][0]["id"])
        tries = [
            (side, shift)
            for shift in (4, -8, 14, -18, 24, -28, -38, 34, -48, 44)
            for side in ("left", "right")
        ]
        for align, shift in tries:
            left, right = (x + 0.03, x + 0.03 + length) if align == "left" else (x - 0.03 - length, x - 0.03)
            others = [t for t in taken if t != (x - 0.02, x + 0.02, y)]
            if left > 0 and not any(
                left < r and right > lo and abs(y + shift + 3 - h) < 11 for lo, r, h in others
            ):
                break
        taken.append((left, right, y + shift + 3))
        places[index] = (align, shift)
    return places
