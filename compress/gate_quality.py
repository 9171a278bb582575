"""How far an artefact is from the merged model: distributions, answers, and what is left of the adapter's gain.

The formulas are the bench's own (bench/fidelity.py, score.py, stats.py): a gate that counted otherwise than the report
would pass what the report then calls bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import child
from edgeft.bench import fidelity, stats
from edgeft.bench.score import hopeless, score
from edgeft.compress.gate_limits import FAIL, INCONCLUSIVE, NOT_RUN, judge
from edgeft.compress.gate_reading import Line, Running
from edgeft.compress.gate_reference import OWN
from edgeft.files import published_name
from edgeft.rows import Row, answer_of, prompt_of

MIN_ROWS = 8  # below it a score decides nothing, whatever its interval
POSITIONS = ("kld", "same_top1", "right_delta", "nll", "nll_reference", "answer")
Limits = dict[str, float | None]


def distances(
    folder: Path, engine: str, reference: dict[str, Any], log: Path, threads: int
) -> dict[str, Any]:
    """What `fidelity.compare` gives, by domain of the reference's rows."""
    found = child.call(
        "edgeft.bench.fidelity:compare",
        log=log,
        title=f"the logits of {published_name(folder)}",
        engine=engine,
        folder=str(folder),
        plan=reference["plan"],
        reference=str(reference["logprobs"]),
        threads=threads,
    )
    domains = [row["domain"] for row in reference["plan"]["rows"]]
    return {
        domain: {
            "build": found["build"],
            **{
                key: [v for v, d in zip(found[key], domains, strict=True) if d == domain] for key in POSITIONS
            },
        }
        for domain in dict.fromkeys(domains)
    }


def kld_lines(found: dict[str, Any], limits: Limits) -> list[Line]:
    """`kld` and `same_top1` of each domain; own domain first."""
    lines = []
    for domain in sorted(found, key=lambda d: d != OWN):
        figures = fidelity.summarize(found[domain])["all"]
        tail = "" if domain == OWN else "_other"
        n = {"n": figures["rows"], "positions": figures["positions"], "domain": domain}
        if figures["rows"] < MIN_ROWS:  # the same few rows drawn again and again would look certain
            n["interval"] = f"over positions: {figures['rows']} rows are fewer than {MIN_ROWS}"
            for figure, key in (("kld_ci95", "kld"), ("same_top1_ci95", "same_top1")):
                values = np.concatenate([np.asarray(row, dtype=float) for row in found[domain][key]])
                figures[figure] = stats.bootstrap_ratio_of_sums(values, np.ones(len(values)))
        lines += [
            {"check": f"kld {domain}", **judge(f"kld{tail}", limits[f"kld{tail}"], figures["kld_mean"], figures["kld_ci95"],
             what="mean KL(merged || artefact), nats", **n)},
            {"check": f"same top-1 {domain}", **judge(f"same_top1{tail}", limits[f"same_top1{tail}"], figures["same_top1"],
             figures["same_top1_ci95"], what="share of positions with merged's most likely token", **n)},
        ]  # fmt: skip
    return lines


def effect_line(found: dict[str, Any], base_sums: list[float], limit: float | None) -> Line:
    """KL(merged || artefact) / KL(merged || base) on the answers of the own rows; `base_sums`: nats a row."""
    sums = answer_sums(found)
    if not sum(base_sums) > 0:
        return {"check": "effect", "verdict": NOT_RUN, "why": "the merged model says what its base says"}
    ratio = sum(sums) / sum(base_sums)
    ci95 = stats.bootstrap_ratio_of_sums(sums, base_sums)
    what = "KL(merged || artefact) / KL(merged || base) on answers"
    return {"check": "effect", **judge("effect", limit, ratio, ci95, len(sums), what=what)}


def answer_sums(found: dict[str, Any]) -> list[float]:
    """KLD summed over each row's answer positions, nats."""
    return [float(np.dot(kld, answer)) for kld, answer in zip(found["kld"], found["answer"], strict=True)]


def max_tokens(rows: list[Row]) -> int:
    """Room for an answer, as bench gives it."""
    return max(16, max((len(answer_of(row)) for row in rows), default=0) // 2)


def scores(running: Running, rows: list[Row], room: int) -> list[float | None]:
    """The score of each row's greedy answer of at most `room` tokens; None where its task is not scored.

    An answer is left as soon as it can't be right any more: a base that talks on would take most of the time.
    """
    return [score(row, running.answer(prompt_of(row), room, partial(hopeless, row)).text) for row in rows]


def scored(rows: list[Row]) -> list[Row]:
    """The rows whose task is scored."""
    return [row for row in rows if score(row, answer_of(row)) is not None]


def task_lines(
    artefact: Sequence[float], merged: Sequence[float], base: Sequence[float] | None, limits: Limits
) -> list[Line]:
    """`retention` and `task drop` from scores of the same rows, 0 to 1."""
    q, m = np.asarray(artefact, dtype=float), np.asarray(merged, dtype=float)
    n = len(q)
    drop = judge("task_drop", limits["task_drop"], float((m - q).mean()), stats.bootstrap(m - q, np.mean), n,
                 what="share of right answers lost against merged", artefact=float(q.mean()), merged=float(m.mean()))  # fmt: skip
    lines = [retention_line(artefact, merged, base, limits["retention"]), {"check": "task drop", **drop}]
    for line in lines:
        if n < MIN_ROWS and line["verdict"] != NOT_RUN:
            line |= {"verdict": INCONCLUSIVE, "why": f"{n} rows are fewer than {MIN_ROWS}"}
    return lines


def retention_line(
    artefact: Sequence[float], merged: Sequence[float], base: Sequence[float] | None, limit: float | None
) -> Line:
    """Adapter-gain retention (artefact - base) / (merged - base)."""
    if base is None:
        return {"check": "retention", "verdict": NOT_RUN, "why": "no adapter was merged"}
    value, ci95 = stats.retention(artefact, merged, base)
    means = {
        name: float(np.mean(s)) for name, s in (("artefact", artefact), ("merged", merged), ("base", base))
    }
    if value is None:
        return {
            "check": "retention",
            "verdict": NOT_RUN,
            "why": "n/a: merged is not better than base on these rows",
            **means,
        }
    line = judge(
        "retention", limit, value, ci95, len(merged), what="(artefact - base) / (merged - base)", **means
    )
    if ci95 is None:
        line["why"] = "merged is not surely better than base on so few rows"
    return {"check": "retention", **line}


def failed(lines: list[Line]) -> list[Line]:
    """The lines that fail, the most telling first: retention says more than a distance."""
    order = ("load", "tokens", "template", "smoke", "retention", "effect", "task drop")
    wrong = [line for line in lines if line["verdict"] == FAIL]
    return sorted(
        wrong, key=lambda line: order.index(line["check"]) if line["check"] in order else len(order)
    )
