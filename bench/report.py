"""The report in three forms from the same numbers: JSON for machines, Markdown, and a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.bench import autotune, choices, context, pack
from edgeft.bench.speed_figures import process_notes
from edgeft.files import write_json, write_jsonl, write_text
from edgeft.types import BenchReport

COLUMNS = (
    "model", "MB", "bits/w", "right %", "lost/gained", "kept gain", "KLD answer", "KLD all", "same top-1 %", "TTFT ms", "prefill tok/s",
    "decode tok/s", "of BW %", "J/tok", "peak MB", "start s", "verdict",
)  # fmt: skip


def write_report(report: BenchReport, items: list[dict[str, Any]], out: Path) -> None:
    """Write `items.jsonl`, `report.md`, `report.csv`, `report.html`, and `report.json` last: all are there then."""
    from edgeft.bench.csv_out import csv_text
    from edgeft.bench.html import page

    write_jsonl(out / "items.jsonl", items)
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.csv", csv_text(report))
    write_text(out / "report.html", page(report))
    write_json(out / "report.json", report.to_dict())


def table_rows(report: BenchReport) -> list[list[str]]:
    """A row a model for `COLUMNS`; what was not measured is a dash."""
    return [_row(result) for result in report.results]


def _row(r: dict[str, Any]) -> list[str]:
    speed, fidelity, against = r.get("speed") or {}, r.get("fidelity") or {}, r.get("against_reference") or {}
    accuracy = r.get("accuracy") or {}
    times = speed.get("ttft_s") or accuracy.get("ttft_s")
    return [
        r["id"] + ("*" if spoiled(r) else ""),
        number(r["size_bytes"], 1e-6, 0),
        number(r.get("bits_per_weight"), 1, 2),
        _right(accuracy),
        f"{against['lost']}/{against['gained']}" if against else "–",
        number((r.get("retention") or {}).get("value"), 1, 3),
        number((fidelity.get("answer") or {}).get("kld_mean"), 1, 4),
        number((fidelity.get("all") or {}).get("kld_mean"), 1, 4),
        number((fidelity.get("all") or {}).get("same_top1"), 100, 1),
        f"{1e3 * times['p50']:.0f} / {1e3 * times['p95']:.0f}" if times else "–",
        number((speed.get("prefill_tok_per_s") or {}).get("p50"), 1, 0),
        within(speed.get("decode_tok_per_s")),
        number((r.get("roofline") or {}).get("bandwidth_share"), 100, 0),
        number((r.get("energy") or {}).get("joules_per_output_token"), 1, 2),
        number((r.get("memory") or {}).get("peak_rss_bytes"), 1e-6, 0),
        number((r.get("load") or {}).get("cold_start_s"), 1, 1),
        verdict_of(r),
    ]


def _right(accuracy: dict[str, Any]) -> str:
    if accuracy.get("n"):
        return f"{100 * accuracy['share']:.1f} ±{50 * (accuracy['ci95'][1] - accuracy['ci95'][0]):.1f}"
    scored = list((accuracy.get("by_task") or {}).values())
    return f"{100 * scored[0]['mean']:.1f} {scored[0]['metric']}" if scored else "–"


def within(found: dict[str, Any] | None) -> str:
    """A median with half its interval, as '104.0 ±1.2'."""
    if not found:
        return "–"
    low, high = found.get("p50_ci95") or (None, None)
    return f"{found['p50']:.1f}" + ("" if low is None or high is None else f" ±{(high - low) / 2:.1f}")


def verdict_of(r: dict[str, Any]) -> str:
    """PASS, or the limits that fail or are not decided; a dash where no limit is set."""
    found = r.get("verdict") or []
    if r.get("error"):
        return "broke off"
    bad = [f"{v['verdict']} {v['limit']}" for v in found if v["verdict"] != "PASS"]
    return "; ".join(bad) if bad else "PASS" if found else "–"


def spoiled(r: dict[str, Any]) -> bool:
    """Was more than a fifth of the rounds disturbed?"""
    rounds = (r.get("speed") or {}).get("rounds") or 0
    disturbed = {f["round"] for f in r.get("flags") or [] if f["what"] != "clock"}
    return bool(rounds) and len(disturbed) > rounds / 5


def number(value: float | None, scale: float, digits: int) -> str:
    """A number, or a dash where it was not measured."""
    return "–" if value is None else f"{value * scale:.{digits}f}"


def notes(report: BenchReport) -> list[str]:
    """What a reader must know of the table, formulas included."""
    if origin := report.environment.get("imported_from"):
        return [
            f"Imported from {origin['tool']}. Its figures are by that tool's own formulas; edgeft did not measure them."
        ]
    w = report.workload
    builds = sorted({r["engine_build"] for r in report.results if r.get("engine_build")})
    logit_builds = sorted({r["fidelity"]["logits_build"] for r in report.results if r.get("fidelity")})
    found = next((f for r in report.results if (f := r.get("fidelity")) and not f.get("pack")), None)
    lines = [
        f"Measured {report.created_at} on {box_name(report)}, {w['threads']} threads, with {', '.join(builds) or 'remote servers'}.",
        f"right %: answers of {w['rows']} rows of {w['tasks']}, greedy, at most {w['max_tokens']} tokens; "
        "± is half of Wilson's 95 % interval.",
        "lost/gained: rows that the merged model has right and this one wrong, and the other way round.",
        *(
            [f"{chosen} of the rows are those that the gate or --fit chose by: figures to choose by (route fit), none of quality."]
            if (chosen := w.get("rows_chosen_by"))
            else []
        ),
        *_kept(report),
        "TTFT: p50 / p95 on the client's side; prefill tok/s = prompt tokens / TTFT, empty cache; "
        "decode tok/s = (n-1)/(e2e - TTFT), median ± half its bootstrap interval; one stream, models in turns. "
        "Times of answers, and TTFT where speed was not measured: what a prompt shares with the one before is kept by llama.cpp "
        "and by ONNX on a CPU, as in serving.",
        "peak MB: resident memory over the process tree, sampled every 50 ms; the pages of a memory-mapped file count when touched.",
        *_starts(report),
    ]  # fmt: skip
    lines += _speed_notes(report) + _limit_notes(report)
    if found:
        lines.append(
            f"KLD: mean KL(merged || this) in nats over the full vocabulary; {found['answer']['positions']} answer positions and "
            f"{found['all']['positions']} positions of {found['all']['rows']} rows after the system prompt; logits through "
            f"{', '.join(logit_builds)}. gguf-f16, where it is there, is the engine's own floor."
        )
    lines += [f"{r['id']}: {said}" for r in report.results if (said := pack.note(r.get("fidelity")))]
    others = [r["id"] for r in report.results if (r.get("fidelity") or {}).get("of_another_model")]
    if others:
        lines.append(
            f"{', '.join(others)}: made of another merged model than the reference, so its KLD is not of quantizing alone."
        )
    lines += [
        line for r in report.results for line in autotune.notes(r) + choices.notes(r) + context.notes(r)
    ]
    return lines


def _starts(report: BenchReport) -> list[str]:
    """What a start holds, and what lay in the page cache before it."""
    caches = sorted({c for r in report.results if (c := (r.get("load") or {}).get("page_cache"))})
    return [
        f"start s: from spawning the process to ready, imports included; page cache: {'; '.join(caches) or 'not known'}."
    ]


def _kept(report: BenchReport) -> list[str]:
    """What the share of the adapter's gain is, with intervals, where a base was measured."""
    found = [(r["id"], r["retention"]) for r in report.results if r.get("retention")]
    if not found:
        return []
    listed = ", ".join(f"{name} {k['value']:.3f} ({_interval(k['ci95'])})" for name, k in found)
    return [
        f"kept gain: (this - base)/(merged - base) of the mean score, 95 % bootstrap over {found[0][1]['n']} rows: {listed}."
    ]


def _interval(ci95: list[float] | None) -> str:
    return "no interval" if ci95 is None else f"{ci95[0]:.3f} to {ci95[1]:.3f}"


def _speed_notes(report: BenchReport) -> list[str]:
    """Shapes, intervals that stayed wide, disturbances, share of the roofline, energy, what broke."""
    lines = []
    timed = [r for r in report.results if (r.get("speed") or {}).get("points")]  # older reports have none
    if timed:
        shapes = ", ".join(
            f"{p['asked']['prompt_tokens']} in / {p['asked']['output_tokens']} out"
            for p in timed[0]["speed"]["points"]
        )
        lines.append(f"Speed: {shapes} tokens; the columns show the first shape, report.json all of them.")
        lines += process_notes(timed)
        wide = [r for r in timed if r["speed"].get("settled") is False]
        if wide:
            listed = ", ".join(f"{r['id']} ({_percent(r['speed']['widest_interval'])})" for r in wide)
            lines.append(f"The time was up before every median's interval was within 5 %: {listed}.")
        short = [
            f"{r['id']} ({r['speed']['shortened_to_tokens']})"
            for r in timed
            if r["speed"].get("shortened_to_tokens")
        ]
        if short:
            lines.append(f"Slow, so asked for fewer tokens: {', '.join(short)}.")
    for r in report.results:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for flag in r.get("flags") or []:
            kinds.setdefault(flag["what"], []).append(flag)
        for found in kinds.values():
            mark = "* " if spoiled(r) else ""
            lines.append(
                f"{mark}{r['id']}: {found[0]['detail']} (in {len(found)} of {r['speed']['rounds']} rounds)."
            )
        if r.get("error"):
            lines.append(f"{r['id']} broke off: {r['error']}")
    shares = [r["roofline"] for r in report.results if (r.get("roofline") or {}).get("bandwidth_share")]
    if shares:
        lines.append(
            "of BW %: decode rate x bytes read a token (weights, keys and values) / "
            f"{' or '.join(f'{rate:g}' for rate in sorted({s['bandwidth_gb_per_s'] for s in shares}))} GB/s, "
            "which is what reading memory was measured at here."
        )
        lines += sorted({f"Above 100 %: {s['over_100']}." for s in shares if s["over_100"]})
    lines += _memory_notes(report)
    methods = {r["energy"]["method"] for r in report.results if r.get("energy")}
    lines.append(
        f"J/tok: joules an output token, prefill included, by {', '.join(sorted(methods))}."
        if methods
        else "Energy: not measured."
    )
    return lines


def _memory_notes(report: BenchReport) -> list[str]:
    """Room of keys and values, the smallest limit, and what a long run left of the speed."""
    lines = []
    for r in report.results:
        memory = r.get("memory") or {}
        device = (r.get("load") or {}).get("device") or "cpu"
        if device != "cpu":
            held = f", {memory['vram_bytes'] / 1e6:.0f} MB of its memory" if memory.get("vram_bytes") else ""
            lines.append(f"{r['id']}: on {device}{held}.")
        if kept := memory.get("kv_per_1k_tokens"):
            parts = [
                f"{kept[k] / 1e6:.1f} MB {k.split('_')[0]}"
                for k in ("measured_bytes", "computed_bytes")
                if kept[k]
            ]
            lines.append(f"{r['id']}: keys and values take {', '.join(parts)} per 1,000 tokens.")
        if least := memory.get("smallest_limit"):
            words = least.get("unavailable") or (
                f"{least['bytes'] / 1e6:.0f} MB keep {100 * least['share_of_speed']:.0f} % of the speed ({least['method']})"
            )
            lines.append(f"{r['id']}: smallest memory limit: {words}.")
        if long := r.get("sustained"):
            lines.append(
                f"{r['id']} without a pause for {long['seconds']:.0f} s: {long['first_tok_per_s']:.1f} tok/s in the first sixth, "
                f"{long['last_tok_per_s']:.1f} in the last ({long['flags'] or 'nothing seen to slow it'})."
            )
    return lines


def _limit_notes(report: BenchReport) -> list[str]:
    """What the verdicts were held against, and what was predicted for another box."""
    lines = []
    limits = report.profile.get("limits") or {}
    if limits:
        listed = ", ".join(f"{name} {value:g}" for name, value in limits.items())
        lines.append(
            f"verdict: limits of {report.profile['id']} ({listed}), judged by the 95 % interval of the figure."
        )
    if doubt := report.profile.get("doubt"):
        lines.append(
            f"Is this that box? {doubt[0].upper()}{doubt[1:]}; --predict names a box that one does not own."
        )
    for r in report.results:
        for v in r.get("verdict") or []:
            if v["verdict"] == "INCONCLUSIVE" and v["value"] is not None:
                more = (
                    f"about {v['n_needed']} {v.get('n_of', 'samples')} would decide"
                    if v["n_needed"]
                    else v["why"]
                )
                lines.append(
                    f"{r['id']}: {v['limit']} {v['value']:.3g} against {v['bound']:g} is not decided; {more}."
                )
        for p in r.get("predictions") or []:
            fit = {True: "fits", False: "does not fit", None: "memory not known"}[p["fits"]]
            lines.append(
                f"{r['id']} on {p['profile']}, predicted: decode {p['decode_tok_per_s']:.0f} tok/s, {fit}; assumes {p['assumes']}."
            )
    return lines


def _percent(value: float | None) -> str:
    return "too few samples" if value is None else f"±{100 * value:.0f} %"


def box_name(report: BenchReport) -> str:
    """The box that was measured, in words."""
    profile = report.profile.get("measured_on") or report.profile
    cpu = profile.get("cpu")
    model = cpu.get("model") if isinstance(cpu, dict) else profile.get("cpu_model")
    return str(profile.get("name") or model or profile["id"])


def markdown(report: BenchReport) -> str:
    """The report as Markdown."""
    rows = table_rows(report)
    lines = [
        "# edgeft bench",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *[f"- {line}" for line in notes(report)]]
    return "\n".join(lines) + "\n"
