"""The report of `edgeft route eval` as a page with its plot; the same report gives the same bytes."""

from __future__ import annotations

from html import escape
from typing import Any

from edgeft.bench.drawing import figure, names_beside, style, svg

CSS = """body{font:15px/1.45 system-ui,sans-serif;max-width:760px;margin:24px auto;padding:0 14px;color:#111}
table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:4px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}figure{margin:0}svg{width:100%;height:auto}figcaption,.note{font-size:13px;color:#444}h1{font-size:22px}
h2{font-size:17px}"""


def page(found: dict[str, Any]) -> str:
    """The whole page as HTML text."""
    figures = found["figures"]
    rows = [
        ("policy", figures["policy"]["mean"], figures["policy"]["ci95"], found["cost_per_request"]["policy"]),
        ("random, same shares", figures["random_same_share"], None, None),
        *(
            (f"always {name}", v["mean"], v["ci95"], found["cost_per_request"]["always"][name])
            for name, v in figures["always"].items()
        ),
        ("oracle", figures["oracle"], None, None),
    ]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{100 * mean:.1f}</td><td>{_ends(ends)}</td><td>{'' if cost is None else f'{cost:.3g}'}</td></tr>"
        for name, mean, ends, cost in rows
    )
    unit = "USD" if found["cost_unit"] == "usd" else "steps"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>edgeft route eval</title><style>{CSS}</style></head><body><h1>edgeft route eval</h1>"
        f"<p>{escape(found['verdict'])}</p><p>{figures['n']} items of {escape(', '.join(found['reports']))}</p>"
        f"<table><tr><th>rule</th><th>score</th><th>95 % interval</th><th>cost a request ({unit})</th></tr>{body}</table>"
        f"<h2>Score over cost</h2><figure>{plot(found)}<figcaption>{escape(caption(found))}</figcaption></figure>"
        f"{_ends_table(found['two_ends'])}{_early_table(found.get('by_first_tokens'))}</body></html>\n"
    )


def plot(found: dict[str, Any]) -> str:
    """Frontier of all thresholds with its band, the candidates, random mixes between the ends, and the policy."""
    points, figures = found["frontier"]["points"], found["figures"]
    singles = [
        (found["cost_per_request"]["always"][n], 100 * v["mean"]) for n, v in figures["always"].items()
    ]
    here = (found["cost_per_request"]["policy"], 100 * figures["policy"]["mean"])
    with style():
        made = figure(3.4)
        axes = made.subplots()
        xs = [p["cost"] for p in points]
        axes.fill_between(
            xs, *([100 * p["ci95"][i] for p in points] for i in (0, 1)), color="#1f6fb4", alpha=0.15, lw=0
        )
        axes.plot(xs, [100 * p["score"] for p in points], color="#1f6fb4", lw=1.6)
        axes.plot(*zip(singles[0], singles[-1], strict=True), color="#888", lw=1.1, ls=(0, (4, 2)))
        axes.plot(*zip(*singles, strict=True), "o", color="#444", ms=6)
        axes.plot(*here, "D", color="#c4271f", ms=7, zorder=4)
        axes.set(
            xlabel=f"predicted cost a request ({'USD' if found['cost_unit'] == 'usd' else 'steps'})",
            ylabel="score (points of 100)",
        )
        axes.margins(0.12, 0.12)
        names_beside(made, axes, [*singles, here], [*(name[:24] for name in figures["always"]), "policy"])
        return svg(made)


def caption(found: dict[str, Any]) -> str:
    """What the plot shows."""
    return (
        "Blue: every threshold of the rule, with a 95 % bootstrap band over items. Dashed: random mixes of the cheapest and the strongest. "
        f"Oracle (best answer of each item): {100 * found['figures']['oracle']:.1f}."
    )


def _ends_table(ends: dict[str, Any] | None) -> str:
    if ends is None:
        return "<p>The strongest is not better than the cheapest on these rows: APGR is not defined.</p>"
    body = "".join(
        f"<tr><td>{n}</td><td>{ends[k]:.3f}</td><td>{ends[k + '_isotonic']:.3f}</td></tr>"
        for n, k in (("APGR", "apgr"), ("CPT50", "cpt50"), ("CPT80", "cpt80"))
    )
    band = (
        ""
        if ends["apgr_ci95"] is None
        else "APGR's 95 % interval: {:.3f} to {:.3f}. ".format(*ends["apgr_ci95"])
    )
    return (
        f"<h2>Cheapest against strongest</h2><table><tr><th></th><th>protocol</th><th>isotonic</th></tr>{body}</table>"
        f'<p class="note">{band}Random routing has 0.5.</p>'
    )


def _early_table(drafts: dict[str, Any] | None) -> str:
    if not drafts or not drafts["curve"]:
        return ""
    rows = [
        (
            e["tokens"] or "whole",
            f"{e['ended_share']:.0%}",
            f"{e['apgr']:.3f}",
            "" if e["apgr_ci95"] is None else "{:.3f} to {:.3f}".format(*e["apgr_ci95"]),
            f"{100 * e['score_at_same_share']:.1f}",
        )
        for e in drafts["curve"]
    ]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        "<h2>Judging drafts after their first tokens</h2><table><tr><th>tokens</th><th>drafts that end there</th><th>APGR</th>"
        f'<th>95 % interval</th><th>score at the same share</th></tr>{body}</table><p class="note">Tokens are characters / 4. '
        "Judges were fitted on these items, each item judged by one that has not seen it.</p>"
    )


def _ends(ends: list[float] | None) -> str:
    return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
