"""The plots of a report. What was not measured is not drawn: the plot then has a sentence instead of a picture."""

from __future__ import annotations

from edgeft.bench.drawing import at, colour, named_rows, style, svg
from edgeft.bench.plot_base import Plot, label, left_out, three
from edgeft.bench.plot_quality import accuracy, context, paired_differences, pareto
from edgeft.bench.plot_speed import latencies, load, roofline
from edgeft.types import BenchReport

__all__ = ["Plot", "energy", "memory", "plots"]


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


def energy(report: BenchReport) -> Plot:
    """Joules an output token."""
    rows = [
        (r, e)
        for r in report.results
        if (e := r.get("energy") or {}).get("joules_per_output_token") is not None
    ]
    if not rows:
        return Plot("Energy", None, "Energy: not measured.")
    texts = [f"{three(e['joules_per_output_token'])} J/token at {three(e['mean_w'])} W" for _, e in rows]
    made, (axes,) = named_rows([label(r) for r, _ in rows], texts)
    for i, (r, e) in enumerate(rows):
        axes.barh(at(i), e["joules_per_output_token"], 0.34, color=colour(r))
    axes.set(xlabel="joules an output token", xlim=(0, None))
    text = f"By {', '.join(sorted({e['method'] for _, e in rows}))}, over the speed blocks, prefill included; a total, so it has no interval."
    return Plot("Energy", svg(made), text + left_out(report, [r for r, _ in rows]))
