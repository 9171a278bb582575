"""Plots of quality: the Pareto front, accuracy over size, paired differences, effective context."""

from __future__ import annotations

from edgeft.bench import plot_data as data
from edgeft.bench.drawing import at, colour, figure, fitted, named_rows, names_beside, svg
from edgeft.bench.paired import ALPHA
from edgeft.bench.plot_base import NAME_CHARS, Plot, label, left_out
from edgeft.bench.plot_data import DECODE, QUALITY, RIGHT, SIZE, Measure
from edgeft.types import BenchReport


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
