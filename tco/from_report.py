"""The scenario that a report, a box and a few flags make: an own box against API models at list price, and at their batch price."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from edgeft.tco.measured import api_models, choose, load_report
from edgeft.tco.prices import BATCH, FIELDS, FRONTIER, SMALL, price_table
from edgeft.tco.scenario import SCHEMA, Scenario, build

STAFF = {"value": 2, "range": [0.5, 6], "why": "looking after one box beside others; nobody counted it"}


def from_report(
    report: Path,
    profile: str,
    *,
    model: str | None = None,
    apis: tuple[str, ...] = (),
    requests_per_month: float = 100_000,
    usd_per_kwh: float = 0.15,
    changed: Mapping[str, float] | None = None,
) -> Scenario:
    """Raises UsageError for unknown models, boxes and figures, and for a report without tasks."""
    file = report / "report.json" if report.is_dir() else report
    found = load_report(file)
    chosen, measured = choose(found, model), api_models(found)
    names = [name.rsplit("#", 1)[-1].removeprefix("litellm:") for name in apis]
    if not names:
        names = [*(name for name, m in measured.items() if m.price), FRONTIER, SMALL]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        columns[name] = {"kind": "api", "model": name}
        if not (name in measured and measured[name].price) and _has_batch(name):
            columns[f"{name}, batch"] = {"like": name, "model": name, "batch": True}
    columns["own"] = {
        "kind": "own", "title": f"{chosen.id} on {profile}", "profile": profile,
        "figures": {"staff_hours_per_month": STAFF},
    }  # fmt: skip
    asked = {"requests_per_month": requests_per_month, "usd_per_kwh": usd_per_kwh, **(changed or {})}
    value = {
        "schema": SCHEMA, "name": f"{requests_per_month:,g} requests a month: own box against API", "date": date.today(),
        "report": str(file.resolve()), "artifact": chosen.id, "columns": columns,
    }  # fmt: skip
    return build(value, "the command", Path(), asked)


def _has_batch(name: str) -> bool:
    table, _ = price_table()
    entry = table.get(name) or {}
    return all(entry.get(FIELDS[key] + BATCH) is not None for key in ("usd_per_mtok_in", "usd_per_mtok_out"))
