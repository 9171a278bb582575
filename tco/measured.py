"""What a report says of one model, in the units that costing needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UsageError, unknown
from edgeft.types import BenchReport

GOOD_SHARE = 0.95  # of the requests of a level of the load test


@dataclass(frozen=True)
class Measured:
    """One model of a report; None where the report does not say."""

    id: str
    run: str  # the report and the artefact, for the cells that cite it
    tokens_in: float | None  # a request, mean
    tokens_out: float | None
    e2e_s: float | None  # mean of one request at a time
    e2e_n: int
    decode_tok_per_s: float | None  # median
    ttft_p95_s: float | None
    correct_share: float | None
    correct_n: int
    ci95: tuple[float, float] | None
    price: dict[str, Any] | None
    e2e_error_s: float | None = None  # standard error of that mean
    prefill_share: float | None = None  # of a request's time, by the medians of TTFT and of the whole
    gain: float | None = None  # requests a second within the limits over those of one client
    gain_text: str = ""
    energy: dict[str, Any] | None = None  # mean_w and the method that gave it


def read(result: dict[str, Any], report: BenchReport) -> Measured:
    """The figures of one entry of `report.results`. Tokens are totals over every request that was asked."""
    accuracy = result.get("accuracy") or {}
    speed = result.get("speed") or {}
    e2e = accuracy.get("e2e_s") or {}
    samples = e2e.get("samples") or []
    asked = len(samples) or e2e.get("n") or (accuracy.get("n") or 0) + (accuracy.get("not_scored") or 0)
    sha = result.get("artifact_sha256")
    share, interval = accuracy.get("share"), accuracy.get("ci95")
    ttft = accuracy.get("ttft_s") or speed.get("ttft_s") or {}
    gain, gain_text = concurrency_gain(result.get("load_test"))
    return Measured(
        id=result["id"],
        run=f"report {report.created_at}, {result['id']}" + (f" ({sha[:12]})" if sha else ""),
        tokens_in=_mean(accuracy.get("prompt_tokens"), asked),
        tokens_out=_mean(accuracy.get("output_tokens"), asked),
        e2e_s=sum(samples) / len(samples) if samples else e2e.get("p50"),
        e2e_n=asked,
        decode_tok_per_s=(speed.get("decode_tok_per_s") or {}).get("p50"),
        ttft_p95_s=ttft.get("p95"),
        correct_share=share,
        correct_n=accuracy.get("n") or 0,
        ci95=(interval[0], interval[1]) if interval else None,
        price=result.get("price"),
        e2e_error_s=float(np.std(samples, ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else None,
        prefill_share=min(1.0, ttft["p50"] / e2e["p50"]) if ttft.get("p50") and e2e.get("p50") else None,
        gain=gain,
        gain_text=gain_text,
        energy=result.get("energy"),
    )


def concurrency_gain(load: dict[str, Any] | None) -> tuple[float | None, str]:
    """(best requests a second of a level that held the limits over those of one client, in words); None where no sweep says.

    A level holds where GOOD_SHARE of its requests came within the limits on first token and time per token.
    """
    if not load:
        return None, ""
    levels = [*load["closed"], *load["open"]]
    alone = next((c["requests_per_s"] for c in load["closed"] if c["clients"] == 1), None)
    held = [level for level in levels if level["good_share"] >= GOOD_SHARE]
    limits = ", ".join(f"{name} {value:g}" for name, value in load["limits"].items()) or "no limits set"
    if not alone:
        return None, "its load test has no level of one client"
    if not held:
        return None, f"no level of its load test held the limits ({limits})"
    best = max(held, key=lambda level: level["requests_per_s"])
    at = f"{best['clients']} clients" if "clients" in best else f"arrivals of {best['asked_per_s']:.2f}/s"
    return best[
        "requests_per_s"
    ] / alone, f"{best['requests_per_s']:.2f} requests/s at {at}, {alone:.2f} alone; {limits}"


def _mean(total: float | None, count: int) -> float | None:
    """None for a total of zero as well: a server that reports no usage leaves it at that."""
    return total / count if total and count else None


def local_models(report: BenchReport) -> dict[str, Measured]:
    """The models of a report that ran on the box, by id."""
    return {r["id"]: read(r, report) for r in report.results if r.get("kind") != "api"}


def api_models(report: BenchReport) -> dict[str, Measured]:
    """The API models of a report, by the name that a price table knows (after 'litellm:' or '#')."""
    return {api_name(r["id"]): read(r, report) for r in report.results if r.get("kind") == "api"}


def api_name(name: str) -> str:
    """'litellm:gpt-4o' and 'openai:http://host#gpt-4o' -> 'gpt-4o'."""
    return name.rsplit("#", 1)[-1].removeprefix("litellm:")


def load_report(place: Path) -> BenchReport:
    """A report from its folder or file, checked against its schema. Raises UsageError that says what is wrong with it."""
    from edgeft.bench.reading import checked
    from edgeft.files import read_json

    file = place / "report.json" if place.is_dir() else place
    return checked(read_json(file), str(file))


def choose(report: BenchReport, model: str | None) -> Measured:
    """The model asked for, else the one that answers best, the faster on a tie.

    Raises UsageError where it is not in the report or was measured without tasks.
    """
    known = local_models(report)
    if not known:
        raise UsageError(
            "the report holds no artefact, only API models.",
            "edgeft bench dist/ --tasks rows.jsonl --out report/",
        )
    if model is not None and model not in known:
        raise unknown("the artefact", model, known, "edgeft tco --model ID ...")
    whole = [m for m in known.values() if m.e2e_s and m.tokens_in and m.tokens_out]
    picked = (
        known[model]
        if model
        else max(whole, key=lambda m: (m.correct_share or 0, -(m.e2e_s or 0)), default=None)
    )
    if picked is None or picked not in whole:
        raise UsageError(
            f"the report has no time and tokens of a request for {model or 'any artefact'}.",
            "edgeft bench dist/ --tasks rows.jsonl --out report/",
        )
    return picked
