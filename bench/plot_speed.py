"""Plots of speed: latencies, the roofline, load."""

from __future__ import annotations

from typing import Any

from edgeft.bench import plot_data as data
from edgeft.bench.drawing import at, colour, dots, figure, fitted, named_rows, svg
from edgeft.bench.plot_base import Plot, few_ticks, label, left_out, three
from edgeft.bench.plot_data import DOTS
from edgeft.types import BenchReport

LOG_ABOVE = 30.0  # largest over smallest at which an axis of times is logarithmic


def latencies(report: BenchReport) -> list[Plot]:
    """Times to the first token and between tokens, for the first and the longest shape of request."""
    found = [_latency(report, shape) for shape in data.shapes(report.results)]
    return found or [Plot("Latency", None, "Latency: not measured.")]


def _latency(report: BenchReport, shape: dict[str, int] | None) -> Plot:
    timed = [(r, p) for r in report.results if (p := data.point_at(r, shape))]
    between = any(p.get("itl_s") for _, p in timed)
    lines = [
        "TTFT " + _ms(p["ttft_s"]) + (", ITL " + _ms(p["itl_s"]) if p.get("itl_s") else "") for _, p in timed
    ]
    made, axes = named_rows([label(r) for r, _ in timed], lines, 2 if between else 1)
    for each, key, title in zip(axes, ("ttft_s", "itl_s"), ("TTFT (ms)", "ITL (ms)"), strict=False):
        _strips(each, [(r, p.get(key)) for r, p in timed], title)
    asked = f", {shape['prompt_tokens']} tokens in, {shape['output_tokens']} out" if shape else ""
    text = "Dots: raw samples; ticks: p50 (long) and p95 (short); figures: p50 / p95 in ms, client side."
    text += " ITL: gaps between pieces of text." if between else " Gaps between tokens (ITL): not kept."
    counts = [len(s["samples"]) for _, p in timed for s in (p["ttft_s"], p.get("itl_s")) if s]
    if 0 in counts:
        text += " Without dots: percentiles alone were kept."
    if max(counts) > DOTS:
        text += f" Of more than {DOTS} samples {DOTS} are drawn, evenly spaced in rank; the ticks are of all."
    if logarithmic := [
        name for each, name in zip(axes, ("TTFT", "ITL"), strict=False) if each.get_xscale() == "log"
    ]:
        text += f" Logarithmic: {' and '.join(logarithmic)}; what is too small for the axis stands at its left edge."
    return Plot(f"Latency{asked}", svg(made), text + left_out(report, [r for r, _ in timed]))


def _strips(axes: Any, rows: list[tuple[dict[str, Any], dict[str, Any] | None]], title: str) -> None:
    """A strip of dots a model with ticks at p50 and p95; the axis is logarithmic where models are far apart."""
    known = [s for _, s in rows if s]
    middle, highest = min(s["p50"] for s in known), max(max([s["p95"], *s["samples"]]) for s in known)
    axes.set_xlabel(title)
    left = 0.0
    if middle > 0 and highest / middle > LOG_ABOVE:
        left = 1e3 * middle / 4
        axes.set_xscale("log")
        axes.set_xlim(left, 1e3 * highest * 1.3)
        _plain_log_ticks(axes)
    else:
        axes.set_xlim(0, 1e3 * highest * 1.05)
        axes.xaxis.set_major_locator(few_ticks())
    for i, (r, found) in enumerate(rows):
        if found and found["samples"]:
            dots(axes, [max(left, 1e3 * s) for s in data.thinned(found["samples"])], i, colour(r))
        if found:
            for name, half in (("p50", 0.24), ("p95", 0.15)):
                axes.vlines(1e3 * found[name], at(i) - half, at(i) + half, color="#111", lw=1.5, zorder=4)


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 300 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _ms(found: dict[str, Any]) -> str:
    return " / ".join(three(1e3 * found[name]) for name in ("p50", "p95"))


def roofline(report: BenchReport) -> Plot:
    """Decode rate against what the memory's bandwidth allows."""
    rows = [(r, r["roofline"], rate) for r in report.results if _bound(r) and (rate := data.decode_rate(r))]
    if not rows:
        return Plot(
            "Roofline", None, "Roofline: bandwidth, speed or the model's shape not known, so not drawn."
        )
    texts = [
        f"{three(v.middle)} of {three(s['decode_bound_tok_per_s'])} tok/s: {100 * v.middle / s['decode_bound_tok_per_s']:.0f} %"
        for _, s, v in rows
    ]
    made, (axes,) = named_rows([label(r) for r, *_ in rows], texts)
    for i, (r, s, v) in enumerate(rows):
        bound = s["decode_bound_tok_per_s"]
        axes.barh(at(i), bound, 0.34, color="#e6e6e6")
        axes.barh(at(i), v.middle, 0.34, color=colour(r))
        axes.plot([v.low, v.high], [at(i)] * 2, color="#111", lw=1.2)
        axes.vlines(bound, at(i) - 0.24, at(i) + 0.24, color="#111", lw=1.8)
    axes.set(
        xlabel="decode (tok/s)",
        xlim=(0, 1.03 * max(max(s["decode_bound_tok_per_s"], v.high) for _, s, v in rows)),
    )
    over = sorted({s["over_100"] for _, s, _ in rows if s.get("over_100")})
    text = f"Grey, to the tick: what {rows[0][1]['bandwidth_gb_per_s']:g} GB/s would allow one stream, weights, keys and values "
    text += "read for each token. Colour: measured, with its 95 % interval."
    text += "".join(f" Above 100 %: {words}." for words in over)
    return Plot("Roofline (memory bandwidth)", svg(made), text + left_out(report, [r for r, *_ in rows]))


def _bound(r: dict[str, Any]) -> float | None:
    return (r.get("roofline") or {}).get("decode_bound_tok_per_s")


def load(report: BenchReport) -> Plot:
    """Throughput and goodput over clients, a panel a model."""
    rows = [r for r in report.results if (r.get("load_test") or {}).get("closed")]
    if not rows:
        return Plot("Load", None, "Load (several clients at once): not measured.")
    down = -(-len(rows) // 2)
    made = figure(0.35 + 1.5 * down)
    panels = made.subplots(down, 2, squeeze=False).ravel()
    for axes, r in zip(panels, rows, strict=False):
        _load_panel(axes, r)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    made.supxlabel("clients at once", fontsize=8.5)
    made.supylabel("requests a second", fontsize=8.5)
    limits = rows[0]["load_test"].get("limits")
    if limits:
        held = ", ".join(f"{name.partition('_')[0].upper()} {bound:g} s" for name, bound in limits.items())
        text = f"Solid: throughput; dashed: goodput, the requests within {held}."
    else:
        text = "Throughput. No TTFT or TPOT limit is set, so goodput is the same."
    text += " Dotted: the knee, the fewest clients with 95 % of the best output tokens a second. Each panel has its own scale."
    return Plot("Load", svg(made), text + left_out(report, rows))


def _load_panel(axes: Any, r: dict[str, Any]) -> None:
    test, ink = r["load_test"], colour(r)
    clients = [c["clients"] for c in test["closed"]]
    through = [c["requests_per_s"] for c in test["closed"]]
    axes.plot(clients, through, "o-", color=ink, ms=3.5, lw=1.5)
    if test.get("limits"):
        axes.plot(
            clients,
            [c["goodput_per_s"] for c in test["closed"]],
            "s--",
            color=ink,
            mfc="white",
            ms=3.5,
            lw=1.2,
        )
    if clients[-1] >= 8 * clients[0]:
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(clients, [str(c) for c in clients])
    axes.set_ylim(0, 1.3 * max(through) or 1)
    axes.yaxis.set_major_locator(few_ticks())
    knee = test.get("knee_clients")
    if knee in clients:
        axes.axvline(knee, color="#444", lw=1.2, ls=":")
        axes.annotate(
            f"knee {knee}", (knee, 1), xycoords=("data", "axes fraction"), fontsize=7.5, color="#333", va="top",
            xytext=(-3, 0) if knee > clients[0] else (3, 0), textcoords="offset points",
            ha="right" if knee > clients[0] else "left",
        )  # fmt: skip
    axes.set_title(fitted(label(r), 26), loc="left", fontsize=8)
