"""The plots of a report. What was not measured is not drawn: the plot then has a sentence instead of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.bench import plot_data as data
from edgeft.bench.drawing import (
    at,
    colour,
    dots,
    figure,
    fitted,
    named_rows,
    names_beside,
    style,
    svg,
)
from edgeft.bench.paired import ALPHA
from edgeft.bench.plot_data import DECODE, DOTS, QUALITY, RIGHT, SIZE, Measure
from edgeft.bench.report import spoiled
from edgeft.types import BenchReport

NAME_CHARS = 24  # of a name beside a point
LOG_ABOVE = 30.0  # largest over smallest at which an axis of times is logarithmic


@dataclass(frozen=True)
class Plot:
    """A picture (SVG; None where there was nothing to draw) and what must be said of it."""

    title: str
    svg: str | None
    caption: str


def plots(report: BenchReport) -> list[Plot]:
    """All plots of a report, in the order of the page."""
    with style():
        return [
            pareto(report),
            accuracy(report),
            *latencies(report),
            roofline(report),
            memory(report),
            paired_differences(report),
            load(report),
            context(report),
            energy(report),
        ]


def pareto(report: BenchReport) -> Plot:
    """Quality over decode rate (over size where no speed was measured), with the front."""
    quality, cost = (
        data.first_known(QUALITY, report.results),
        data.first_known((DECODE, SIZE), report.results),
    )
    if quality is None or cost is None:
        what = "quality not measured" if quality is None else "neither decode rate nor size known"
        return Plot("Pareto front", None, f"Pareto front: {what}.")
    picture, caption = _scatter(report, cost, quality, with_front=True)
    over = cost[0].partition(" (")[0]
    return Plot(f"Pareto front: quality over {over}", picture, caption)


def accuracy(report: BenchReport) -> Plot:
    """Right answers over size."""
    picture, caption = _scatter(report, SIZE, RIGHT)
    if picture is None:
        return Plot("Accuracy over size", None, "Accuracy over size: not measured, or no size known.")
    return Plot("Accuracy over size", picture, caption)


def _scatter(
    report: BenchReport, over: Measure, up: Measure, with_front: bool = False
) -> tuple[str | None, str]:
    found = [(r, x, y) for r in report.results if (x := over[1](r)) and (y := up[1](r))]
    if not found:
        return None, ""
    less = over is SIZE
    spots = [(x.middle, y.middle) for _, x, y in found]
    kept = data.front(spots, less) if with_front else list(range(len(spots)))
    made = figure(3.7)
    axes = made.subplots()
    right = 1.12 * max(x.high for _, x, _ in found)
    low, high = min(y.low for *_, y in found), max(y.high for *_, y in found)
    slack = 0.08 * (high - low or 1)
    axes.set(xlabel=over[0], ylabel=up[0], xlim=(0, right), ylim=(low - slack, high + slack))
    for i, (r, x, y) in enumerate(found):
        ink = colour(r)
        axes.plot([x.low, x.high], [y.middle] * 2, color=ink, alpha=0.4, lw=1.6)
        axes.plot([x.middle] * 2, [y.low, y.high], color=ink, alpha=0.4, lw=1.6)
        axes.plot(*spots[i], "o", color=ink, mfc=ink if i in kept else "white", ms=6, mew=1.4, zorder=3)
    if with_front:
        line = data.staircase([spots[i] for i in kept], low - slack, right if less else 0, less)
        axes.plot(*zip(*line, strict=True), color="#888", lw=1.1, ls=(0, (4, 2)), zorder=1)
    names_beside(made, axes, spots, [fitted(label(r), NAME_CHARS) for r, *_ in found])
    bars = "Bars: 95 % intervals (right %: Wilson's; others: bootstrap)"
    text = f"{bars}; size has none." if less else f"{bars}."
    if with_front:
        text += (
            " Dashed: the front; a hollow point is no better than another on either axis and worse on one. "
        )
        text += "It is drawn through the figures alone: where intervals overlap, the order is not certain."
    return svg(made), text + left_out(report, [r for r, *_ in found])


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
        axes.xaxis.set_major_locator(_few_ticks())
    for i, (r, found) in enumerate(rows):
        if found and found["samples"]:
            dots(axes, [max(left, 1e3 * s) for s in data.thinned(found["samples"])], i, colour(r))
        if found:
            for name, half in (("p50", 0.24), ("p95", 0.15)):
                axes.vlines(1e3 * found[name], at(i) - half, at(i) + half, color="#111", lw=1.5, zorder=4)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 300 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _ms(found: dict[str, Any]) -> str:
    return " / ".join(_three(1e3 * found[name]) for name in ("p50", "p95"))


def _three(number: float) -> str:
    """A number with three digits that count, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def roofline(report: BenchReport) -> Plot:
    """Decode rate against what the memory's bandwidth allows."""
    rows = [(r, r["roofline"], rate) for r in report.results if _bound(r) and (rate := data.decode_rate(r))]
    if not rows:
        return Plot(
            "Roofline", None, "Roofline: bandwidth, speed or the model's shape not known, so not drawn."
        )
    texts = [
        f"{_three(v.middle)} of {_three(s['decode_bound_tok_per_s'])} tok/s: {100 * v.middle / s['decode_bound_tok_per_s']:.0f} %"
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


def memory(report: BenchReport) -> Plot:
    """Peak resident memory, anonymous and of files."""
    rows = [(r, m) for r in report.results if (m := r.get("memory") or {}).get("peak_rss_bytes")]
    if not rows:
        return Plot("Memory", None, "Memory: not measured.")
    apart = [m.get("peak_anon_bytes") is not None and m.get("peak_file_bytes") is not None for _, m in rows]
    texts = [
        f"{m['peak_rss_bytes'] / 1e6:.0f} MB"
        + (f" ({m['peak_anon_bytes'] / 1e6:.0f} + {m['peak_file_bytes'] / 1e6:.0f})" if known else "")
        for (_, m), known in zip(rows, apart, strict=True)
    ]
    made, (axes,) = named_rows([label(r) for r, _ in rows], texts)
    for i, (r, m) in enumerate(rows):
        if apart[i]:
            own, files = m["peak_anon_bytes"] / 1e6, m["peak_file_bytes"] / 1e6
            axes.barh(at(i), own, 0.34, color=colour(r))
            axes.barh(at(i), files, 0.34, left=own, color=colour(r), alpha=0.35)
        else:
            axes.barh(
                at(i), m["peak_rss_bytes"] / 1e6, 0.34, color="white", edgecolor=colour(r), hatch="////"
            )
    most = max(m["peak_rss_bytes"] for _, m in rows) / 1e6
    budget = 1e3 * ((report.profile.get("limits") or {}).get("memory_budget_gb") or 0)
    axes.set(
        xlabel="peak resident memory (MB)", xlim=(0, 1.05 * max(most, budget if budget < 4 * most else 0))
    )
    text = (
        "Full colour: anonymous; pale: backed by files, which can be dropped and read again (peaks of each)."
    )
    if not all(apart):
        text += " Hatched: not told apart."
    if budget:
        text += f" The budget of {report.profile['id']} is {budget / 1e3:g} GB"
        text += ": the dashed line." if budget < 4 * most else ", far right of this axis."
        if budget < 4 * most:
            axes.axvline(budget, color="#a00000", lw=1.5, ls=(0, (4, 2)))
    return Plot("Memory", svg(made), text + left_out(report, [r for r, _ in rows]))


def paired_differences(report: BenchReport) -> Plot:
    """Forest plot of right answers against the reference, in points."""
    base, rows = data.differences(report)
    if not rows:
        return Plot(
            "Paired differences",
            None,
            "Paired differences: no two models answered the same scored rows, or an older report.",
        )
    by_id = {r["id"]: r for r in report.results}
    names = [label(by_id[d.id]) if d.id in by_id else d.id for d in rows]
    made, (axes,) = named_rows(names, [f"{d.points:+.1f} points, {_p(d.p_holm)}" for d in rows])
    for i, d in enumerate(rows):
        ink, shown = colour(by_id.get(d.id, {})), d.p_holm < ALPHA
        if d.smallest_shown is not None:
            axes.barh(at(i), 2 * d.smallest_shown, 0.48, left=-d.smallest_shown, color="#ececec", zorder=0)
        axes.plot([d.low, d.high], [at(i)] * 2, color=ink, lw=2, zorder=3)
        axes.plot(
            d.points,
            at(i),
            "D" if shown else "o",
            color=ink,
            mfc=ink if shown else "white",
            ms=6.5,
            mew=1.5,
            zorder=4,
        )
    axes.axvline(0, color="#444", lw=1, zorder=2)
    axes.spines["left"].set_visible(False)
    reach = 1.06 * max(1.0, *(max(abs(d.low), abs(d.high), d.smallest_shown or 0.0) for d in rows))
    rows_n = sorted({d.n for d in rows})
    spread = f"{rows_n[0]}" if len(rows_n) == 1 else f"{rows_n[0]} to {rows_n[-1]}"
    axes.set(xlabel=f"right answers, points more than {fitted(str(base), 30)}", xlim=(-reach, reach))
    text = f"On the same {spread} rows, with paired bootstrap 95 % intervals. Filled diamond: differs (McNemar, p < {ALPHA:g} "
    text += f"after Holm's correction over all pairs of models, {len(report.pairs)} here). Grey: differences too small for these "
    text += "rows to show in 4 of 5 cases."
    shown_rows = [r for r in report.results if r["id"] in {base, *(d.id for d in rows)}]
    return Plot("Paired differences", svg(made), text + left_out(report, shown_rows))


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


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
    axes.yaxis.set_major_locator(_few_ticks())
    knee = test.get("knee_clients")
    if knee in clients:
        axes.axvline(knee, color="#444", lw=1.2, ls=":")
        axes.annotate(
            f"knee {knee}", (knee, 1), xycoords=("data", "axes fraction"), fontsize=7.5, color="#333", va="top",
            xytext=(-3, 0) if knee > clients[0] else (3, 0), textcoords="offset points",
            ha="right" if knee > clients[0] else "left",
        )  # fmt: skip
    axes.set_title(fitted(label(r), 26), loc="left", fontsize=8)


def context(report: BenchReport) -> Plot:
    """Right answers of the synthetic task, and the time to the first token, over the prompt's length."""
    rows = [(r, found) for r in report.results if (found := r.get("context"))]
    if not rows:
        return Plot("Effective context", None, "Effective context: not measured.")
    made = figure(4.4)
    above, below = made.subplots(2, 1, sharex=True)
    for i, (r, found) in enumerate(rows):
        ink, look = (
            colour(r),
            {"marker": "osD^v"[i % 5], "ls": ("-", "--", ":", "-.")[i % 4], "ms": 4, "lw": 1.4},
        )
        lengths = [c["tokens"] for c in found["lengths"]]
        share = [100 * c["right"] / c["n"] for c in found["lengths"]]
        ends = [[100 * end for end in c["ci95"]] for c in found["lengths"]]
        above.vlines(lengths, *zip(*ends, strict=True), color=ink, alpha=0.4, lw=1.6)
        above.plot(lengths, share, color=ink, label=fitted(label(r), NAME_CHARS), **look)
        below.plot(lengths, [1e3 * c["ttft_s"]["p50"] for c in found["lengths"]], color=ink, **look)
        if found["effective_tokens"]:
            above.axvline(found["effective_tokens"], color=ink, lw=1, ls=":", alpha=0.7)
    above.set(ylabel="right (%)", ylim=(-3, 103))
    below.set(xlabel="prompt (tokens)", ylabel="TTFT, median (ms)", ylim=(0, None), xlim=(0, None))
    above.legend(fontsize=7, loc="best", framealpha=0.8)
    text = f"Synthetic task. Bars: 95 % intervals (Wilson). Dotted: the effective context ({rows[0][1]['formula']})."
    return Plot("Effective context", svg(made), text + left_out(report, [r for r, _ in rows]))


def energy(report: BenchReport) -> Plot:
    """Joules an output token."""
    rows = [
        (r, e)
        for r in report.results
        if (e := r.get("energy") or {}).get("joules_per_output_token") is not None
    ]
    if not rows:
        return Plot("Energy", None, "Energy: not measured.")
    texts = [f"{_three(e['joules_per_output_token'])} J/token at {_three(e['mean_w'])} W" for _, e in rows]
    made, (axes,) = named_rows([label(r) for r, _ in rows], texts)
    for i, (r, e) in enumerate(rows):
        axes.barh(at(i), e["joules_per_output_token"], 0.34, color=colour(r))
    axes.set(xlabel="joules an output token", xlim=(0, None))
    text = f"By {', '.join(sorted({e['method'] for _, e in rows}))}, over the speed blocks, prefill included; a total, so it has no interval."
    return Plot("Energy", svg(made), text + left_out(report, [r for r, _ in rows]))


def label(r: dict[str, Any]) -> str:
    """A model's name as the table has it: with a star where its rounds were disturbed."""
    return str(r["id"]) + ("*" if spoiled(r) else "")


def left_out(report: BenchReport, drawn: list[dict[str, Any]]) -> str:
    """A sentence naming the models for which a plot has nothing."""
    seen = {r["id"] for r in drawn}
    names = [r["id"] for r in report.results if r["id"] not in seen]
    return f" Not measured, so not drawn: {', '.join(names)}." if names else ""
