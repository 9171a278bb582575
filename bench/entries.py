"""From the journal of a run to the entries of its report."""

from __future__ import annotations

from typing import Any

from edgeft.bench import choices, context, roofline, speed_figures
from edgeft.bench.answers import figures
from edgeft.bench.energy import Meter
from edgeft.bench.energy import result as energy_of
from edgeft.bench.journal import Journal
from edgeft.bench.stats import mcnemar, retention
from edgeft.bench.targets import Target
from edgeft.bench.verdict import verdicts
from edgeft.bench.workload import Workload

# Kinds of fact that say what broke.
ERRORS = (
    "error",
    "tuning-error",
    "load-error",
    "memory-error",
    "fidelity-error",
    "choices-error",
    "context-error",
)


def entry_of(
    target: Target, journal: Journal, workload: Workload, box: dict[str, Any], meter: Meter, others: list[dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """A target's entry in the report, from what the journal holds."""
    start, items = journal.last(target.id, "start"), journal.all(target.id, "answer")
    found_speed, flags = speed_figures.result(journal, target, workload.points, workload.speed_seconds)
    result: dict[str, Any] = {
        "id": target.id, "kind": target.kind, "engine": target.engine, "path": str(target.path) if target.path else None,
        "artifact_sha256": target.sha256, "size_bytes": target.size_bytes, **target.facts,
        "load": None, "speed": found_speed, "memory": None, "price": None,
        "accuracy": figures(items) if items else None,
        "fidelity": journal.last(target.id, "fidelity"),
        "choices": choices.result(journal, target),
        "context": context.result(journal, target),
        "load_test": journal.last(target.id, "load"),
        "sustained": journal.last(target.id, "sustained"),
        "energy": energy_of(journal.all(target.id, "block"), meter),
        "flags": flags,
        "run_profile": (start or {}).get("run_profile") or {},
        "autotune": journal.last(target.id, "tuned"),
        "error": next((e for kind in ERRORS if (e := journal.last(target.id, kind))), None),
    }  # fmt: skip
    if start:
        first = journal.all(target.id, "start")[0]
        result["engine_build"] = start["engine_build"]
        result["load"] = {
            **{k: first[k] for k in ("cold_start_s", "load_s", "load_mode")},
            "page_cache": journal.last(target.id, "page cache"),
            "device": start.get("device", "cpu"),
        }
    answered = journal.last(target.id, "answered") or {}
    if peak := answered.get("memory"):
        result["memory"] = {f"peak_{k}": v for k, v in peak.items()}
        result["memory"]["vram_bytes"] = answered.get("vram_bytes")
        result["memory"]["over"] = "process tree, sampled every 50 ms; load, speed and accuracy runs"
        result["memory"] |= journal.last(target.id, "memory") or {}
    if target.kind == "api" and result["accuracy"]:
        result |= price_of(target, result["accuracy"])
    result["roofline"] = roofline.share(result, target, box.get("measured_on") or box)
    result["predictions"] = [p for other in others if (p := roofline.predict(result, other))]
    result["verdict"] = verdicts(result, box.get("limits") or {}, box.get("kind")) if target.path else []
    return result


def compare_with_reference(
    results: list[dict[str, Any]], items: list[dict[str, Any]], reference: str
) -> None:
    """Add to each result the paired comparison of its right answers with the reference's (exact McNemar)."""
    right = {(i["model_id"], i["item_id"]): i["correct"] for i in items}
    base = {item: value for (model, item), value in right.items() if model == reference}
    for result in results:
        pairs = [
            (base[i], v)
            for (m, i), v in right.items()
            if m == result["id"] and i in base and None not in (base[i], v)
        ]
        if result["id"] == reference or not pairs:
            result["against_reference"] = None
            continue
        lost, gained = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        result["against_reference"] = {
            "lost": lost,
            "gained": gained,
            "n": len(pairs),
            "mcnemar_p": mcnemar(lost, gained),
        }


def add_retention(
    results: list[dict[str, Any]], items: list[dict[str, Any]], reference: str, base: str
) -> None:
    """Add to each result the share of the adapter's gain that it keeps: (this - base)/(merged - base) of the mean score.

    Over the rows that all three answered, with a bootstrap interval; None without a base or where merged is not better.
    """
    scores: dict[str, dict[str, float]] = {}
    for item in items:
        if item["score"] is not None:
            scores.setdefault(item["model_id"], {})[item["item_id"]] = item["score"]
    for result in results:
        result["retention"] = None
        known = [scores.get(name, {}) for name in (result["id"], reference, base)]
        shared = sorted(set.intersection(*(set(k) for k in known)))
        if result["id"] in (reference, base) or not shared:
            continue
        own, merged, before = ([k[row] for row in shared] for k in known)
        value, interval = retention(own, merged, before)
        result["retention"] = None if value is None else {"value": value, "ci95": interval, "n": len(shared)}


def price_of(target: Target, accuracy: dict[str, Any]) -> dict[str, Any]:
    """An API model's list price and what this run's tokens cost at it."""
    if target.engine != "litellm":
        return {"price": None, "run_cost_usd": None}
    from edgeft.bench.prices import list_price

    price = list_price(target.facts["model"])
    if price is None:
        return {"price": None, "run_cost_usd": None}
    cost = (
        accuracy["prompt_tokens"] * price["usd_per_mtok_in"]
        + accuracy["output_tokens"] * price["usd_per_mtok_out"]
    )
    return {"price": price, "run_cost_usd": cost / 1e6}
