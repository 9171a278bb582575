"""Is B faster, slower, better or worse than A, and could these samples have told?

Every figure that both sides have is compared; Holm's correction runs over all tests made. TTFT and prefill speed come
from one measurement and count as one test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeft.bench import compare_items, compare_speed
from edgeft.bench.compare_speed import Repeats
from edgeft.bench.significance import LogRatio, holm
from edgeft.types import BenchReport

SLOWDOWN = 0.05  # what --gate excludes, as a share of time

Figure = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One result of one report."""

    name: str  # as it was asked for
    report: BenchReport
    result: dict[str, Any]
    items: list[dict[str, Any]] = field(default_factory=list)  # its lines of items.jsonl
    report_sha256: str | None = None
    repeats: dict[str, Repeats] = field(default_factory=dict)  # figure -> spread of repeated runs, if known


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Every figure of `b` against `a`.

    Returns {a, b, one_report, notes, tests, figures: [{figure, a, b, ratio or difference, ci95, p, p_holm, ci_holm,
    could_show, verdict, why}]}; ratios are b/a.
    """
    return compare_many([(a, b)])[0]


def compare_many(pairs: list[tuple[Side, Side]]) -> list[dict[str, Any]]:
    """`compare` for several pairs, as many artefacts against one baseline, with one correction over all of them."""
    found = [_measured(a, b) for a, b in pairs]
    slots: dict[tuple[int, str], list[tuple[Figure, LogRatio | None]]] = {}
    for index, figures in enumerate(found):
        for figure, estimate in figures:
            if figure["p"] is not None:
                slots.setdefault((index, figure["measurement"]), []).append((figure, estimate))
    adjusted, levels = holm([max(f["p"] for f, _ in slot) for slot in slots.values()])
    for slot, p, level in zip(slots.values(), adjusted, levels, strict=True):
        for figure, estimate in slot:
            figure["p_holm"] = p
            if estimate is None:
                compare_items.judge(figure, len(slots))
            else:
                compare_speed.judge(figure, estimate, level, len(slots))
    return [
        {
            "a": _about(a),
            "b": _about(b),
            "one_report": _one_report(a, b),
            "notes": _notes(a, b),
            "tests": len(slots),
            "figures": [figure for figure, _ in figures],
        }
        for (a, b), figures in zip(pairs, found, strict=True)
    ]


def gate(comparison: dict[str, Any]) -> tuple[int, str]:
    """(0, 1 or 4, why): 1 where B is worse with significance, 4 where a 5 % slowdown of decoding stays possible."""
    worse = [f["figure"] for f in comparison["figures"] if f["verdict"] in ("slower", "worse")]
    name = comparison["b"]["name"]
    if worse:
        return 1, f"{name} is worse: {', '.join(worse)}."
    decode: Figure = next((f for f in comparison["figures"] if f["figure"] == "decode tok/s"), {})
    left = decode.get("slowdown_at_worst")
    if left is None:
        return (
            4,
            f"{name}: decode speed could not be compared ({decode.get('why', 'not measured on both sides')}).",
        )
    if left > SLOWDOWN:
        return 4, f"{name} may be up to {100 * left:.1f} % slower; these samples do not exclude 5 %."
    return 0, f"{name} is not worse; a slowdown of 5 % is excluded."


def _measured(a: Side, b: Side) -> list[tuple[Figure, LogRatio | None]]:
    speed = [(s.result.get("speed") or {}) for s in (a, b)]
    same_rows = a.report.workload.get("tasks_sha256") == b.report.workload.get("tasks_sha256")
    virtual = any(s.report.environment.get("virtual_machine") for s in (a, b))
    found: list[tuple[Figure, LogRatio | None] | None] = [
        compare_speed.speed_figure(
            name, speed[0], speed[1], _one_report(a, b), (a.repeats.get(name), b.repeats.get(name)), virtual
        )
        for name in compare_speed.SPEEDS
    ]
    plain = [
        compare_items.accuracy_figure(a.items, b.items),
        compare_items.score_figure(a.items, b.items),
        *(compare_items.kld_figure(part, a.result, b.result, same_rows) for part in ("answer", "all")),
        *(compare_items.size_figure(name, a.result, b.result) for name in compare_items.SIZES),
    ]
    found += [(figure, None) for figure in plain if figure]
    return [f for f in found if f]


def _one_report(a: Side, b: Side) -> bool:
    return a.report is b.report or (a.report_sha256 is not None and a.report_sha256 == b.report_sha256)


def _about(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "id": side.result["id"],
        "artifact_sha256": side.result.get("artifact_sha256"),
        "report_sha256": side.report_sha256,
        "created_at": side.report.created_at,
        "profile": side.report.profile.get("id"),
    }


def _notes(a: Side, b: Side) -> list[str]:
    """What else differs between the two, and what their runs were flagged with."""
    pairs = [
        ("profile", a.report.profile.get("id"), b.report.profile.get("id")),
        ("threads", a.report.workload.get("threads"), b.report.workload.get("threads")),
        ("rows", a.report.workload.get("tasks_sha256"), b.report.workload.get("tasks_sha256")),
        ("engine", a.result.get("engine_build"), b.result.get("engine_build")),
        ("processes a model", *((s.result.get("speed") or {}).get("processes") for s in (a, b))),
        ("load mode", *((s.result.get("load") or {}).get("load_mode") for s in (a, b))),
    ]
    lines = [f"other {what}: {str(x)[:40]} and {str(y)[:40]}" for what, x, y in pairs if x and y and x != y]
    for side in (a, b):
        kinds = sorted({flag["what"] for flag in side.result.get("flags") or []})
        if kinds:
            lines.append(f"{side.name} was flagged while it was measured: {', '.join(kinds)}")
        if side.result.get("error"):
            lines.append(f"{side.name} ended with an error: {side.result['error']}")
    return lines
