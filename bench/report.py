"""The report in three forms from the same numbers: JSON for machines, Markdown, and a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.files import write_json, write_jsonl, write_text
from edgeft.types import BenchReport

COLUMNS = (
    "model", "MB", "bits/w", "right %", "lost/gained", "KLD answer", "KLD all", "same top-1 %", "TTFT ms", "prefill tok/s",
    "decode tok/s", "peak MB", "start s",
)  # fmt: skip


def write_report(report: BenchReport, items: list[dict[str, Any]], out: Path) -> None:
    """Write `items.jsonl`, `report.md`, `report.html`, and `report.json` last, which says that all are there."""
    from edgeft.bench.html import page

    write_jsonl(out / "items.jsonl", items)
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.html", page(report))
    write_json(out / "report.json", report.to_dict())


def table_rows(report: BenchReport) -> list[list[str]]:
    """A row a model for `COLUMNS`; what was not measured is a dash."""
    return [_row(result) for result in report.results]


def _row(r: dict[str, Any]) -> list[str]:
    speed, fidelity, against = r["speed"] or {}, r["fidelity"] or {}, r["against_reference"] or {}
    accuracy = r["accuracy"]
    times = speed.get("ttft_s") or accuracy["ttft_s"]
    return [
        r["id"],
        number(r["size_bytes"], 1e-6, 0),
        number(r.get("bits_per_weight"), 1, 2),
        f"{100 * accuracy['share']:.1f} ±{50 * (accuracy['ci95'][1] - accuracy['ci95'][0]):.1f}"
        if accuracy["n"]
        else "–",
        f"{against['lost']}/{against['gained']}" if against else "–",
        number((fidelity.get("answer") or {}).get("kld_mean"), 1, 4),
        number((fidelity.get("all") or {}).get("kld_mean"), 1, 4),
        number((fidelity.get("all") or {}).get("same_top1"), 100, 1),
        f"{1e3 * times['p50']:.0f} / {1e3 * times['p95']:.0f}",
        number((speed.get("prefill_tok_per_s") or {}).get("p50"), 1, 0),
        number((speed.get("decode_tok_per_s") or {}).get("p50"), 1, 1),
        number((r["memory"] or {}).get("peak_rss_bytes"), 1e-6, 0),
        number((r["load"] or {}).get("cold_start_s"), 1, 1),
    ]


def number(value: float | None, scale: float, digits: int) -> str:
    """A number, or a dash where it was not measured."""
    return "–" if value is None else f"{value * scale:.{digits}f}"


def notes(report: BenchReport) -> list[str]:
    """What a reader must know of the table, formulas included."""
    w = report.workload
    builds = sorted({r["engine_build"] for r in report.results if r.get("engine_build")})
    logit_builds = sorted({r["fidelity"]["logits_build"] for r in report.results if r["fidelity"]})
    found = next((r["fidelity"] for r in report.results if r["fidelity"]), None)
    lines = [
        f"Measured {report.created_at} on {box_name(report)}, {w['threads']} threads, with {', '.join(builds) or 'remote servers'}.",
        f"right %: answers of {w['rows']} rows of {w['tasks']}, greedy, at most {w['max_tokens']} tokens; "
        "± is half of Wilson's 95 % interval.",
        "lost/gained: rows that the merged model has right and this one wrong, and the other way round.",
        "TTFT: p50 / p95 on the client's side; prefill tok/s = prompt tokens / TTFT, empty cache; "
        "decode tok/s = (n-1)/(e2e - TTFT); one stream.",
        "peak MB: resident memory over the process tree, sampled every 50 ms; the pages of a memory-mapped file count when touched.",
        "start s: from spawning the process to ready, imports included.",
    ]  # fmt: skip
    if found:
        lines.append(
            f"KLD: mean KL(merged || this) in nats over the full vocabulary; {found['answer']['positions']} answer positions and "
            f"{found['all']['positions']} positions of {found['all']['rows']} rows after the system prompt; logits through "
            f"{', '.join(logit_builds)}. gguf-f16, where it is there, is the engine's own floor."
        )
    others = [r["id"] for r in report.results if (r["fidelity"] or {}).get("of_another_model")]
    if others:
        lines.append(
            f"{', '.join(others)}: made of another merged model than the reference, so its KLD is not of quantizing alone."
        )
    return lines


def box_name(report: BenchReport) -> str:
    """The box in words."""
    profile = report.profile
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
